"""Tools: what becomes of a call, good or bad, and the calculator."""

import asyncio
import json
import threading
from typing import Any

import pytest

from llmrl import envs
from llmrl.envs.protocol import Message, StepResult
from llmrl.envs.tools import LONGEST_RESULT, ToolEnvironment
from llmrl.errors import RefusedError


class Shop(ToolEnvironment):
    max_calls = 3

    def opening(self) -> list[Message]:
        return [{"role": "user", "content": "What does it cost?"}]

    def judge(self, answer: str) -> dict[str, float]:
        return {"correct": float(answer == "3")}

    def price(self, item: str, count: int = 1) -> Any:
        """The price.

        Args:
            item: What
            count: How many
        """
        self.thread = threading.current_thread()
        return {"price": {"pen": 3, "book": 12}[item] * count}

    async def long(self) -> str:
        """A long text."""
        return "x" * 10_000

    @staticmethod
    def rows(split: str, count: int, seed: int) -> list[dict[str, Any]]:
        return [{}]

    def _hidden(self) -> str:
        return "not a tool"


def said_to(environment: Shop, *calls: Any) -> StepResult:
    return asyncio.run(environment.step({"role": "assistant", "content": "", "tool_calls": list(calls)}))


def call(name: Any, arguments: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def opened() -> Shop:
    shop = Shop({}, 0)
    messages, tools = asyncio.run(shop.init())
    assert messages[0]["role"] == "user"
    assert [tool["function"]["name"] for tool in tools] == ["price", "long"]
    return shop


def test_calls_are_answered_in_order_with_their_ids() -> None:
    result = said_to(opened(), call("price", {"item": "pen"}, id="a1"), call("price", '{"item": "book", "count": 2}'))
    assert result.messages == [
        {"role": "tool", "name": "price", "tool_call_id": "a1", "content": '{"price": 3}'},
        {"role": "tool", "name": "price", "content": '{"price": 24}'},
    ]
    assert not result.done
    assert result.rewards == {}


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (call("cost", {}), "Error: there is no tool `cost`; there are: price, long"),
        (call("_hidden", {}), "Error: there is no tool `_hidden`"),
        (call("judge", {"answer": "3"}), "Error: there is no tool `judge`"),
        (call("rows", {}), "Error: there is no tool `rows`"),
        (call("price", {}), "Error: the argument `item` is missing"),
        (call("price", {"item": 3}), "Error: the argument `item` must be a string"),
        (call("price", "{not json"), "Error: the arguments are not JSON"),
        (call("price", "[" * 100_000), "Error: the arguments are not JSON"),
        (call("price", [1]), "Error: the arguments must be a JSON object"),
        (call("price", {"item": "car"}), "Error: KeyError: 'car'"),
        (call(None), "Error: there is no tool"),
        (call(["price"]), "Error: there is no tool"),
        ("price", "Error: there is no tool"),
        ({"function": "price"}, "Error: there is no tool"),
    ],
)
def test_a_bad_call_is_told_and_the_episode_goes_on(bad: Any, text: str) -> None:
    shop = opened()
    result = said_to(shop, bad)
    assert len(result.messages) == 1
    assert result.messages[0]["role"] == "tool"
    assert text in result.messages[0]["content"]
    assert said_to(shop, call("price", {"item": "pen"})).messages[0]["content"] == '{"price": 3}'


def test_calls_run_out_and_the_model_is_told_once() -> None:
    shop = opened()
    result = said_to(shop, *[call("price", {"item": "pen"})] * 4)
    assert [m["content"] for m in result.messages][2:] == ['{"price": 3}', "Error: no tool calls are left; answer now"]
    last = said_to(shop, call("price", {"item": "pen"}))
    assert last == StepResult([], done=True, rewards={"correct": 0.0})
    with pytest.raises(RuntimeError, match="after the end"):
        said_to(shop, call("price", {"item": "pen"}))


def test_the_answer_ends_the_episode() -> None:
    result = asyncio.run(opened().step({"role": "assistant", "content": "3"}))
    assert result == StepResult([], done=True, rewards={"correct": 1.0})


def test_long_results_are_cut_aloud_and_half_characters_mended() -> None:
    content = said_to(opened(), call("long")).messages[0]["content"]
    assert content == "x" * LONGEST_RESULT + " ... (6000 more characters)"
    content = said_to(opened(), call("price", {"item": "\ud800"})).messages[0]["content"]
    content.encode()


def test_plain_tools_run_in_a_thread() -> None:
    shop = opened()
    said_to(shop, call("price", {"item": "pen"}))
    assert shop.thread is not threading.main_thread()


def test_a_tool_without_documentation_is_found_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match="tool look has no docstring"):

        class Bad(ToolEnvironment):
            def look(self) -> str:
                return ""


def calculator(**options: Any) -> tuple[Any, dict[str, Any]]:
    kind = envs.load("calculator", options)
    assert kind.rows is not None
    row = kind.rows("train", 1, 0)[0]
    return kind.make(row, 0), row


def use(expression: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call("calculator", {"expression": expression})]}


def test_the_calculator_computes_and_judges(play: Any) -> None:
    environment, row = calculator(call_reward=0.1)
    answers = iter([use("2 +"), use("12*(3+4)"), use("1/0"), use("7/2"), f"So it is {int(row['answer']):,}."])
    dialogue, rewards, done = play(environment, lambda _: next(answers))
    assert [m["content"] for m in dialogue if m["role"] == "tool"] == [
        "Error: the expression ends where a number is expected",
        "84",
        "Error: division by zero",
        "3.5",
    ]
    assert done
    assert rewards == {"correct": 1.0, "called": 0.1}


def test_a_wrong_answer_and_the_number_of_calls(play: Any) -> None:
    environment, _ = calculator(max_calls=1)
    answers = iter([use("1+1"), use("1+1"), "-1"])
    dialogue, rewards, _ = play(environment, lambda _: next(answers))
    assert "no tool calls are left" in dialogue[4]["content"]
    assert rewards == {"correct": 0.0}


def test_rows_are_right_disjoint_and_reproducible() -> None:
    rows = envs.load("calculator", {"largest": 20}).rows
    assert rows is not None
    train, test = rows("train", 300, 0), rows("test", 300, 1)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert train == rows("train", 300, 0) != rows("train", 300, 2)
    assert len({row["prompt"] for row in train}) == 300
    tulips = next(row for row in train if "tulips" in row["prompt"])
    numbers = [int(word) for word in tulips["prompt"].split() if word.isdigit()]
    assert int(tulips["answer"]) == numbers[0] * numbers[1] * numbers[2]
    json.dumps(train)


def test_an_answer_without_a_number_is_refused() -> None:
    with pytest.raises(RefusedError, match="column `answer`"):
        envs.load("calculator").make({"prompt": "How many?", "answer": "many"}, 0)
