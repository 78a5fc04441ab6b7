"""Rows of scored samples: a prompt, several completions of it, and what each is worth.

| column | holds |
|---|---|
| `prompt` | text, or messages |
| `completions` | a list of texts, or of messages (each one message, or a list of one) |
| `rewards` | a number for each completion; null: it has none |
| `completion_ids` | optional: the token ids of each as they were sampled, the token that ended it included |
| `logprobs` | optional: of each, its tokens' natural log-probabilities when it was sampled, or their sum |
| `ended` | optional: whether each ended by itself; false: a limit cut it off, and no end is put behind it |

`tools` and `chat_template_kwargs` go to the chat template; further columns, such as an `answer`, stay with the row.

Invariants of `Scored`: as many rewards (ids, log-probabilities, ends) as completions, every number finite, every
completion of the form of the prompt. Converters take a row as it stands in a file and return new rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from llmrl.data.columns import (
    MEND,
    missing,
    nearest,
    read_dialogue,
    read_extras,
    read_text_or_dialogue,
    refuse_pictures,
)
from llmrl.data.faults import RowFault
from llmrl.data.formats import Text, as_answer
from llmrl.data.messages import kind_of, without_none
from llmrl.errors import RefusedError

SCORED_COLUMNS = ("prompt", "completions", "rewards", "completion_ids", "logprobs", "ended")
COLUMNS = (*SCORED_COLUMNS, "tools", "chat_template_kwargs")
READ = "scored samples, with `prompt`, `completions` and `rewards`"
ROUNDING = 1e-3
"""Nats by which a log-probability may lie above 0."""
NO_LOGPROBS = (
    "the method weighs samples by the log-probabilities of the model that drew them. Sample with `llmrl sample`, which "
    "writes them; or, if the model that training begins with drew all of them at temperature 1, set proposal: prior"
)


@dataclass(frozen=True)
class Wanted:
    """What a reader needs of a row. `only_ended`: completions that a limit cut off take no part; where the row does not
    say which ended, those did whose last token is one of `stop_ids`, if it has token ids."""

    least_samples: int = 0
    logprobs: bool = False
    only_ended: bool = False
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Scored:
    """One row, read. `logprobs`: of each completion its tokens', or a list of one with their sum where `summed`.
    `chosen`: the completions that take part, those that have a reward."""

    prompt: Text
    completions: list[Text]
    rewards: list[float | None]
    completion_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    summed: bool = False
    ended: list[bool] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


def check_scored_columns(columns: Sequence[str], where: str, needs_logprobs: bool = False) -> None:
    """Refuse data without a column that is needed."""
    for name in ("prompt", "completions", "rewards"):
        if name not in columns:
            raise missing(name, columns, where, COLUMNS, READ)
    if needs_logprobs and "logprobs" not in columns:
        like = nearest("logprobs", [name for name in columns if name not in COLUMNS], close_only=True)
        hint = f" (did you mean `{like}`? Rename it)" if like else ""
        raise RefusedError(f"{where}: no column `logprobs`{hint}, but {NO_LOGPROBS}")
    refuse_pictures(columns, where)


def read_scored(row: dict[str, Any], wanted: Wanted = Wanted()) -> Scored:
    """One row; raises RowFault, also where fewer than `least_samples` completions take part."""
    prompt, completions = _texts(row)
    count = len(completions)
    rewards = [_reward(value, number) for number, value in enumerate(_each(row, "rewards", count), 1)]
    ids = _each(row, "completion_ids", count) if row.get("completion_ids") is not None else None
    ids = None if ids is None else [_ids(value, number) for number, value in enumerate(ids, 1)]
    logprobs, summed = _logprobs(row, count, ids, wanted.logprobs)
    ended = _ended(row, count, ids, wanted.stop_ids)
    extras = read_extras(row)
    if extras["tools"] and not isinstance(prompt, list):
        raise RowFault("tools", "needs the conversational format: plain text has no chat template to show them in")
    chosen = [i for i, reward in enumerate(rewards) if reward is not None and (ended[i] or not wanted.only_ended)]
    if len(chosen) < wanted.least_samples:
        these = "have a reward and ended by themselves" if wanted.only_ended else "have a reward"
        raise RowFault(
            "rewards",
            f"{len(chosen)} of {count} completions {these}, but the samples of a prompt are compared with one another, "
            f"so there must be at least {wanted.least_samples}; sample more of them, or remove the row"
            + (_cut_off(row, ended) if wanted.only_ended and not all(ended) else ""),
        )
    return Scored(prompt, completions, rewards, ids, logprobs, summed, ended, chosen, extras)


def _cut_off(row: dict[str, Any], ended: list[bool]) -> str:
    """What can be done about completions that are taken for cut off."""
    by_ids = row.get("ended") is None and row.get("completion_ids") is not None
    why = ", as completion_ids without a stop token at their end say; keep the one that ended each there" * by_ids
    return f". {ended.count(False)} were cut off{why}; or let them take part with truncated_samples: keep"


def _texts(row: dict[str, Any]) -> tuple[Text, list[Text]]:
    prompt = read_text_or_dialogue(row["prompt"], "prompt")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RowFault("prompt", f"empty; {MEND}")
    given = row["completions"]
    if not isinstance(given, list) or not given:
        said = "no completion in it" if given == [] else f"{kind_of(given)} where a list of completions is expected"
        raise RowFault("completions", f"{said}; {MEND}")
    read = [read_text_or_dialogue(completion, "completions") for completion in given]
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in read):
        return prompt, read
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_dialogue(prompt, "prompt")
    answers = [as_answer(completion, messages) for completion in read]
    for number, answer in enumerate(answers, 1):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in answer) or "none"
            raise RowFault(
                "completions",
                f"the messages of completion {number} are: {roles}; there must be one, the assistant's; {MEND}",
            )
    return messages, [*answers]


def _each(row: dict[str, Any], column: str, count: int) -> list[Any]:
    """The list in a column, one entry for each completion."""
    values = row[column]
    if not isinstance(values, list):
        raise RowFault(column, f"{kind_of(values)} where a list with an entry for each completion is expected; {MEND}")
    if len(values) != count:
        raise RowFault(column, f"{len(values)} entries for {count} completions; give each its own, or remove the row")
    return values


def _ended(row: dict[str, Any], count: int, ids: list[list[int]] | None, stop_ids: frozenset[int]) -> list[bool]:
    if row.get("ended") is None:
        return [not stop_ids or part[-1] in stop_ids for part in ids] if ids is not None else [True] * count
    ended = _each(row, "ended", count)
    if not all(isinstance(value, bool) for value in ended):
        raise RowFault("ended", f"holds more than true and false; {MEND}")
    return ended


def _reward(value: Any, number: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowFault(
            "rewards", f"completion {number} has {kind_of(value)} where a number or null is expected; {MEND}"
        )
    if not math.isfinite(value):
        raise RowFault("rewards", f"completion {number} has {value}, which is not finite; give a number, or null")
    return float(value)


def _ids(value: Any, number: int) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise RowFault("completion_ids", f"those of completion {number} are no list of token ids; {MEND}")
    if not value:
        raise RowFault("completion_ids", f"completion {number} has no token, not even one that ends it; {MEND}")
    return value


def _logprobs(
    row: dict[str, Any], count: int, ids: list[list[int]] | None, needed: bool
) -> tuple[list[list[float]] | None, bool]:
    """(of each completion its tokens' or, in a list of one, their sum; whether these are sums)."""
    if row.get("logprobs") is None:
        if needed:
            raise RowFault("logprobs", f"null, but {NO_LOGPROBS}")
        return None, False
    values = _each(row, "logprobs", count)
    summed = not isinstance(values[0], list)
    parts = [[value] if summed else value for value in values]
    for number, part in enumerate(parts, 1):
        if not isinstance(part, list) or not all(isinstance(p, int | float) and math.isfinite(p) for p in part):
            raise RowFault("logprobs", f"those of completion {number} are not all finite numbers; {MEND}")
        if any(p > ROUNDING for p in part):
            raise RowFault(
                "logprobs", f"completion {number} has {max(part):g}, above 0: give natural logarithms of probabilities"
            )
        if ids is not None and not summed and len(part) != len(ids[number - 1]):
            raise RowFault(
                "logprobs", f"completion {number} has {len(part)} of them for {len(ids[number - 1])} token ids; {MEND}"
            )
    return parts, summed


# -- converters --------------------------------------------------------------------------------------------------------


def best_and_worst(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row as one preference pair, its best completion against its worst, the first of equal ones; none where all are
    equally good. Only completions that ended by themselves and say something take part, but for segments."""
    usable = _usable(row)
    if not usable:
        return []
    best, worst = max(usable, key=lambda item: item[1]), min(usable, key=lambda item: item[1])
    return [_pair(row, best, worst)] if best[1] > worst[1] else []


def right_and_wrong(row: dict[str, Any], pairs_per_prompt: int, right_above: float = 0.5) -> list[dict[str, Any]]:
    """A row as at most so many preference pairs of a completion with a reward above `right_above` and one without.

    Each pair has another wrong completion; right ones take turns where they are fewer. Equal texts count once.
    """
    distinct: dict[str, tuple[Any, float]] = {}
    for item in _usable(row):
        distinct.setdefault(str(item[0]), item)
    right = [item for item in distinct.values() if item[1] > right_above]
    wrong = [item for item in distinct.values() if item[1] <= right_above]
    return [_pair(row, *both) for both in islice(zip(cycle(right), wrong, strict=False), pairs_per_prompt)]


def best_of_n(row: dict[str, Any], right_above: float | None = None) -> list[dict[str, Any]]:
    """A row as one supervised row, its best completion, the first of equal ones; none where that is not above
    `right_above`."""
    usable = _usable(row)
    if not usable:
        return []
    completion, reward = max(usable, key=lambda item: item[1])
    if right_above is not None and not reward > right_above:
        return []
    return [{**_beside(row), "prompt": without_none(row["prompt"]), "completion": completion, "reward": reward}]


def as_segments(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row as one row of scored segments, its completions with their rewards as scores; none of fewer than two.

    Here completions that a limit cut off stay: a segment can say that it does not end.
    """
    read, prompt = read_scored(row), without_none(row["prompt"])
    segments = [
        {
            "prompt": prompt,
            "completion": without_none(row["completions"][i]),
            "score": read.rewards[i],
            "ends": read.ended[i],
        }
        for i in read.chosen
        if _text(read.completions[i]).strip()
    ]
    return [{**_beside(row), "segments": segments}] if len(segments) > 1 else []


def _usable(row: dict[str, Any]) -> list[tuple[Any, float]]:
    """(completion, reward) of those that have a reward, ended by themselves and say something."""
    read = read_scored(row)
    return [
        (without_none(row["completions"][i]), reward)
        for i in read.chosen
        if (reward := read.rewards[i]) is not None and read.ended[i] and _text(read.completions[i]).strip()
    ]


def _text(completion: Text) -> str:
    return completion if isinstance(completion, str) else completion[0].get("content") or ""


def _pair(row: dict[str, Any], chosen: tuple[Any, float], rejected: tuple[Any, float]) -> dict[str, Any]:
    return {
        **_beside(row),
        "prompt": without_none(row["prompt"]),
        "chosen": chosen[0],
        "rejected": rejected[0],
        "chosen_reward": chosen[1],
        "rejected_reward": rejected[1],
    }


def _beside(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that stay with the row, whatever becomes of its completions."""
    return {name: value for name, value in row.items() if name not in SCORED_COLUMNS}
