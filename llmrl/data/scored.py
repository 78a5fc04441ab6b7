"""Scored samples as token ids: a prompt with the n completions that a model drew for it, and their rewards.

The format of the rows is `scored_rows`'s.

Invariants: the completions of a row follow the same prompt ids; each has a reward, at least one token and, where the
file has them, one log-probability a token; ids that the file gives are taken as they are, and only what has none is
tokenised; a completion ends with one stop token, or it was cut off; equal samples stay as often as they were drawn; a
row has at least `least_samples`; whatever was dropped, cut or left out is counted and said.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.columns import MEND
from llmrl.data.faults import RowFault, refusal, sound
from llmrl.data.lengths import OverlongError, fit
from llmrl.data.mapping import Fingerprint, combined, mapped
from llmrl.data.preferences import PreferenceKeys, check_training
from llmrl.data.scored_rows import COLUMNS, Scored, Wanted, check_scored_columns, read_scored
from llmrl.data.splits import Rows, train_and_heldout
from llmrl.data.tokenization import Encoded, Encoder, check_chat_template
from llmrl.errors import RefusedError

Say = Callable[[str], None]

COUNTED = {
    "dropped_faulty": "rows dropped as faulty",
    "dropped_overlong_prompts": "rows dropped because max_length leaves no room for prompt and completion",
    "dropped_overlong_completions": "rows dropped because a completion does not fit into max_length",
    "without_reward": "samples left out because they have no reward",
    "left_out": "samples left out because a limit, or max_length, cuts them off",
    "cut_off_samples": "samples without a stop token, as a limit leaves them that cuts a completion off",
    "truncated_completions": "samples cut to fit into max_length; they lose their stop token",
    "truncated_prompts": "prompts cut at their start to fit into max_length",
    "retokenised_boundaries": "completions tokenised apart from their prompt, for a token would span the boundary",
    "rerendered_prompts": "completions put behind the prompt that generation sees, which the chat template writes "
    "differently when an answer follows",
    "without_stop_token": "completions in which the chat template writes no stop token",
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


@dataclass(frozen=True)
class ScoredData:
    """Scored samples to train on and held out.

    train, heldout: columns `prompt_ids`, `completion_ids` (a list for each sample), `rewards`, `logprobs` (a number for
    each of a sample's tokens; where the file has sums, equal shares of them; null where it has none) and `row` (in the
    source, from 1). counts: `rows` read, `train_rows`, `heldout_rows` and `samples` kept, and all that was dropped or
    changed, by COUNTED's names. fingerprint: of ids, rewards and log-probabilities of both parts, in order.
    """

    train: Dataset
    heldout: Dataset | None
    counts: dict[str, int]
    fingerprint: str


def prepare_scored(
    config: PreferenceKeys,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    dataset: Dataset | DatasetDict | None = None,
    stop_token_ids: Collection[int] = (),
    faulty_rows: Literal["error", "drop"] = "error",
    least_samples: int = 2,
    needs_logprobs: bool = False,
    cut_off: Literal["keep", "leave_out"] = "keep",
) -> ScoredData:
    """Read, check, render and tokenise scored samples.

    dataset: used instead of `config.dataset_name`. stop_token_ids: where generation stops besides the tokenizer's EOS.
    faulty_rows: what happens to rows that are none, `drop` counts them. needs_logprobs: rows without are faulty.
    cut_off: whether samples stay that a limit cut off, or that max_length would cut.
    Raises RefusedError naming source, row, column and remedy.
    """
    train, heldout = train_and_heldout(config, say, dataset)
    encoder = Encoder(tokenizer, stop_token_ids)
    wanted = Wanted(least_samples, needs_logprobs, cut_off == "leave_out", encoder.stop_ids)
    counts = Counter(dict.fromkeys(("rows", "train_rows", "heldout_rows", "samples", *COUNTED), 0))
    fingerprints: list[Fingerprint] = []
    prepared: list[Dataset] = []
    for rows, name in ((train, "train_rows"), (heldout, "heldout_rows")):
        if rows is None:
            continue
        fingerprints.append(Fingerprint())
        preparation = _Preparation(config, encoder, wanted, rows.where, counts)
        preparation.fingerprint, preparation.drops_faulty = fingerprints[-1], faulty_rows == "drop"
        part = mapped(preparation.sound(rows), preparation.batch, ("prompt_ids",), NESTED, fingerprints[-1])
        counts.update({"rows": len(rows), name: len(part)})
        if rows is train:
            last_ids = part[0]["completion_ids"][0] if len(part) else None
            if 0 < counts["samples"] == counts["cut_off_samples"] and not counts["without_stop_token"]:
                raise RefusedError(f"{rows.where}: {ALL_CUT_OFF}")
            check_training(rows, last_ids, preparation.ended, encoder, counts, _changes(counts))
        prepared.append(part)
    if counts["other_text"] and counts["other_text"] == counts["samples_with_ids"]:
        raise RefusedError(_other_tokenizer(train.where, tokenizer))
    _report(counts, say)
    held = prepared[1] if len(prepared) > 1 and len(prepared[1]) else None
    return ScoredData(prepared[0], held, dict(counts), combined(fingerprints))


class _Preparation:
    """The rows of one source on their way to token ids. `ended`: kept samples that hold their stop token."""

    fingerprint: Fingerprint
    drops_faulty: bool

    def __init__(
        self, keys: PreferenceKeys, encoder: Encoder, wanted: Wanted, where: str, counts: Counter[str]
    ) -> None:
        self.keys, self.encoder, self.wanted, self.where, self.counts = keys, encoder, wanted, where, counts
        self.ended = 0

    def sound(self, rows: Rows) -> Rows:
        """The rows that can be read, before any is tokenised; the others are refused together, or dropped."""
        check_scored_columns(rows.table.column_names, rows.where, self.wanted.logprobs)
        kept = sound(rows.columns(COLUMNS), self._check, drop=self.drops_faulty)
        self.counts["dropped_faulty"] += len(rows) - len(kept)
        return kept

    def _check(self, row: dict[str, Any]) -> None:
        if read_scored(row, self.wanted).conversational:
            check_chat_template(self.encoder.tokenizer, self.where)

    def batch(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        """Token ids, rewards and log-probabilities of the rows that are kept."""
        read = [read_scored(row, self.wanted) for row in rows]
        parts = zip(read, _encoded(read, self.encoder), numbers, strict=True)
        kept = [made for part in parts if (made := self._kept(*part)) is not None]
        self._note(kept)
        return kept

    def _kept(self, scored: Scored, encoded: list[Encoded] | RowFault, number: int) -> dict[str, Any] | None:
        try:
            if isinstance(encoded, RowFault):
                raise encoded
            return {**self._row(scored, encoded), "row": number}
        except RowFault as fault:
            if not self.drops_faulty:
                raise refusal(self.where, {number: fault}) from None
            self.counts["dropped_faulty"] += 1
        except OverlongError as overlong:
            self.counts[overlong.dropped(self.keys, f"{self.where}, row {number}")] += 1
        return None

    def _row(self, scored: Scored, encoded: list[Encoded]) -> dict[str, Any]:
        """The samples that have a reward, within max_length."""
        prompt_ids = encoded[0].prompt_ids
        if not prompt_ids:
            raise RowFault("prompt", "empty, and the tokenizer puts no token before an answer; give a prompt")
        own = {i: self._ids(scored, encoded, i) for i in scored.chosen}
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
            self._count(scored, encoded[i], i, ids, full)
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

    def _note(self, kept: list[dict[str, Any]]) -> None:
        """Add to the fingerprint what `mapped` does not: the nested columns."""
        for row in kept:
            self.fingerprint.update("completion_ids", row["completion_ids"])
            numbers = [row["rewards"], *(row["logprobs"] or [])]
            self.fingerprint.update("numbers", [np.asarray(part, "<f8").view("<i4").tolist() for part in numbers])


def _encoded(rows: list[Scored], encoder: Encoder) -> list[list[Encoded] | RowFault]:
    """Of each row its completions as if they were texts; plain and conversational rows each in one go."""
    encoded: list[Any] = [None] * len(rows)
    plain = [i for i, row in enumerate(rows) if not row.conversational]
    spoken = [i for i, row in enumerate(rows) if row.conversational]

    def parts(indices: list[int]) -> tuple[list[Any], list[Any]]:
        return [rows[i].prompt for i in indices], [rows[i].completions for i in indices]

    results = [*encoder.plain(*parts(plain)), *encoder.rendered(*parts(spoken), [rows[i].extras for i in spoken])]
    for index, result in zip((*plain, *spoken), results, strict=True):
        encoded[index] = result
    return encoded


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


def _changes(counts: Counter[str]) -> str:
    return "; ".join(f"{counts[name]} {text}" for name, text in COUNTED.items() if counts[name])


def _report(counts: Counter[str], say: Say) -> None:
    kept = counts["train_rows"] + counts["heldout_rows"]
    heldout = f" and {counts['heldout_rows']} held out" if counts["heldout_rows"] else ""
    say(
        f"data: {kept} of {counts['rows']} prompts kept with {counts['samples']} samples, {counts['train_rows']} to "
        f"train on{heldout}: " + (_changes(counts) or "none dropped, none cut")
    )
