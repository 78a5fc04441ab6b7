"""What runs in the child processes that make reasoning-gym's items and judge answers; `scoring.py` asks them.

Requests have `task` and `config`; the answer is a value, or {"fault": why} where the task cannot be used:
- `items` with `first`, `count`: [[question, answer], ...];
- `score` with `index`, `question`, `answer`: a finite number.
"""

import functools
import importlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

from llmrl.children.serving import Handler, Request, serve
from llmrl.envs import arithmetic


def countdown(answer: str, entry: dict[str, Any], config: Any) -> float:
    """reasoning-gym's scorer of `countdown`, with our arithmetic in place of sympy's parser."""
    value = _value(answer)
    if value is None:
        return 0.01
    numbers = sorted(int(digits) for digits in re.findall(r"\b\d+\b", answer))
    right = numbers == sorted(entry["metadata"]["numbers"]) and value == entry["metadata"]["target"]
    return 1.0 if right else 0.05


def puzzle24(answer: str, entry: dict[str, Any], config: Any) -> float:
    """reasoning-gym's scorer of `puzzle24`, with our arithmetic; and the four numbers must be those that were given."""
    numbers = sorted(int(digits) for digits in re.findall(r"\b\d+\b", answer))
    return 1.0 if _value(answer) == 24 and numbers == sorted(entry["metadata"]["numbers"]) else 0.01


OWN: dict[str, Callable[[str, dict[str, Any], Any], float]] = {"countdown": countdown, "puzzle24": puzzle24}


def _value(answer: str) -> Any:
    try:
        return arithmetic.evaluate(answer)
    except arithmetic.ExpressionError:
        return None


@functools.lru_cache(maxsize=16)
def _dataset(task: str, config: str) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(task, **json.loads(config))


def _or_fault(handler: Callable[[Any, Request], Any]) -> Handler:
    """Of a dataset and a request, as a handler of requests."""

    def answer(request: Request) -> Any:
        try:
            return handler(_dataset(request["task"], json.dumps(request["config"], sort_keys=True)), request)
        except MemoryError:
            raise
        except Exception as error:
            return {"fault": f"reasoning_gym:{request['task']} cannot make its items: {type(error).__name__}: {error}"}

    return answer


def items(dataset: Any, request: Request) -> list[list[str]]:
    """[question, answer] of `count` items from `first` on."""
    made = [dataset[request["first"] + index] for index in range(request["count"])]
    return [[str(e["question"]), "" if e["answer"] is None else str(e["answer"])] for e in made]


def score(dataset: Any, request: Request) -> float | dict[str, str]:
    """What the task's scorer gives an answer; 0 where it raises."""
    entry = dataset[request["index"]]
    if str(entry["question"]) != request["question"]:
        return {"fault": f"reasoning_gym:{request['task']} does not make the same question twice from the same seed"}
    try:
        own = OWN.get(request["task"])
        answer = request["answer"]
        found = float(own(answer, entry, dataset.config) if own else dataset.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception:
        found = 0.0
    return found if math.isfinite(found) else 0.0


def prepare() -> None:
    """Load the package before the first request's time runs."""
    importlib.import_module("reasoning_gym")


if __name__ == "__main__":
    serve({"items": _or_fault(items), "score": _or_fault(score)}, prepare)
