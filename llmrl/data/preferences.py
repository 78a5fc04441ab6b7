"""Preference pairs as token ids, ready to be packed.

Invariants: the two completions of a row follow the same prompt ids, are not empty and differ; no row is longer than
`max_length`; whatever was dropped, cut or made in an unusual way is counted and said; the same data, tokenizer and keys
give the same rows and the same fingerprint on every rank and machine.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from llmrl.data.columns import missing
from llmrl.data.faults import RowFault, refusal, sound
from llmrl.data.formats import CALIBRATION, COLUMNS, Pair, check_columns, read_pair, with_calibration
from llmrl.data.lengths import Fitting, LengthKeys, OverlongError, fit
from llmrl.data.mapping import Fingerprint, combined, mapped
from llmrl.data.splits import Rows, SplitKeys, train_and_heldout
from llmrl.data.tokenization import Encoded, Encoder, check_chat_template, check_vocabulary
from llmrl.errors import RefusedError

__all__ = ["PreferenceData", "PreferenceKeys", "check_vocabulary", "prepare_preferences"]

Say = Callable[[str], None]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
CALIBRATION_COLUMNS = ("calibration_ids", "calibration_lengths")
COUNTED = {
    "dropped_faulty": "rows dropped as faulty",
    "dropped_overlong_prompts": "rows dropped because max_length leaves no room for prompt and completion",
    "dropped_overlong_completions": "rows dropped because a completion does not fit into max_length",
    "truncated_completions": "completions cut to fit into max_length; they lose their stop token",
    "truncated_prompts": "prompts cut at their start to fit into max_length",
    "retokenised_boundaries": "completions tokenised apart from their prompt, for a token would span the boundary",
    "rerendered_prompts": "completions put behind the prompt that generation sees, which the chat template writes "
    "differently when an answer follows",
    "without_stop_token": "completions in which the chat template writes no stop token",
}


class PreferenceKeys(SplitKeys, LengthKeys, Protocol):
    """The keys read here; `llmrl.config`'s DataKeys has them."""


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train on and pairs held out.

    train, heldout: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (int32 lists) and `row` (in the source, from 1);
    train also, where they were asked for, `calibration_ids`, all of a row's calibration answers one after another, and
    `calibration_lengths`, the length of each.
    counts: `rows` read, `train_rows` and `heldout_rows` kept, and all that was dropped or changed, by COUNTED's names.
    fingerprint: of the token ids of both parts, in order; no path, name or version goes into it.
    """

    train: Dataset
    heldout: Dataset | None
    counts: dict[str, int]
    fingerprint: str


def prepare_preferences(
    config: PreferenceKeys,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    dataset: Dataset | DatasetDict | None = None,
    stop_token_ids: Collection[int] = (),
    faulty_rows: Literal["error", "drop"] = "error",
    calibration: bool = False,
) -> PreferenceData:
    """Read, check, render and tokenise preference pairs (formats: `llmrl.data.formats`).

    dataset: used instead of `config.dataset_name`. stop_token_ids: where generation stops besides the tokenizer's EOS.
    faulty_rows: what happens to rows that are no pair (one with an empty completion, say); `drop` counts them.
    calibration: read the training rows' further answers as well.
    Raises RefusedError naming source, row, column and remedy.
    """
    train, heldout = train_and_heldout(config, say, dataset)
    if CALIBRATION in train.table.column_names and not calibration:
        say(f"data: {train.where}: the column `{CALIBRATION}` is not read (VPO reads it with calibration: column)")
    encoder = Encoder(tokenizer, stop_token_ids)
    counts = Counter(dict.fromkeys(("rows", "train_rows", "heldout_rows", *COUNTED), 0))
    fingerprints: list[Fingerprint] = []
    prepared: list[Dataset] = []
    for rows, name in ((train, "train_rows"), (heldout, "heldout_rows")):
        if rows is None:
            continue
        further = calibration and rows is train
        preparation = _Preparation(config, encoder, rows.where, faulty_rows, counts, further)
        fingerprints.append(Fingerprint())
        columns = (*ID_COLUMNS, *(CALIBRATION_COLUMNS if further else ()))
        part = mapped(preparation.sound(rows), preparation.batch, columns, fingerprint=fingerprints[-1])
        counts.update({"rows": len(rows), name: len(part)})
        if rows is train:
            last_ids = part[0]["chosen_ids"] if len(part) else None
            check_training(rows, last_ids, preparation.ended, encoder, counts, _changes(counts))
            if preparation.plain and tokenizer.chat_template:
                say(f"data: {preparation.plain} pairs are text and no messages: taken as it stands, without a template")
        prepared.append(part)
    _report(counts, say)
    _report_shared_prompts(prepared, say)
    held = prepared[1] if len(prepared) > 1 and len(prepared[1]) else None
    return PreferenceData(prepared[0], held, dict(counts), combined(fingerprints))


class _Preparation:
    """The rows of one source on their way to token ids. `ended`: kept completions that hold their stop token; `plain`:
    pairs that are text and no messages."""

    def __init__(
        self,
        keys: PreferenceKeys,
        encoder: Encoder,
        where: str,
        faulty_rows: str,
        counts: Counter[str],
        calibration: bool = False,
    ) -> None:
        self.keys, self.encoder, self.where, self.counts, self.calibration = keys, encoder, where, counts, calibration
        self.drops_faulty = faulty_rows == "drop"
        self.ended, self.plain = 0, 0

    def sound(self, rows: Rows) -> Rows:
        """The rows that are pairs, read before any is tokenised; the others are refused together, or dropped."""
        check_columns(rows.table.column_names, rows.table[0], self.where)
        if self.calibration and CALIBRATION not in rows.table.column_names:
            raise missing(CALIBRATION, rows.table.column_names, self.where, COLUMNS)
        columns = (*COLUMNS, *([CALIBRATION] if self.calibration else []))
        kept = sound(rows.columns(columns), self._check, drop=self.drops_faulty)
        self.counts["dropped_faulty"] += len(rows) - len(kept)
        return kept

    def _read(self, row: dict[str, Any]) -> Pair:
        return with_calibration(read_pair(row), row) if self.calibration else read_pair(row)

    def _check(self, row: dict[str, Any]) -> None:
        if self._read(row).conversational:
            check_chat_template(self.encoder.tokenizer, self.where)
        else:
            self.plain += 1

    def batch(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        """Token ids of the rows that are kept."""
        encoded = _encoded([self._read(row) for row in rows], self.encoder)
        kept = [self._kept(row, number) for row, number in zip(encoded, numbers, strict=True)]
        return [row for row in kept if row is not None]

    def _kept(self, encoded: list[Encoded] | RowFault, number: int) -> dict[str, Any] | None:
        """The row as it is trained on, or None if it is dropped."""
        try:
            if isinstance(encoded, RowFault):
                raise encoded
            fitting = self._fitted(encoded)
        except RowFault as fault:
            if not self.drops_faulty:
                raise refusal(self.where, {number: fault}) from None
            self.counts["dropped_faulty"] += 1
            return None
        except OverlongError as overlong:
            self.counts[overlong.dropped(self.keys, f"{self.where}, row {number}")] += 1
            return None
        self._count(encoded, fitting)
        chosen, rejected, *further = fitting.completions
        kept = dict(zip(ID_COLUMNS, (fitting.prompt_ids, chosen, rejected), strict=True)) | {"row": number}
        if self.calibration:
            together = list(itertools.chain.from_iterable(further))
            kept |= dict(zip(CALIBRATION_COLUMNS, (together, list(map(len, further))), strict=True))
        return kept

    def _fitted(self, encoded: list[Encoded]) -> Fitting:
        prompt_ids = encoded[0].prompt_ids
        if not prompt_ids:
            raise RowFault(
                "prompt",
                "empty, and the tokenizer puts no token before an answer, so that its first token has nothing "
                "to be predicted from; give a prompt",
            )
        columns = ("chosen", "rejected", *[CALIBRATION] * (len(encoded) - 2))
        for column, part in zip(columns, encoded, strict=True):
            if len(part.completion_ids) <= part.ends:
                raise RowFault(column, "an empty completion once it is tokenised; mend or remove the row")
        fitting = fit(prompt_ids, [e.completion_ids for e in encoded], self.keys.max_length, self.keys.truncation_mode)
        if fitting.completions[0] == fitting.completions[1]:
            when = "cut to max_length (raise it, or set truncation_mode)" if fitting.cut_completions else "tokenised"
            raise RowFault(
                "rejected", f"equal to `chosen` once {when}, so the pair prefers nothing; mend or remove the row"
            )
        return fitting

    def _count(self, encoded: list[Encoded], fitting: Fitting) -> None:
        self.counts["truncated_prompts"] += fitting.cut_prompts
        self.counts["truncated_completions"] += fitting.cut_completions
        for part, ids in zip(encoded, fitting.completions, strict=True):
            self.counts["retokenised_boundaries"] += part.retokenised
            self.counts["rerendered_prompts"] += part.rerendered
            self.counts["without_stop_token"] += not part.ends
            self.ended += part.ends and len(ids) == len(part.completion_ids)


def _encoded(pairs: list[Pair], encoder: Encoder) -> list[list[Encoded] | RowFault]:
    """(chosen, rejected, *calibration) of each pair; plain and conversational ones each in one go."""
    encoded: list[Any] = [None] * len(pairs)
    plain = [i for i, pair in enumerate(pairs) if not pair.conversational]
    spoken = [i for i, pair in enumerate(pairs) if pair.conversational]

    def prompts_and_answers(indices: list[int]) -> tuple[list[Any], list[Any]]:
        answers = [(pairs[i].chosen, pairs[i].rejected, *pairs[i].calibration) for i in indices]
        return [pairs[i].prompt for i in indices], answers

    extras = [pairs[i].extras for i in spoken]
    results = [*encoder.plain(*prompts_and_answers(plain)), *encoder.rendered(*prompts_and_answers(spoken), extras)]
    for index, result in zip((*plain, *spoken), results, strict=True):
        encoded[index] = result
    return encoded


def check_training(
    rows: Rows, last_ids: Sequence[int] | None, ended: int, encoder: Encoder, counts: Counter[str], changes: str
) -> None:
    """Refuse training rows of which none is left, or that would never teach the policy when to stop.

    last_ids: of a completion that was kept, None where none was; ended: kept completions that hold their stop token;
    changes: what was dropped and cut, in words.
    """
    if last_ids is None:
        raise RefusedError(f"{rows.where}: empty after checking, all {len(rows)} rows were dropped: {changes}")
    if ended:
        return
    if counts["without_stop_token"]:
        stops = ", ".join(encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.stop_ids))) or "there is none"
        raise RefusedError(
            f"{rows.where}: the chat template never ends an answer with a stop token ({stops}), so the model would not "
            f"learn to stop; an answer ends with {encoder.decode(last_ids[-8:])!r}. Set eos_token in "
            "tokenizer_config.json to the token that ends a turn, or use a template that ends turns with EOS"
        )
    raise RefusedError(
        f"{rows.where}: max_length cuts the end off every completion, so the model would not learn to stop; raise "
        "max_length, or set truncation_mode: drop"
    )


def _changes(counts: Counter[str]) -> str:
    return "; ".join(f"{counts[name]} {text}" for name, text in COUNTED.items() if counts[name])


def _report_shared_prompts(prepared: list[Dataset], say: Say) -> None:
    """Held-out pairs whose prompt is trained on measure less than they seem to: said, for it may be meant."""
    if len(prepared) < 2:
        return
    trained, heldout = (
        [hash(tuple(ids)) for batch in part.select_columns(["prompt_ids"]).iter(1000) for ids in batch["prompt_ids"]]
        for part in prepared
    )
    if shared := sum(map(set(trained).__contains__, heldout)):
        say(f"data: the prompts of {shared} of {len(heldout)} held-out pairs are also trained on")


def _report(counts: Counter[str], say: Say) -> None:
    kept = counts["train_rows"] + counts["heldout_rows"]
    heldout = f" and {counts['heldout_rows']} held out" if counts["heldout_rows"] else ""
    say(
        f"data: {kept} of {counts['rows']} pairs kept, {counts['train_rows']} to train on{heldout}: "
        + (_changes(counts) or "none dropped, none cut")
    )
