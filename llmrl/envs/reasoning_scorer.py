"""The child process that makes reasoning-gym's items and judges answers: `python -m llmrl.envs.reasoning_scorer`.

A line of JSON in, with `verb`, `task`, `config`, `deadline` (seconds); one out, or `{"fault": why}`:
- `items` with `first`, `count`: `{"items": [[question, answer], ...]}`;
- `score` with `index`, `question`, `answer`: `{"score": number}`.
"""

import functools
import importlib
import json
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from llmrl.envs import arithmetic

MEMORY = 4 << 30  # bytes of address space


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


def reply(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    try:
        dataset = _dataset(request["task"], json.dumps(request["config"], sort_keys=True))
        return VERBS[request["verb"]](dataset, request)
    except Exception as error:
        return {"fault": f"reasoning_gym:{request['task']} cannot make its items: {type(error).__name__}: {error}"}


def _items(dataset: Any, request: dict[str, Any]) -> dict[str, Any]:
    made = [dataset[request["first"] + index] for index in range(request["count"])]
    return {"items": [[str(e["question"]), "" if e["answer"] is None else str(e["answer"])] for e in made]}


def _score(dataset: Any, request: dict[str, Any]) -> dict[str, Any]:
    entry = dataset[request["index"]]
    if str(entry["question"]) != request["question"]:
        return {"fault": f"reasoning_gym:{request['task']} does not make the same question twice from the same seed"}
    try:
        own = OWN.get(request["task"])
        answer = request["answer"]
        score = own(answer, entry, dataset.config) if own else dataset.score_answer(answer, entry)
        score = float(score)
    except Exception:
        score = 0.0
    return {"score": score if math.isfinite(score) else 0.0}


VERBS = {"items": _items, "score": _score}


def main() -> None:
    """Answer until the input ends. What a task prints goes nowhere: the real output is ours alone."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        importlib.import_module("reasoning_gym")  # before the first deadline runs

        print("{}", file=output, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            # The parent kills what hangs; the alarm is for a parent that is gone.
            signal.alarm(math.ceil(request["deadline"]) + 5)
            print(json.dumps(reply(request)), file=output, flush=True)
            signal.alarm(0)


if __name__ == "__main__":
    main()
