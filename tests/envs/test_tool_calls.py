"""Tool calls in text: the notations, mixed text, what is broken, and what only looks like a call."""

import json
import random
from typing import Any

import pytest

from llmrl.envs.tool_calls import ParseFault, parse_tool_calls


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just an answer.", "Just an answer.", []),
        ("  blanks stay \n", "  blanks stay \n", []),
        ("", "", []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [call("f", a=1)]),
        (
            'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
            "Let me see.",
            [call("f"), call("g")],
        ),
        ('{"name": "f", "parameters": {"a": "b"}}', "", [call("f", a="b")]),
        ('<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": [1]}}', "",
         [call("f"), call("g", x=[1])]),
        ('{"type": "function", "name": "f", "parameters": {"a": ";"}};', "", [call("f", a=";")]),
        ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        ("{1, 2}", "{1, 2}", []),
        ('{"x": 1} has no "name" and "parameters"', '{"x": 1} has no "name" and "parameters"', []),
    ],
)  # fmt: skip
def test_calls(text: str, content: str, calls: list[Any]) -> None:
    assert parse_tool_calls(text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}',
        "<tool_call>f(1)</tool_call>",
        "<tool_call></tool_call>",
        '</tool_call>{"name": "f"}<tool_call>',
        '<tool_call><tool_call>{"name": "f"}</tool_call></tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        '{"name": "f", "parameters": {"a": }',
        '{"name": "f", "parameters": {}} and text',
        "<|python_tag|>print(1)",
        "<|python_tag|>",
    ],
)
def test_broken_calls_are_faults_with_a_reason(text: str) -> None:
    fault = parse_tool_calls(text)
    assert isinstance(fault, ParseFault)
    assert fault.reason


def test_a_family_reads_its_own_notation_only() -> None:
    hermes, llama = '<tool_call>{"name": "f"}</tool_call>', '{"name": "f", "parameters": {}}'
    assert parse_tool_calls(hermes, "llama3") == (hermes, [])
    assert parse_tool_calls(llama, "hermes") == (llama, [])


def test_what_is_written_is_read_again_and_noise_never_raises() -> None:
    draw = random.Random(0)
    pieces = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", ',
        '"arguments": {}}',
        "<|python_tag|>",
        ";",
        "\0",
        "é",
        "{",
        "}",
    ]
    for _ in range(3000):
        result = parse_tool_calls("".join(draw.choices(pieces, k=draw.randint(0, 8))))
        assert isinstance(result, tuple | ParseFault)
    for _ in range(200):
        arguments = {
            f"k{i}": draw.choice(["a<b", "\n", '"', "é\U0001f600", 1, 2.5, None, [1, {"x": []}]]) for i in range(3)
        }
        text = f"Hm.\n<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>"
        assert parse_tool_calls(text) == ("Hm.", [call("f", **arguments)])
