"""What reward functions read in a completion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.rewards.texts import before_first_box, boxes, final_answer, text_of, up_to_first_box


def test_text_of_a_completion() -> None:
    assert text_of("plain") == "plain"
    assert text_of([{"role": "assistant", "content": "said"}]) == "said"
    assert text_of([{"content": "TRL's examples leave the role out"}]) == "TRL's examples leave the role out"
    dialogue = [
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "42."}]},
    ]
    assert text_of(dialogue) == "\nIt is 42."


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{1} and \boxed {\frac{1}{2}}", ["1", r"\frac{1}{2}"]),
        (r"\boxed{\boxed{3}}", [r"\boxed{3}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{1} then \boxed{2", ["1"]),
        (r"\fbox{1} \boxed 5", []),
        (r"\fboxed{1}", ["1"]),
        ("", []),
    ],
)
def test_boxes(text: str, contents: list[str]) -> None:
    found = boxes(text)
    assert [box.content for box in found] == contents
    assert all(text[box.start] == "\\" and text[box.end - 1] == "}" for box in found)


def test_reasoning_ends_at_the_first_box() -> None:
    text = r"2*3=6, 6+4=10. \boxed{10} Check: \boxed{11}"
    assert before_first_box(text) == "2*3=6, 6+4=10. "
    assert up_to_first_box(text) == r"2*3=6, 6+4=10. \boxed{10}"
    assert before_first_box(r"cut off \boxed{1") == "cut off "
    assert up_to_first_box("no box") == before_first_box("no box") == "no box"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"the answer is 3, that is \boxed{4}", "4"),
        ("Steps.\n#### 1,234", "1,234"),
        ("The final answer is: $x^2 + 1$ because", "x^2 + 1"),
        (r"Answer: \(\pi\).", r"\pi"),
        ("**Answer:** 12.", "12"),
        ("Answer:\n\n17 apples", "17 apples"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("it is 5", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("unit", [r"\boxed{", "{", "}", r"\boxed{1}", "answer ", "####", r"\{", "answer is $"])
def test_a_text_of_any_length_is_read_in_linear_time(unit: str) -> None:
    text = unit * 100_000
    final_answer(text)
    before_first_box(text)
    up_to_first_box(text)


@given(st.text(alphabet="\\boxed{}1 .$#answeri:\n"))
def test_any_text_is_read(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or (answer and answer == answer.strip())
    assert text.startswith(before_first_box(text))
    assert text.startswith(up_to_first_box(text))
