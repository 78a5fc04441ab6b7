"""Steps of an answer: what closes one, and which of the sampled tokens belong to it."""

import random
import re
from collections.abc import Sequence

import pytest

from llmrl.data.steps import by_delimiter, by_function, first_step_end, step_ends, steps_of
from llmrl.errors import RefusedError

NEWLINE = by_delimiter("\n")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("8 * 10 = 80\n8 * 6 = 48\nAnswer: 128", ["8 * 10 = 80\n", "8 * 6 = 48\n", "Answer: 128"]),
        ("a\nb\n", ["a\n", "b\n"]),  # no empty step behind the last delimiter
        ("a\n\nb", ["a\n\n", "b"]),  # a blank line belongs to the step before it
        ("\n\na\nb", ["\n\na\n", "b"]),  # or after it, where there is none before
        ("\n \n", ["\n \n"]),
        ("nothing to divide", ["nothing to divide"]),
        ("", []),
    ],
)
def test_a_step_holds_the_delimiter_that_closes_it(text: str, steps: list[str]) -> None:
    assert steps_of(text, NEWLINE) == steps


def test_a_delimiter_may_be_any_expression_or_a_function() -> None:
    assert steps_of("One. Two is 2.5. End", by_delimiter(r"\.(?=\s)")) == ["One.", " Two is 2.5.", " End"]
    halves = by_function(lambda text: [text[:3], text[3:]], "mine:halves")
    assert steps_of("abcdef", halves) == ["abc", "def"]


def test_what_gives_no_steps_is_refused() -> None:
    with pytest.raises(RefusedError, match="no regular expression"):
        by_delimiter("(")
    with pytest.raises(RefusedError, match="matches the empty text"):
        by_delimiter("x*")
    with pytest.raises(RefusedError, match=r"mine:short.*together are the answer"):
        by_function(lambda text: [text[1:]], "mine:short")("abc")
    with pytest.raises(RefusedError, match=r"mine:broken raised ZeroDivisionError.*'abc'"):
        by_function(lambda text: [text][1 // 0], "mine:broken")("abc")
    for made in (None, "abc", [1]):
        with pytest.raises(RefusedError, match=f"must give the list of the steps.*it made {re.escape(repr(made))}"):
            by_function(lambda text, made=made: made, "mine:odd")("abc")


PIECES = ["", "8", " * ", "\n", "\n\n", "6\n4", " = ", "é", "48"]
"""Texts of tokens 0 to 8; token 0 is special and has none, token 5 reaches over a newline."""


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def test_steps_end_where_tokens_end() -> None:
    ids = [1, 2, 1, 3, 8, 3, 8, 0]
    assert step_ends(ids, NEWLINE, decode) == [4, 6, 8]  # the last one has the end token
    assert step_ends([8, 3, 0], NEWLINE, decode) == [3]  # nothing but the end token comes after the newline
    assert step_ends([1, 5, 2, 3, 8], NEWLINE, decode) == [2, 4, 5]  # after the token that reaches over the boundary
    assert step_ends([1, 5, 0], NEWLINE, decode) == [3]
    assert step_ends([1, 4, 8], NEWLINE, decode) == [2, 3]
    assert step_ends([1, 3, 3, 8], NEWLINE, decode) == [3, 4]


def test_any_answer_is_divided_without_loss() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(len(PIECES)), k=draw.randint(1, 40))
        ends = step_ends(ids, NEWLINE, decode)
        assert first_step_end(ids, NEWLINE, decode) == ends[0]
        assert ends == sorted(set(ends))
        assert ends[-1] == len(ids)
        for end in ends[:-1]:
            assert "\n" in PIECES[ids[end - 1]]  # a step ends with the token that closes it
            assert decode(ids[end:]).strip()  # and something comes after it


def test_characters_of_several_tokens_are_not_torn() -> None:
    """A decoder that shows a part of a character as a replacement: byte tokens of 'é\\nb'."""
    raw = "é\nb".encode()

    def of_bytes(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    assert step_ends(list(raw), by_delimiter("é"), of_bytes) == [2, 4]
    assert step_ends(list(raw), NEWLINE, of_bytes) == [3, 4]
