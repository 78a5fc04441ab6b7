"""Wordle: marks worked out by hand, the rule stated another way for all small words, and whole games."""

from itertools import product
from typing import Any

import pytest

from llmrl import envs
from llmrl.envs.wordle import marks
from llmrl.envs.words import WORDS
from llmrl.errors import RefusedError


def game(word: str, **options: Any) -> Any:
    return envs.load("wordle", options).make({"word": word}, 0)


@pytest.mark.parametrize(
    ("guess", "word", "expected"),
    [
        ("crane", "crane", "GGGGG"),
        ("crane", "zzzzz", "-----"),
        ("speed", "abide", "--Y-Y"),  # one e in the word: the first e is marked, the second is not
        ("speed", "erase", "Y-YY-"),  # two e's and one s, all elsewhere
        ("speed", "steal", "G-G--"),  # the green e uses up the only one
        ("allee", "eagle", "YY-YG"),  # the last e is green; the other one is the first e's
        ("geese", "eerie", "-GY-G"),
        ("level", "elbow", "YY---"),
        ("llama", "small", "YYGY-"),
        ("mummy", "mimic", "G-G--"),
        ("abbey", "babes", "YYGG-"),
    ],
)
def test_golden_marks(guess: str, word: str, expected: str) -> None:
    assert marks(guess, word) == expected


def test_marks_by_the_rule_stated_another_way_for_all_words_of_four_letters_of_three() -> None:
    words = ["".join(letters) for letters in product("abc", repeat=4)]
    for guess, word in product(words, words):
        got = marks(guess, word)
        for place, mark in enumerate(got):
            assert (mark == "G") == (guess[place] == word[place])
        for letter in "abc":
            of_letter = [mark for own, mark in zip(guess, got, strict=True) if own == letter]
            assert sum(mark != "-" for mark in of_letter) == min(guess.count(letter), word.count(letter))
            not_green = [mark for mark in of_letter if mark != "G"]
            assert not_green == sorted(not_green, reverse=True)  # Y (0x59) before - (0x2d): from left to right


def consistent(dialogue: list[dict[str, Any]]) -> str:
    """The player that takes the first word of the list that would have been marked so."""
    told = [m["content"].split("\n") for m in dialogue if m["role"] == "user"][1:]
    seen = [(lines[0].replace(" ", ""), lines[1].replace(" ", "")) for lines in told]
    return f"My guess: {next(w for w in WORDS if all(marks(guess, w) == mark for guess, mark in seen))}"


def test_a_consistent_player_wins_nearly_always(play: Any) -> None:
    hidden = WORDS[::11]
    results = [play(game(word), consistent) for word in hidden]
    assert all(done for _, _, done in results)
    assert sum(rewards["success"] for _, rewards, _ in results) > 0.9 * len(hidden)


def test_the_texts_and_the_last_guess(play: Any) -> None:
    guesses = iter(["What shall I say? SPEED", "no", "zzzzz", "<guess>steal</guess>, I think"])
    dialogue, rewards, done = play(game("steal", guesses=4, progress=0.5), lambda _: next(guesses))
    assert [m["content"] for m in dialogue if m["role"] == "user"][1:] == [
        "s p e e d\nG - G - -\n3 guesses left.",
        "I found no word of five letters. End your message with your guess. 2 guesses left.",
        "z z z z z\n- - - - -\n1 guess left.",
    ]
    assert done
    assert rewards == {"success": 1.0, "progress": pytest.approx(0.5)}


def test_progress_counts_each_place_once(play: Any) -> None:
    _, rewards, _ = play(game("steal", guesses=3, progress=1.0), lambda _: "speed")
    assert rewards == {"success": 0.0, "progress": pytest.approx(0.4)}


def test_only_listed_words(play: Any) -> None:
    guesses = iter(["zzzzz", "crane"])
    dialogue, rewards, _ = play(game("crane", only_listed=True), lambda _: next(guesses))
    assert dialogue[2]["content"] == "zzzzz is not in my list of words. 5 guesses left."
    assert rewards["success"] == 1


def test_terse(play: Any) -> None:
    guesses = iter(["?", "speed", "steal"])
    dialogue, _, _ = play(game("steal", wording="terse"), lambda _: next(guesses))
    assert [m["content"] for m in dialogue if m["role"] == "user"] == ["5?", "5?", "G-G--"]


def test_the_list_and_its_splits() -> None:
    assert len(set(WORDS)) == len(WORDS) > 600
    assert all(len(word) == 5 and word.isascii() and word.islower() and word.isalpha() for word in WORDS)
    rows = envs.load("wordle").rows
    assert rows is not None
    train, test = ({row["word"] for row in rows(split, 10_000, 3)} for split in ("train", "test"))
    assert train | test == set(WORDS)
    assert not train & test
    assert 0.1 < len(test) / len(WORDS) < 0.3


def test_a_word_that_is_none_is_refused() -> None:
    with pytest.raises(RefusedError, match="column `word`"):
        game("four")
