"""The tasks of reasoning-gym as single-turn environments: `reasoning_gym:TASK`.

Invariants: items are made and judged in processes of their own (scoring.py), in which texts hash alike, so the same
seed gives the same rows in every run; a row is known by the seed and index of its item, which is made anew where it is
judged, and compared; what a model wrote reaches no scorer that evaluates it as code.

Some scorers pass the answer to `eval`, or to sympy's parser, which evaluates it: a process of its own is no protection
from that, so these tasks are refused (`unsafe_scorer`), except two that are judged by our own arithmetic instead.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field

from llmrl.config.nearest import nearest
from llmrl.envs.options import Options, checked, column, known_only, typed
from llmrl.envs.protocol import EnvironmentKind, Message, Row, Split, StepResult
from llmrl.envs.reading import said
from llmrl.envs.scoring import scorer
from llmrl.envs.single_use import SingleUse
from llmrl.envs.splits import pick
from llmrl.errors import RefusedError

NAME = "reasoning_gym"
INSTALL = "pip install 'llmrl[envs]', or pip install reasoning-gym"
CHUNK = 50  # items made at once
PAGE = 1000  # items of one seed; the next page has the seed after these, as reasoning-gym seeds item i with seed + i
EVALUATING = {"eval", "exec", "compile", "parse_expr", "sympify", "parse_latex"}
AUDITED = {
    "basic_arithmetic": "evaluates its own problem",
    "bitwise_arithmetic": "evaluates its own problem",
    "bf": "compiles its own program",
    "codeio": "runs the programs that come with it, when items are made",
    "number_sorting": "evaluates its own answer",
    "propositional_logic": "parse_expr is a parser of its own",
    "countdown": "judged by our own arithmetic",
    "puzzle24": "judged by our own arithmetic",
}


class ReasoningOptions(Options):
    answer_from: Literal["tag", "last_line", "text"] = "tag"
    """Where the answer is: in the last `<answer>...</answer>` (asked for in a system message, as reasoning-gym's own
    evaluations do), in the last line that is not blank, or all of the text."""
    system_prompt: str | None = None
    """The system message; by default the one that asks for the tag, where `answer_from` is `tag`."""
    deadline_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    """How long a scorer may take over one answer."""


class ReasoningTask:
    """One question. Rewards: `score`, from 0 to 1 as the task's scorer gives it.

    No text, or none where the answer should be, scores 0, as does one at which the scorer fails with an exception. One
    that makes the scorer hang or die is no score. Row: `prompt` (the question), `answer`, `seed` and `index`.
    """

    def __init__(self, row: Row, seed: int, task: str, config: dict[str, Any], options: ReasoningOptions) -> None:
        place = f"{NAME}:{task}"
        self._question = column(row, "prompt", str, place)
        self._options = options
        self._item = {
            "task": task,
            "config": {**config, "seed": column(row, "seed", int, place), "size": PAGE},
            "index": column(row, "index", int, place),
            "question": self._question,
        }
        self._use = SingleUse(place)

    async def init(self) -> list[Message]:
        self._use.begin()
        return [*_system(self._options), {"role": "user", "content": self._question}]

    def step(self, message: Message) -> StepResult:
        """Not `async`: it waits for the scorer, in a thread of the caller's."""
        self._use.turn()
        self._use.end()
        answer = extract(said(message), self._options.answer_from)
        if answer is None:
            return StepResult([], done=True, rewards={"score": 0.0})
        score = scorer().score({**self._item, "answer": answer}, self._options.deadline_seconds)
        return StepResult([], done=True, rewards={} if score is None else {"score": score})

    async def close(self) -> None:
        self._use.end()


def load(task: str, options: Mapping[str, Any]) -> EnvironmentKind:
    """`options` are those of `ReasoningOptions`, and the task's own configuration. Brings its own rows."""
    dataset, config_type = _task(task)
    own = {key: value for key, value in options.items() if key in ReasoningOptions.model_fields}
    checked_own = checked(ReasoningOptions, own, f"{NAME}:{task}")
    config = _config(task, config_type, {key: value for key, value in options.items() if key not in own})
    if reason := unsafe_scorer(task, dataset):
        raise RefusedError(f"environment {NAME}:{task} is refused: {reason}, and what a model writes is never run here")
    return EnvironmentKind(
        lambda row, seed: ReasoningTask(row, seed, task, config, checked_own),
        lambda split, count, seed: _rows(task, config, split, count, seed),
    )


def unsafe_scorer(task: str, dataset: type) -> str | None:
    """Why this task's scorer cannot be trusted with a model's text; None where it can.

    The module of the task is searched for calls that evaluate text. `AUDITED` are the tasks in which these were read
    and are not given the answer.
    """
    if task in AUDITED:
        return None
    for base in dataset.__mro__:
        if base.__module__.startswith(f"{NAME}."):
            for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(base) or base))):
                if isinstance(node, ast.Call) and (name := _called(node)) in EVALUATING:
                    return f"its scorer is in a module that calls `{name}` (line {node.lineno} of {base.__module__})"
    return None


def extract(text: str, answer_from: Literal["tag", "last_line", "text"]) -> str | None:
    """The answer in what a model wrote, or None where it is not where it should be."""
    if answer_from == "tag":
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, end) if end >= 0 else -1
        return text[start + len("<answer>") : end].strip() if start >= 0 else None
    lines = text.strip().splitlines()
    answer = text.strip() if answer_from == "text" else (lines[-1].strip() if lines else "")
    return answer or None


def _called(node: ast.Call) -> str:
    """`eval` of `eval(x)`, `parse_expr` of `sympy.parse_expr(x)`; `re.compile` is not `compile`."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) and node.func.attr not in ("compile", "eval") else ""


def _task(task: str) -> tuple[type, type]:
    """The task's dataset and configuration classes."""
    if importlib.util.find_spec(NAME) is None:
        raise RefusedError(f"environment {NAME}:{task} needs the package reasoning-gym. Remedy: {INSTALL}")
    importlib.import_module(NAME)
    tasks = importlib.import_module(f"{NAME}.factory").DATASETS
    if task not in tasks:
        raise RefusedError(f"reasoning-gym has no task `{task}`; did you mean `{NAME}:{nearest(task, tasks)}`?")
    return typing.cast(tuple[type, type], tasks[task])


def _config(task: str, config_type: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options` as the task's configuration takes them."""
    place = f"{NAME}:{task}"
    fields = {f.name: f for f in dataclasses.fields(config_type) if f.name not in ("seed", "size")}
    known_only(options, [*ReasoningOptions.model_fields, *fields], place)
    hints = typing.get_type_hints(config_type)
    values = {key: typed(value, hints[key], key, place) for key, value in options.items()}
    try:
        config_type(**values, seed=0, size=1).validate()
    except AttributeError:
        pass  # a configuration without checks
    except Exception as error:
        named = ", ".join(f"`environment_options.{key}`" for key in options) or "its defaults"
        raise RefusedError(f"{place} cannot be made with {named}: {error or type(error).__name__}") from None
    return values


def _system(options: ReasoningOptions) -> list[Message]:
    text = options.system_prompt
    if text is None and options.answer_from == "tag":
        text = importlib.import_module(f"{NAME}.utils").SYSTEM_PROMPTS["default"]
    return [{"role": "system", "content": text}] if text else []


def _rows(task: str, config: dict[str, Any], split: Split, count: int, seed: int) -> list[Row]:
    start = int.from_bytes(sha256(f"{seed}".encode()).digest()[:4], "big") >> 1

    def candidates() -> Iterator[tuple[str, Row]]:
        for at in range(0, 1000 + 20 * count, CHUNK):
            page_seed, first = start + at // PAGE * PAGE, at % PAGE
            made = {"task": task, "config": {**config, "seed": page_seed, "size": PAGE}, "first": first, "count": CHUNK}
            for index, (question, answer) in enumerate(scorer().items(made), first):
                yield question, {"prompt": question, "answer": answer, "seed": page_seed, "index": index}

    rows = pick(candidates(), split, count, f"{NAME}:{task}")
    _check_scorer(task, config, rows)
    return rows


def _check_scorer(task: str, config: dict[str, Any], rows: list[Row]) -> None:
    """The scorer finds the item again and takes the task's own answer: what it makes of others is then theirs.

    Tasks with many right answers give none of their own.
    """
    for row in rows[:1]:
        item = {"task": task, "config": {**config, "seed": row["seed"], "size": PAGE}, "index": row["index"]}
        score = scorer().score({**item, "question": row["prompt"], "answer": row["answer"]}, deadline=60)
        if score is None or (row["answer"] and score == 0):
            given = "no score within a minute" if score is None else "0"
            raise RefusedError(
                f"{NAME}:{task} cannot be used: its scorer gives {given} to its own answer {row['answer']!r:.80}"
            )
