"""Dialogues of every shape as one, and the prompt that two of them share."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.data.messages import dialogue, implicit_prompt, is_dialogue, says_something


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("given_message", "expected"),
    [
        ({"from": "human", "value": "a"}, user("a")),
        ({"from": "gpt", "value": "a"}, assistant("a")),
        ({"from": "system", "value": "a"}, {"role": "system", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "user", "content": "a", "name": None}, user("a")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, user("ab")),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "id": None}}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        ),
    ],
)
def test_a_message_of_any_shape(given_message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert dialogue(given_message) == dialogue([given_message]) == [expected]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([user("a"), {"content": "b"}], "message 2 has no `role`"),
        ([{"role": "user", "content": 7}], "`content` is the number 7"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only text parts"),
        (7, "the number 7 where a list of messages"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dialogue(value)


def test_text_is_no_dialogue() -> None:
    assert [is_dialogue(value) for value in ("a", ["a"], None, 7)] == [False] * 4
    assert [is_dialogue(value) for value in ([], [user("a")], user("a"))] == [True] * 3


def test_a_message_may_say_something_without_text() -> None:
    assert says_something({"role": "assistant", "tool_calls": [{}]})
    assert says_something({"role": "assistant", "content": "", "reasoning_content": "hm"})
    assert not says_something({"role": "assistant", "content": " \n", "tool_calls": []})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ([user("a"), assistant("b")], [user("a"), assistant("c")], [user("a")]),
        ([user("a"), assistant("b")], [user("b"), assistant("c")], []),
        # The last message is an answer, also where the other dialogue begins with it.
        ([user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")], [user("a")]),
        ("Sum: 2+2 is 4", "Sum: 2+2 is 45", "Sum: 2+2 is"),
        ("Yes", "No", ""),
        ("The answer", "The answer is no", "The"),
        ("\n\nHuman: a\n\nAssistant: It is so", "\n\nHuman: a\n\nAssistant: It is not", "\n\nHuman: a\n\nAssistant:"),
    ],
)
def test_the_shared_beginning_is_the_prompt(chosen: Any, rejected: Any, prompt: Any) -> None:
    assert implicit_prompt(chosen, rejected) == prompt
    assert implicit_prompt(rejected, chosen) == prompt


@settings(deadline=None)
@given(st.text(" ab\n", max_size=20), st.text(" ab\n", max_size=9), st.text(" ab\n", max_size=9))
def test_a_shared_text_is_at_the_start_of_both_and_splits_no_word(begin: str, left: str, right: str) -> None:
    chosen, rejected = begin + left, begin + right
    prompt = implicit_prompt(chosen, rejected)
    assert chosen.startswith(prompt)
    assert rejected.startswith(prompt)
    for text in (chosen, rejected):
        rest = text[len(prompt) :]
        assert not prompt or not rest or rest[0].isspace()
