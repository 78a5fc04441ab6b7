"""Scored samples as token ids: a prompt with the n completions that a model drew for it, and their rewards.

The format of the rows is `scored_rows`'s.

Invariants: the completions of a row follow the same prompt ids; each has a reward, at least one token and, where the
file has them, one log-probability a token; ids that the file gives are taken as they are, and only what has none is
tokenised; a completion ends with one stop token, or it was cut off; equal samples stay as often as they were drawn; a
row has at least `least_samples`; whatever was dropped, cut or left out is counted and said.
"""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.answers import Request, check_prompt, encoded
from llmrl.data.columns import MEND
from llmrl.data.faults import RowFault
from llmrl.data.lengths import OverlongError, fit
from llmrl.data.preparing import COUNTED, Options, Part, PreparationKeys, Prepared, Reading, Say
from llmrl.data.scored_rows import COLUMNS, Scored, Wanted, check_scored_columns, read_scored
from llmrl.data.splits import Rows
from llmrl.data.tokenization import Encoded
from llmrl.errors import RefusedError

COUNTED_SAMPLES = COUNTED | {
    "truncated_completions": "samples cut to fit into max_length; they lose their stop token",
    "without_reward": "samples left out because they have no reward",
    "left_out": "samples left out because a limit, or max_length, cuts them off",
    "cut_off_samples": "samples without a stop token, as a limit leaves them that cuts a completion off",
    "other_text": "samples whose completion_ids decode to another text than `completions` has",
}
NESTED = {
    "completion_ids": List(List(Value("int32"))),
    "rewards": List(Value("float64")),
    "logprobs": List(List(Value("float32"))),
}

ALL_CUT_OFF = (
    "no sample has a stop token at its end, so the model would not learn to stop; sample again with a larger limit of "
    "tokens, or keep the token that ended a completion in completion_ids"
)


class ScoredData(Prepared):
    """Scored samples: columns `prompt_ids`, `completion_ids` (a list for each sample), `rewards` and `logprobs` (a
    number for each of a sample's tokens; where the file has sums, equal shares of them; null where it has none).

    counts: also the `samples` kept. fingerprint: also of rewards and log-probabilities.
    """


def prepare_scored(
    config: PreparationKeys,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    least_samples: int = 2,
    needs_logprobs: bool = False,
    cut_off: Literal["keep", "leave_out"] = "keep",
    **options: Unpack[Options],
) -> ScoredData:
    """Read, check, render and tokenise scored samples.

    needs_logprobs: rows without are faulty. cut_off: whether samples stay that a limit cut off, or that max_length
    would cut. Raises RefusedError naming source, row, column and remedy.
    """
    reading = Reading(config, tokenizer, say, COUNTED_SAMPLES, **options)
    wanted = Wanted(least_samples, needs_logprobs, cut_off == "leave_out", reading.encoder.stop_ids)
    train, heldout = reading.prepared(lambda rows: _Samples(reading, rows, wanted))
    counts = reading.counts
    if counts["other_text"] and counts["other_text"] == counts["samples_with_ids"]:
        raise RefusedError(_other_tokenizer(reading.train.where, tokenizer))
    reading.report(f"prompts kept with {counts['samples']} samples")
    return ScoredData(train, heldout, dict(counts), reading.fingerprint)


class _Samples(Part[Scored, list[Encoded]]):
    """Rows of samples, the tokens of each: of all its completions, as if they were texts."""

    id_columns = ("prompt_ids",)
    others = NESTED

    def __init__(self, reading: Reading, rows: Rows, wanted: Wanted) -> None:
        super().__init__(reading, rows)
        self.wanted = wanted

    def columns(self) -> Sequence[str]:
        check_scored_columns(self.rows.table.column_names, self.rows.where, self.wanted.logprobs)
        return COLUMNS

    def read(self, row: dict[str, Any]) -> Scored:
        return read_scored(row, self.wanted)

    def tokens(self, rows: list[Scored]) -> list[list[Encoded] | RowFault]:
        return encoded([Request(row.prompt, row.completions, row.extras) for row in rows], self.encoder)

    def answer_ids(self, row: dict[str, Any]) -> list[int]:
        return row["completion_ids"][0]

    def check_training(self, table: Dataset) -> None:
        if 0 < self.counts["samples"] == self.counts["cut_off_samples"] and not self.counts["without_stop_token"]:
            raise RefusedError(f"{self.rows.where}: {ALL_CUT_OFF}")
        super().check_training(table)

    def fitted(self, read: Scored, tokens: list[Encoded]) -> dict[str, Any]:
        """The samples that have a reward, within max_length."""
        scored, prompt_ids = read, tokens[0].prompt_ids
        check_prompt(tokens[0])
        own = {i: self._ids(scored, tokens, i) for i in scored.chosen}
        chosen = [i for i, ids in own.items() if not self._is_left_out(len(prompt_ids) + len(ids))]
        if len(chosen) < max(self.wanted.least_samples, 1):
            raise OverlongError(f"only {len(chosen)} samples fit into max_length {self.keys.max_length}", False)
        whole = [own[i] for i in chosen]
        logprobs = [_shares(scored, i, len(ids)) for i, ids in zip(chosen, whole, strict=True)]
        fitting = fit(prompt_ids, whole, self.keys.max_length, self.keys.truncation_mode)
        if scored.summed and fitting.cut_completions:
            raise RowFault(
                "logprobs",
                "the sum of a completion that max_length cuts is not that of what is left; raise max_length, set "
                "truncation_mode: drop, or give a log-probability a token",
            )
        self.counts["samples"] += len(chosen)
        self.counts["without_reward"] += scored.rewards.count(None)
        self.counts["left_out"] += len(scored.rewards) - scored.rewards.count(None) - len(chosen)
        for i, ids, full in zip(chosen, fitting.completions, whole, strict=True):
            self._count(scored, tokens[i], i, ids, full)
        self.counts["truncated_prompts"] += fitting.cut_prompts
        self.counts["truncated_completions"] += fitting.cut_completions
        return {
            "prompt_ids": fitting.prompt_ids,
            "completion_ids": fitting.completions,
            "rewards": [scored.rewards[i] for i in chosen],
            "logprobs": None
            if scored.logprobs is None
            else [part[: len(ids)] for part, ids in zip(logprobs, fitting.completions, strict=True)],
        }

    def _is_left_out(self, length: int) -> bool:
        return self.wanted.only_ended and length > self.keys.max_length and self.keys.truncation_mode != "keep_end"

    def _ids(self, scored: Scored, encoded: list[Encoded], index: int) -> list[int]:
        """A sample's own ids, or else those of its text, without the stop token that it did not reach."""
        if scored.completion_ids is not None:
            ids = scored.completion_ids[index]
            if max(ids) >= len(self.encoder.tokenizer):
                raise RowFault(
                    "completion_ids",
                    f"completion {index + 1} has the id {max(ids)}, but the tokenizer knows "
                    f"{len(self.encoder.tokenizer)} tokens; use the tokenizer that they were sampled with, or {MEND}",
                )
            return ids
        ids, ends = encoded[index].completion_ids, encoded[index].ends
        ids = ids[:-1] if ends and not scored.ended[index] else ids
        if not ids:
            raise RowFault(
                "completions", f"completion {index + 1} is empty and did not end, so it has no token; {MEND}"
            )
        return ids

    def _count(self, scored: Scored, encoded: Encoded, index: int, ids: list[int], whole: list[int]) -> None:
        """Of one sample; `ids` are what is left of it."""
        stops = whole[-1] in self.encoder.stop_ids
        self.counts["cut_off_samples"] += not (scored.ended[index] and stops)
        self.ended += stops and len(ids) == len(whole)
        if scored.completion_ids is not None:
            self.counts["samples_with_ids"] += 1
            self.counts["other_text"] += not _says(self.encoder.decode(whole), scored.completions[index])
            return
        self.counts["retokenised_boundaries"] += encoded.retokenised
        self.counts["rerendered_prompts"] += encoded.rerendered
        self.counts["without_stop_token"] += not encoded.ends

    def note(self, kept: list[dict[str, Any]]) -> None:
        for row in kept:
            self.fingerprint.update("completion_ids", row["completion_ids"])
            numbers = [row["rewards"], *(row["logprobs"] or [])]
            self.fingerprint.update("numbers", [np.asarray(part, "<f8").view("<i4").tolist() for part in numbers])


def _shares(scored: Scored, index: int, count: int) -> list[float]:
    """A log-probability for each of a sample's tokens."""
    if scored.logprobs is None:
        return []
    given = scored.logprobs[index]
    if scored.summed:
        return [given[0] / count] * count
    if len(given) != count:
        raise RowFault(
            "logprobs",
            f"completion {index + 1} has {len(given)} of them and is tokenised into {count} tokens; give the "
            "completion_ids that were sampled, or the sum",
        )
    return given


def _says(decoded: str, completion: Any) -> bool:
    """Whether the text of sampled ids holds what the completion is said to be."""
    text = completion if isinstance(completion, str) else completion[0].get("content") or ""
    return text.strip() in decoded


def _other_tokenizer(where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"{where}, column `completion_ids`: none of them decodes to its completion, so they are another tokenizer's "
        f"than the model's ({tokenizer.name_or_path}); train the model that sampled them, or remove the column"
    )
