"""Every built-in environment keeps the protocol, whatever the model says."""

import asyncio
import json
import random
from typing import Any

import pytest

from llmrl import envs
from llmrl.envs.protocol import Environment

ROWS: dict[str, list[dict[str, Any]]] = {
    "question_answer": [
        {"prompt": "What is 1 + 1?", "answer": "2"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    ]
}
GARBAGE = [
    "", " ", "\n", "\0", "\0" * 100, "9" * 5000, "-" * 5000, "1" + ",000" * 2000, "a" * 100_000, "guess " * 20_000,
    "<guess>", "</guess><guess>", "<guess>" * 5000, "</guess>" * 5000, "🦊" * 500, "e\u0301" * 500, "\u202e123",
    "\uff11\uff12", "٣",
    "\ud800", "½", "1e999999999", "nan", "inf", "1/0", "0x10", "{}" * 1000, "[" * 5000, "(" * 5000, "\\boxed{7}",
    "é" * 5,
    "İİİİİ", "\u017fpeed", "$" * 5000, "$1" * 3000, "1." * 5000, ".1" * 5000, "1 - " * 5000, "<answer>",
    "</answer><answer>",
]  # fmt: skip
CALLS: list[Any] = [
    [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": text}}}] for text in GARBAGE
] + [[{}], [None], [{"function": {}}], [{"function": {"name": "calculator", "arguments": None}}]]


def made(name: str, seed: int = 0) -> list[Environment]:
    kind = envs.load(name)
    rows = kind.rows("train", 3, seed) if kind.rows else ROWS[name]
    return [kind.make(row, seed) for row in rows]


def test_all_built_ins_are_tried() -> None:
    assert set(envs.BUILT_IN) >= ROWS.keys()
    assert all(envs.load(name).rows is not None for name in envs.BUILT_IN.keys() - ROWS.keys())


@pytest.mark.parametrize("name", sorted(envs.BUILT_IN))
@pytest.mark.parametrize("seed", range(3))
def test_random_players_come_to_an_end(name: str, seed: int, play: Any) -> None:
    draw = random.Random(seed)
    words = ["1", "7", "12", "crane", "speed", "the", "answer", "is", "-", "<guess>", "</guess>", "é", "\n"]
    for environment in made(name, seed):
        _, rewards, done = play(environment, lambda _: " ".join(draw.choices(words, k=draw.randint(0, 6))))
        assert done
        assert (rewards == {}) == (name == "question_answer")


@pytest.mark.parametrize("name", sorted(envs.BUILT_IN))
def test_no_text_raises(name: str, play: Any) -> None:
    environment = made(name)[0]
    kind = envs.load(name)
    row = (kind.rows("test", 1, 0) if kind.rows else ROWS[name])[0]
    for text in GARBAGE:
        dialogue, _, done = play(kind.make(row, 0), lambda _, text=text: text)
        assert done
        json.dumps([m for m in dialogue if m["role"] != "assistant"], ensure_ascii=False).encode()
    for content in (None, ["parts"]):
        assert play(environment, lambda _, content=content: {"role": "assistant", "content": content})[2]
        environment = kind.make(row, 0)


def test_no_call_raises(play: Any) -> None:
    kind = envs.load("calculator")
    assert kind.rows is not None
    row = kind.rows("train", 1, 0)[0]
    for calls in CALLS:
        answers = iter([{"role": "assistant", "content": None, "tool_calls": calls}, "7"])
        dialogue, _, done = play(kind.make(row, 0), lambda _, answers=answers: next(answers))
        assert done
        tool_messages = [m for m in dialogue if m["role"] == "tool"]
        assert len(tool_messages) == len(calls)
        json.dumps(tool_messages, ensure_ascii=False).encode()


async def in_turn(environment: Any, *methods: str) -> None:
    for method in methods:
        await (
            environment.step({"role": "assistant", "content": ""})
            if method == "step"
            else getattr(environment, method)()
        )


@pytest.mark.parametrize("name", sorted(envs.BUILT_IN))
@pytest.mark.parametrize("methods", [("step",), ("init", "init"), ("init", "close", "step")])
def test_used_once_and_closed_after_use(name: str, methods: tuple[str, ...]) -> None:
    environment = made(name)[0]
    asyncio.run(in_turn(environment, *methods[:-1]))
    with pytest.raises(RuntimeError):
        asyncio.run(in_turn(environment, methods[-1]))
    asyncio.run(in_turn(environment, "close", "close"))  # once more does no harm


@pytest.mark.parametrize("name", sorted(envs.BUILT_IN))
def test_the_same_row_and_seed_is_the_same_episode(name: str, play: Any) -> None:
    first, again = (play(made(name)[0], lambda _: "I say 3 crane") for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", sorted(set(envs.BUILT_IN) - set(ROWS)))
def test_rows_are_plain_and_their_prompts_differ_between_splits(name: str) -> None:
    rows = envs.load(name).rows
    assert rows is not None
    train, test = rows("train", 200, 0), rows("test", 50, 1)
    assert json.loads(json.dumps(train)) == train
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in test}
    assert len(rows("train", 5, 0)) == 5
    assert rows("train", 5, 0) == train[:5]
