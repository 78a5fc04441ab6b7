"""Scored samples (`llmrl.data.scored_rows`) from a model that is asked, and from the rollouts of a run.

Invariants: token ids and log-probabilities are the engine's own; the prompt of a row is what the policy was asked, so
that reading the row gives the ids that it saw; every sample stays, also those without a reward.
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmrl.data.columns import read_extras, read_text_or_dialogue
from llmrl.data.faults import RowFault, refusal
from llmrl.data.scored_rows import SCORED_COLUMNS
from llmrl.data.splits import Rows
from llmrl.data.tokenization import Encoder, check_chat_template
from llmrl.errors import RefusedError
from llmrl.rewards.scoring import Scorer
from llmrl.rollout.protocol import Completion, Engine, SamplingParams, row_seed
from llmrl.rollout.trajectory import RolloutGroup

PROMPTS_AT_ONCE = 16
DIGITS = 6
"""Decimals of a log-probability in a file: below what two engines agree on."""


@dataclass
class ScoringTally:
    """What came out of sampling: prompts asked, samples drawn, those with a reward and the sum of these, samples that a
    limit cut off, prompts whose samples are told apart by their rewards."""

    prompts: int = 0
    samples: int = 0
    scored: int = 0
    total: float = 0.0
    cut_off: int = 0
    mixed: int = 0


def sample_scored(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    sampling: SamplingParams,
    scorer: Scorer,
    tally: ScoringTally,
    progress: Callable[[ScoringTally], None] = lambda tally: None,
) -> Iterator[dict[str, Any]]:
    """Ask every row's `prompt` `sampling.n` times and have the answers scored; rows of scored samples, as they come.

    A text is a user's message where the tokenizer has a chat template. All columns of a row stay and reach the reward
    functions. `tally` is kept up to date. Raises RefusedError for a prompt that cannot be read.
    """
    scorer.check(rows.table.column_names, rows.where)
    asking = _Asking(Encoder(tokenizer), rows.where)
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        part = rows.select(range(start, min(start + PROMPTS_AT_ONCE, len(rows))))
        columns = [dict(row) for row in part.table]
        prompts, prompt_ids = asking.prompts(columns, part.numbers)
        # A seed of its own for each call: the engine numbers its prompts from 0 every time.
        groups = engine.generate(prompt_ids, replace(sampling, seed=row_seed(sampling.seed, start, 0)))
        texts = [[asking.text(sample) for sample in samples] for samples in groups]
        rewards = iter(asyncio.run(_scores(scorer, columns, prompts, groups, texts)))
        for row, prompt, samples, said in zip(columns, prompts, groups, texts, strict=True):
            made = _row(
                row,
                prompt,
                said if isinstance(prompt, str) else [_message(text) for text in said],
                [next(rewards) for _ in samples],
                [sample.token_ids for sample in samples],
                [sample.logprobs for sample in samples],
                [sample.finish_reason == "stop" for sample in samples],
            )
            _count(tally, made)
            yield made
        progress(tally)


class _Asking:
    """Prompts as the model is asked them, answers as text."""

    def __init__(self, encoder: Encoder, where: str) -> None:
        self.encoder, self.where = encoder, where
        self.has_template = bool(encoder.tokenizer.chat_template)

    def prompts(
        self, rows: Sequence[dict[str, Any]], numbers: Sequence[int]
    ) -> tuple[list[str | list[dict[str, Any]]], list[list[int]]]:
        """Each row's prompt in the form in which it is written down, and its token ids."""
        read: list[Any] = []
        for row, number in zip(rows, numbers, strict=True):
            try:
                prompt = read_text_or_dialogue(row["prompt"], "prompt")
                extras = read_extras(row)
            except RowFault as fault:
                raise refusal(self.where, {number: fault}) from None
            if self.has_template and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(prompt, list):
                check_chat_template(self.encoder.tokenizer, self.where)
            read.append((prompt, extras))
        if not self.has_template:
            return [p for p, _ in read], [
                self.encoder.start_ids + ids for ids in self.encoder.ids([p for p, _ in read])
            ]
        texts = self.encoder.render([(prompt, True, extras) for prompt, extras in read])
        faults = {number: text for number, text in zip(numbers, texts, strict=True) if isinstance(text, RowFault)}
        if faults:
            raise refusal(self.where, faults)
        return [p for p, _ in read], self.encoder.ids([str(text) for text in texts])

    def text(self, sample: Completion) -> str:
        """What a sample says, without its end."""
        return str(self.encoder.tokenizer.decode(sample.token_ids, skip_special_tokens=True))


async def _scores(
    scorer: Scorer,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Any],
    groups: Sequence[Sequence[Completion]],
    texts: Sequence[Sequence[str]],
) -> list[float | None]:
    """The total of every sample. Reward functions get text where the row's prompt is text, a model what was read."""
    places = [(i, k) for i, samples in enumerate(groups) for k in range(len(samples))]

    def shown(as_text: bool, index: int, text: str) -> tuple[Any, Any]:
        return (rows[index]["prompt"], text) if as_text else (prompts[index], _message(text))

    pairs = [shown(isinstance(rows[i]["prompt"], str), i, texts[i][k]) for i, k in places]
    read = [shown(isinstance(prompts[i], str), i, texts[i][k]) for i, k in places]
    names = [name for name in rows[0] if name not in ("prompt", *SCORED_COLUMNS)]
    found = await scorer.score(
        [prompt for prompt, _ in pairs],
        [completion for _, completion in pairs],
        [groups[i][k].token_ids for i, k in places],
        columns={name: [rows[i][name] for i, _ in places] for name in names},
        dialogues=read,
    )
    return found.totals_S


def scored_row(group: RolloutGroup, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The rollouts of one prompt as a row; None where none has begun.

    Raises RefusedError for rollouts of several turns: their actions are no single completion.
    """
    rollouts = [rollout for rollout in group.rollouts if rollout.num_sampled]
    if not rollouts:
        return None
    for rollout in rollouts:
        _check_one_turn(len(rollout.turns), f"the rollouts of row {group.number}")
    opening = rollouts[0].messages[: rollouts[0].opening]
    said = [rollout.messages[rollout.opening :][:1] for rollout in rollouts]
    as_text = not tokenizer.chat_template
    return _row(
        group.row,
        opening[0]["content"] if as_text else opening,
        [messages[0]["content"] for messages in said] if as_text else said,
        [None if rollout.reward is None else rollout.reward + rollout.penalty for rollout in rollouts],
        [rollout.sampled_ids for rollout in rollouts],
        [rollout.turns[0].logprobs for rollout in rollouts],
        [rollout.ended_by_itself for rollout in rollouts],
    )


def scored_rows_of_run(file: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run's rollouts/step_N.jsonl: texts without token ids, which the file does not hold.

    rows: the data that the run was given, whole and in order: a rollout names its row there, and takes its `prompt` and
    columns from it. Raises RefusedError naming file and line.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(text)
        if not record["num_turns"]:
            continue
        _check_one_turn(record["num_turns"], f"{file}, line {line}")
        if not 1 <= record["row"] <= len(rows):
            raise RefusedError(
                f"{file}, line {line}: it answers row {record['row']}, but there are {len(rows)}; give the rows that "
                "the run was trained on"
            )
        groups.setdefault(record["row"], []).append(record)
    return [
        _row(
            rows[number - 1],
            rows[number - 1]["prompt"],
            [record["messages"][:1] for record in records],
            [None if r["reward"] is None else r["reward"] + r.get("penalty", 0.0) for r in records],
            ended=[record["end_state"] == "completed" for record in records],
        )
        for number, records in groups.items()
    ]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON Lines, whole or not at all; returns how many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pending, count = file.with_name(f".tmp_{file.name}"), 0
    try:
        with open(pending, "w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
        pending.replace(file)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    return count


def _check_one_turn(turns: int, place: str) -> None:
    if turns > 1:
        raise RefusedError(
            f"{place}: {turns} turns, and scored samples are single completions; for behaviour of several turns there "
            "are segments"
        )


def _row(
    columns: Mapping[str, Any],
    prompt: Any,
    completions: list[Any],
    rewards: list[float | None],
    completion_ids: list[list[int]] | None = None,
    logprobs: list[list[float]] | None = None,
    ended: list[bool] | None = None,
) -> dict[str, Any]:
    beside = {name: value for name, value in columns.items() if name not in SCORED_COLUMNS}
    given = {
        "completion_ids": completion_ids,
        "logprobs": None if logprobs is None else [[min(round(p, DIGITS), 0.0) for p in part] for part in logprobs],
        "ended": ended,
    }
    own = {"prompt": prompt, "completions": completions, "rewards": rewards}
    return {**beside, **own, **{name: value for name, value in given.items() if value is not None}}


def _message(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _count(tally: ScoringTally, row: dict[str, Any]) -> None:
    rewards = [reward for reward in row["rewards"] if reward is not None]
    tally.prompts += 1
    tally.samples += len(row["rewards"])
    tally.scored += len(rewards)
    tally.total += sum(rewards)
    tally.cut_off += row["ended"].count(False)
    tally.mixed += len(set(rewards)) > 1
