"""Number guessing: the rules, all games of small ranges, and texts that the starter can read."""

import math
import re
from typing import Any

import pytest

from llmrl import envs
from llmrl.errors import RefusedError


def game(numbers: int, number: int, **options: Any) -> Any:
    return envs.load("number_guessing", options).make({"numbers": numbers, "number": number}, 0)


class Recorded:
    """An environment whose `progress` is noted turn by turn."""

    def __init__(self, inner: Any, steps: list[float]) -> None:
        self.inner, self.steps = inner, steps
        self.init, self.close = inner.init, inner.close

    async def step(self, message: dict[str, Any]) -> Any:
        result = await self.inner.step(message)
        self.steps.append(result.rewards["progress"])
        return result


def bisect(dialogue: list[dict[str, Any]]) -> str:
    """The player that halves what is left, from the full texts alone."""
    texts = [m["content"] for m in dialogue if m["role"] == "user"]
    low, high = 1, int(re.findall(r"from 1 to (\d+)", texts[0])[0])
    for text in texts[1:]:
        way, guess = re.findall(r"(higher|lower) than (\d+)", text)[0]
        low, high = (int(guess) + 1, high) if way == "higher" else (low, int(guess) - 1)
    assert low <= high
    return f"Between {low} and {high}, so I say {(low + high) // 2}."


@pytest.mark.parametrize("numbers", range(2, 17))
def test_halving_finds_every_number_in_the_least_number_of_guesses(play: Any, numbers: int) -> None:
    needed = numbers.bit_length()  # k guesses tell 2^k - 1 numbers apart
    for number in range(1, numbers + 1):
        dialogue, rewards, done = play(game(numbers, number, guesses=needed), bisect)
        assert done
        assert rewards == {"success": 1.0}
        assert len([m for m in dialogue if m["role"] == "assistant"]) <= needed


def test_every_game_of_two_guesses_up_to_four(play: Any) -> None:
    wins = 0
    for number in range(1, 5):
        for first in range(1, 5):
            for second in range(1, 5):
                guesses = iter([first, second])
                dialogue, rewards, done = play(game(4, number, guesses=2), lambda _, left=guesses: str(next(left)))
                assert done
                won = number in (first, second)
                assert rewards["success"] == won
                wins += won
                if first != number:
                    way = "higher" if number > first else "lower"
                    assert dialogue[2]["content"] == f"My number is {way} than {first}. 1 guess left."
                else:
                    assert len(dialogue) == 2
    assert wins == 4 * 7  # of the 16 pairs of guesses, 7 hold a given number


def test_the_texts(play: Any) -> None:
    guesses = iter(["5", "what?", "2.5", "8"])
    dialogue, rewards, done = play(game(8, 7, guesses=4, guess_cost=0.1), lambda _: next(guesses))
    assert [m["content"] for m in dialogue if m["role"] == "user"] == [
        "I am thinking of a whole number from 1 to 8. You have 4 guesses; after each I say whether my number is higher "
        "or lower. End your message with your guess.",
        "My number is higher than 5. 3 guesses left.",
        "I found no whole number from 1 to 8 at the end. End your message with your guess. 2 guesses left.",
        "I found no whole number from 1 to 8 at the end. End your message with your guess. 1 guess left.",
    ]
    assert done
    assert rewards == {"success": 0.0, "guess_cost": pytest.approx(-0.4)}


def test_progress_is_what_is_ruled_out_in_bits(play: Any) -> None:
    guesses = iter(["4", "4", "9", "3", "x", "6"])
    environment = game(8, 6, guesses=6, progress=2.0)
    steps: list[float] = []
    _, rewards, _ = play(Recorded(environment, steps), lambda _: next(guesses))
    # 5..8 is left after the 4: one bit of three. Said again, out of range, ruled out already, no number: nothing.
    assert steps == pytest.approx([2 / 3, 0, 0, 0, 0, 4 / 3])
    assert rewards == {"success": 1.0, "progress": pytest.approx(2.0)}


def test_progress_of_a_lost_game(play: Any) -> None:
    for number in (1, 2, 5, 8):
        guesses = iter(["3", "7", "3"])
        _, rewards, done = play(game(8, number, guesses=3, progress=1.0), lambda _, left=guesses: next(left))
        assert done
        left = {1: 2, 2: 2, 5: 3, 8: 1}[number]
        assert rewards == {"success": 0.0, "progress": pytest.approx(math.log2(8 / left) / 3)}


def test_the_terse_texts_are_a_handful_of_the_starters_tokens(play: Any) -> None:
    from llmrl.models.starter import _data_folder, build_tokenizer

    tokenizer = build_tokenizer(_data_folder() / "mixed" / "train.jsonl")
    guesses = iter(["5", "?", "8", "7"])
    dialogue, _, _ = play(game(10, 7, wording="terse"), lambda _: next(guesses))
    texts = [m["content"] for m in dialogue if m["role"] == "user"]
    assert texts == ["1 - 10", "> 5", "1 - 10", "< 8"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 7


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("7", 7), ("I say 7.", 7), ("3 is too low, so 7", 7), ("1-7", 7), ("-7", None), ("= -7", None), ("7.0", 7),
        ("7.5", None), ("11", None), ("0", None), ("seven", None), ("", None), ("<guess>4</guess> (not 5)", 4),
        ("<guess>2</guess><guess>3</guess>", 3), ("<guess>x</guess> 5", None), ("5 <guess>", 5), ("x7", None),
        ("Answer: 9\n", 9), ("9" * 5000, None), ("٣", 3), ("\0" + "8", 8), ("1,000", None), ("7/2", None),
        ("7 on my 2nd try", 7),
    ],
)  # fmt: skip
def test_which_guess_is_read(text: str, guess: int | None) -> None:
    from llmrl.envs.number_guessing import read_guess

    assert read_guess(text, 10) == guess


@pytest.mark.parametrize("options", [{}, {"numbers": 100}, {"numbers": 40, "vary_range": False}])
def test_rows_are_disjoint_reproducible_and_within_the_range(options: dict[str, Any]) -> None:
    kind = envs.load("number_guessing", options)
    assert kind.rows is not None
    seen = {
        split: [tuple(row.values()) for s in range(3) for row in kind.rows(split, 50, s)] for split in ("train", "test")
    }
    assert not set(seen["train"]) & set(seen["test"])
    assert kind.rows("train", 50, 1) == kind.rows("train", 50, 1) != kind.rows("train", 50, 2)
    first = kind.rows("train", 50, 1)
    assert len({tuple(row.values()) for row in first}) == len(first)
    largest = options.get("numbers", 10)
    for numbers, number in seen["train"] + seen["test"]:
        assert largest // 2 < numbers <= largest
        assert 1 <= number <= numbers


def test_both_splits_have_nearly_every_hidden_number() -> None:
    """Otherwise training would teach never to say those of the test split."""
    rows = envs.load("number_guessing", {"numbers": 20}).rows
    assert rows is not None
    assert {row["number"] for row in rows("train", 500, 0)} == set(range(1, 21))
    assert len({row["number"] for row in rows("test", 500, 0)}) >= 12


def test_a_world_without_test_rows_is_refused() -> None:
    rows = envs.load("number_guessing", {"numbers": 2}).rows
    assert rows is not None
    with pytest.raises(RefusedError, match=r"too small.*numbers|numbers.*too small"):
        rows("test", 5, 0), rows("train", 5, 0)


@pytest.mark.parametrize(("numbers", "number"), [(8, 9), (8, 0), ("8", 1), (8, True)])
def test_a_row_that_is_no_game_is_refused(numbers: Any, number: Any) -> None:
    with pytest.raises(RefusedError, match="column `number"):
        game(numbers, number)
