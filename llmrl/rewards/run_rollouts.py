"""The rollouts that a run has kept (rollouts/step_N.jsonl) as scored samples (`llmrl.data.scored_rows`) or segments
(`llmrl.data.segment_formats`): texts without token ids, which the files do not hold.

Invariants: a row is one prompt of one step, with the run's number of the prompt as `row`, and its `answer`; its prompt
is what the policy was asked, a system message included; a reward is the sum with the algorithm's penalty.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrl.data.messages import says_something
from llmrl.errors import RefusedError

NEEDED = ("row", "reward", "end_state", "ends_in_stop", "num_turns", "opening", "messages")
Line = dict[str, Any]


def scored_rows(file: Path, as_text: bool = False) -> Iterator[dict[str, Any]]:
    """The prompts of a step with their rollouts of one turn each, those without a reward, too.

    `as_text`: the model has no chat template, so that what was asked and said is text. Raises RefusedError naming file
    and line for what is no rollout, and for rollouts of several turns: their actions are no single completion.
    """
    for lines in _groups(file):
        for number, line in lines:
            if line["num_turns"] > 1:
                raise RefusedError(
                    f"{file}, line {number}: {line['num_turns']} turns, and scored samples are single completions. "
                    "Remedy: segments, which hold the behaviour of several turns (--form segments)"
                )
        records = [line for _, line in lines]
        opening = records[0]["opening"]
        said = [record["messages"][:1] for record in records]
        yield {
            **_beside(records[0]),
            "prompt": opening[0]["content"] if as_text else opening,
            "completions": [messages[0]["content"] for messages in said] if as_text else said,
            "rewards": [_total(record) for record in records],
            "ended": [r["ends_in_stop"] and not r["end_state"].startswith("truncated") for r in records],
        }


def segment_rows(file: Path, as_text: bool = False) -> Iterator[dict[str, Any]]:
    """The prompts of a step of which two rollouts and more have a reward, each rollout a segment from its opening on,
    with its reward as its score.

    What was said after the policy's last turn is left out, for the policy did nothing there; so is a rollout with a
    turn that says nothing, which is no behaviour to prefer. A last turn that a limit cut off gets no stop token.
    Segments of one prompt may be compared by rewards; those of different prompts want advantages instead. `as_text`
    and refusals as in `scored_rows`.
    """
    for lines in _groups(file):
        segments = [_segment(line, as_text) for _, line in lines if line["reward"] is not None and _says(line)]
        if len(segments) > 1:
            yield {**_beside(lines[0][1]), "segments": segments}


def _groups(file: Path) -> list[list[tuple[int, Line]]]:
    """(number, line) of the rollouts of each prompt that have begun."""
    groups: dict[int, list[tuple[int, Line]]] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        absent = [name for name in NEEDED if not isinstance(line, dict) or name not in line]
        if absent:
            raise RefusedError(
                f"{file}, line {number}: no rollout as llmrl writes them now ({', '.join(absent)} missing): the line "
                "is damaged, or of an earlier version. Remedy: remove it, or run the method again"
            )
        if line["num_turns"]:
            groups.setdefault(line["row"], []).append((number, line))
    return list(groups.values())


def _segment(line: Line, as_text: bool) -> dict[str, Any]:
    said = line["messages"]
    last = max(index for index, message in enumerate(said) if message["role"] == "assistant")
    return {
        "prompt": line["opening"][0]["content"] if as_text else line["opening"],
        "completion": said[0]["content"] if as_text else said[: last + 1],
        "score": _total(line),
        "ends": line["ends_in_stop"],
    }


def _says(line: Line) -> bool:
    return all(says_something(message) for message in line["messages"] if message["role"] == "assistant")


def _beside(line: Line) -> dict[str, Any]:
    return {name: line[name] for name in ("row", "answer") if name in line}


def _total(line: Line) -> float | None:
    return None if line["reward"] is None else line["reward"] + line.get("penalty", 0.0)
