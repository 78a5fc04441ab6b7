"""Scored samples (`llmrl.data.scored_rows`) from a model that is asked.

Invariants: token ids and log-probabilities are the engine's own; the prompt of a row is what the policy was asked, so
that reading the row gives the ids that it saw; every sample stays, also those without a reward.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmrl.data.asking import Asking
from llmrl.data.columns import missing
from llmrl.data.faults import sound
from llmrl.data.formats import Text
from llmrl.data.scored_rows import SCORED_COLUMNS
from llmrl.data.splits import Rows
from llmrl.data.tokenization import Encoder
from llmrl.rewards.scoring import Scorer
from llmrl.rollout.protocol import Completion, Engine, SamplingParams, row_seed

PROMPTS_AT_ONCE = 16
DIGITS = 6
"""Decimals of a log-probability in a file: below what two engines agree on."""


@dataclass(frozen=True)
class Asked:
    """Rows with a column `prompt`, their prompts as the model is asked them, and their token ids."""

    rows: Rows
    prompts: list[Text]
    prompt_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)


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


def asked(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """Read and render every row's `prompt`. Raises RefusedError naming source, row and column."""
    if "prompt" not in rows.table.column_names:
        raise missing("prompt", rows.table.column_names, rows.where)
    asking = Asking(Encoder(tokenizer), rows.where)
    sound(rows, asking.read)
    table = [dict(row) for row in rows.table]
    prompts = [asking.read(row) for row in table]
    return Asked(rows, prompts, asking.ids(prompts, table, rows.numbers))


def sample_scored(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    sampling: SamplingParams,
    scorer: Scorer,
    tally: ScoringTally,
    progress: Callable[[ScoringTally], None] = lambda tally: None,
) -> Iterator[dict[str, Any]]:
    """Ask every prompt `sampling.n` times and have the answers scored; rows of scored samples, as they come.

    All columns of a row stay and reach the reward functions, whose needs `scorer.check` has found met. `tally` is kept
    up to date. Whoever stops taking rows pays for no further sample.
    """
    for start in range(0, len(asked), PROMPTS_AT_ONCE):
        part = slice(start, min(start + PROMPTS_AT_ONCE, len(asked)))
        columns = [dict(row) for row in asked.rows.select(range(part.start, part.stop)).table]
        # A seed of its own for each call: the engine numbers its prompts from 0 every time.
        groups = engine.generate(asked.prompt_ids[part], replace(sampling, seed=row_seed(sampling.seed, start, 0)))
        texts = [[_text(tokenizer, sample) for sample in samples] for samples in groups]
        rewards = iter(asyncio.run(_scores(scorer, columns, asked.prompts[part], groups, texts)))
        for row, prompt, samples, said in zip(columns, asked.prompts[part], groups, texts, strict=True):
            made = _row(row, prompt, said, samples, [next(rewards) for _ in samples])
            _count(tally, made)
            yield made
        progress(tally)


def _text(tokenizer: PreTrainedTokenizerBase, sample: Completion) -> str:
    """What a sample says, without its end."""
    return str(tokenizer.decode(sample.token_ids, skip_special_tokens=True))


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


def _row(
    columns: dict[str, Any], prompt: Text, said: list[str], samples: list[Completion], rewards: list[float | None]
) -> dict[str, Any]:
    return {
        **{name: value for name, value in columns.items() if name not in SCORED_COLUMNS},
        "prompt": prompt,
        "completions": said if isinstance(prompt, str) else [_message(text) for text in said],
        "rewards": rewards,
        "completion_ids": [sample.token_ids for sample in samples],
        "logprobs": [[min(round(p, DIGITS), 0.0) for p in sample.logprobs] for sample in samples],
        "ended": [sample.finish_reason == "stop" for sample in samples],
    }


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
