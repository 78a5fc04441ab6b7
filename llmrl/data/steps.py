"""An answer as steps: where each ends in its text, and after which of its tokens. There is no other definition.

Invariants: a step holds the delimiter that closes it, the last one whatever ends the answer; the steps of an answer are
all of it. Nothing is tokenised again, and two questions have one answer each, because a step is what a policy does:

- a token that reaches over a boundary belongs to the step that it closes: the step is not over before it, and what is
  sampled next begins after it;
- what shows nothing, such as a blank line, belongs to the step before it: otherwise nothing but blanks would be a step,
  and two states would differ that say the same.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmrl.config.functions import function_named
from llmrl.config.steps import NEWLINE, AnswerStepKeys
from llmrl.errors import RefusedError

Segmenter = Callable[[str], list[str]]
"""From a text to its steps in order, which together are the text."""
Decode = Callable[[Sequence[int]], str]


TRIED_ANSWER = "17 + 25 = 42\nSo it is 42.\n\nAnswer: 42"


def segmenter(keys: AnswerStepKeys) -> Segmenter:
    """What divides answers. Raises RefusedError for an expression that is none, or a function that does not divide a
    short answer on which it is tried."""
    if keys.step_function is None:
        return by_delimiter(keys.step_delimiter)
    split = by_function(function_named(keys.step_function, "step_function"), keys.step_function)
    split(TRIED_ANSWER)
    return split


def by_delimiter(pattern: str) -> Segmenter:
    """Steps that end with a match of the regular expression. Raises RefusedError for one that is none."""
    try:
        delimiter = re.compile(pattern)
    except re.error as error:
        raise RefusedError(f"step_delimiter {pattern!r} is no regular expression: {error}") from None
    if delimiter.match(""):
        raise RefusedError(f"step_delimiter {pattern!r} matches the empty text, so every character would be a step")

    def split(text: str) -> list[str]:
        ends = [*(match.end() for match in delimiter.finditer(text)), len(text)]
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]

    return split


def by_function(function: Callable[[str], Any], name: str) -> Segmenter:
    """The user's own, of which it is checked that it gives steps. Raises RefusedError where it does not."""

    def split(text: str) -> list[str]:
        try:
            made = function(text)
            steps = [] if made is None or isinstance(made, str) else list(made)
        except Exception as error:
            raise RefusedError(
                f"step_function {name} raised {type(error).__name__}: {error} on {text!r:.200}"
            ) from error
        if not all(isinstance(step, str) for step in steps) or "".join(steps) != text:
            raise RefusedError(
                f"step_function {name} must give the list of the steps as texts that together are the answer; of "
                f"{text!r:.200} it made {made!r:.200}"
            )
        return steps

    return split


LINES = by_delimiter(NEWLINE)


def steps_of(text: str, split: Segmenter) -> list[str]:
    """The steps of a text; one without any visible character belongs to the step before it, or else after it."""
    steps: list[str] = []
    for step in split(text):
        if steps and not (step.strip() and steps[-1].strip()):
            steps[-1] += step
        else:
            steps.append(step)
    return steps


def step_ends(token_ids: Sequence[int], split: Segmenter, decode: Decode) -> list[int]:
    """How many of the answer's tokens there are up to the end of each step, the last time all of them.

    `decode` gives the text of tokens, without special ones; that of an answer's first tokens is how the answer's text
    begins, but for a character of which a part is missing.
    """
    return list(_ends(token_ids, split, decode))


def first_step_end(token_ids: Sequence[int], split: Segmenter, decode: Decode) -> int:
    """The first of `step_ends`, without looking for the others."""
    return next(_ends(token_ids, split, decode))


def _ends(token_ids: Sequence[int], split: Segmenter, decode: Decode) -> Iterator[int]:
    text = decode(token_ids)
    place = last = 0
    for step in steps_of(text, split)[:-1]:
        place += len(step)
        end = _tokens_up_to(place, text, token_ids, decode)
        if end != last and decode(token_ids[end:]).strip():
            yield end
            last = end
    yield len(token_ids)


def _tokens_up_to(place: int, text: str, token_ids: Sequence[int], decode: Decode) -> int:
    """The fewest tokens whose text holds the first `place` characters."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if decode(token_ids[:middle])[:place] == text[:place]:
            high = middle
        else:
            low = middle + 1
    return low
