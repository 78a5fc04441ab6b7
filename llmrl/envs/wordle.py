"""Wordle: find a hidden word of five letters; each guess is answered letter by letter.

Invariants: the marks are those of the original game. A letter in its right place is green (G). Then, from left to
right, a letter that the hidden word still has elsewhere, not yet accounted for by a green or an earlier mark, is
yellow (Y). All others are grey (-). Every message costs one guess, also one without a word of five letters.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from llmrl.envs.options import Options, checked, column
from llmrl.envs.protocol import EnvironmentKind, Message, Row, Split, StepResult
from llmrl.envs.reading import guess_part, last_word, said
from llmrl.envs.single_use import SingleUse
from llmrl.envs.splits import pick, sampled
from llmrl.envs.words import WORDS
from llmrl.errors import RefusedError

NAME = "wordle"
LETTERS = 5
OPENING = (
    "Let us play Wordle. I am thinking of an English word of five letters. You have {count}. I mark each letter of "
    "your guess: G where it is right, Y where my word has it in another place, - where my word does not have it "
    "(again). End your message with your guess."
)


class WordleOptions(Options):
    guesses: Annotated[int, Field(ge=1)] = 6
    """How many messages the player has."""
    only_listed: bool = False
    """Mark words of the list only; another one costs a guess. Otherwise any five letters are marked."""
    progress: Annotated[float, Field(ge=0)] = 0.0
    """Reward `progress` for each place found for the first time; all five together give this much."""
    wording: Literal["full", "terse"] = "full"
    """`full` sentences, or `terse`: the opening `5?`, then marks such as `GY--G` alone."""


class Wordle:
    """One game. Rewards: `success` (1 or 0, when it is over), and `progress` where it is asked for. Row: `word`."""

    def __init__(self, row: Row, seed: int, options: WordleOptions) -> None:
        self._word = column(row, "word", str, NAME).lower()
        if last_word(self._word, LETTERS) != self._word:
            raise RefusedError(f"{NAME}: column `word` is {self._word!r:.80}, which is not five English letters")
        self._options = options
        self._left = options.guesses
        self._found: set[int] = set()
        self._use = SingleUse(NAME)

    async def init(self) -> list[Message]:
        self._use.begin()
        terse = self._options.wording == "terse"
        return _user("5?" if terse else OPENING.format(count=_count(self._left)))

    async def step(self, message: Message) -> StepResult:
        self._use.turn()
        self._left -= 1
        guess = last_word(guess_part(said(message)), LETTERS)
        known = guess is not None and (not self._options.only_listed or guess in WORDS or guess == self._word)
        marked = marks(guess, self._word) if guess is not None and known else ""
        rewards = self._progress(marked)
        if guess == self._word or self._left == 0:
            self._use.end()
            return StepResult([], done=True, rewards={"success": float(guess == self._word), **rewards})
        return StepResult(_user(self._feedback(guess, marked)), rewards=rewards)

    async def close(self) -> None:
        self._use.end()

    def _progress(self, marked: str) -> dict[str, float]:
        if not self._options.progress:
            return {}
        new = {place for place, mark in enumerate(marked) if mark == "G"} - self._found
        self._found |= new
        return {"progress": self._options.progress * len(new) / LETTERS}

    def _feedback(self, guess: str | None, marked: str) -> str:
        if self._options.wording == "terse":
            return marked or "5?"
        if guess is None:
            said_back = "I found no word of five letters. End your message with your guess."
        elif not marked:
            said_back = f"{guess} is not in my list of words."
        else:
            said_back = f"{' '.join(guess)}\n{' '.join(marked)}\n"
        return f"{said_back}{'' if marked else ' '}{_count(self._left)} left."


def marks(guess: str, word: str) -> str:
    """G, Y or - for each letter of `guess`; both have the same length."""
    unplaced = Counter(letter for own, letter in zip(guess, word, strict=True) if own != letter)
    result = ""
    for own, letter in zip(guess, word, strict=True):
        if own == letter:
            result += "G"
        elif unplaced[own] > 0:
            unplaced[own] -= 1
            result += "Y"
        else:
            result += "-"
    return result


def load(options: dict[str, Any]) -> EnvironmentKind:
    """Brings its own rows: hidden words, by seed."""
    own = checked(WordleOptions, options, NAME)
    return EnvironmentKind(lambda row, seed: Wordle(row, seed, own), _rows, multi_turn=own.guesses > 1)


def _rows(split: Split, count: int, seed: int) -> list[Row]:
    def candidates() -> Iterator[tuple[str, Row]]:
        for index in sampled(len(WORDS), count, seed):
            yield f"{NAME}/{WORDS[index]}", {"word": WORDS[index]}

    return pick(candidates(), split, count, NAME)


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _count(left: int) -> str:
    return "1 guess" if left == 1 else f"{left} guesses"
