"""Preference pairs as token ids, ready to be packed.

Invariants: the two completions of a row follow the same prompt ids, are not empty and differ; no row is longer than
`max_length`; whatever was dropped, cut or made in an unusual way is counted and said; the same data, tokenizer and keys
give the same rows and the same fingerprint on every rank and machine.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Unpack

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmrl.data.answers import Request, check_not_empty, encoded
from llmrl.data.columns import missing
from llmrl.data.faults import RowFault
from llmrl.data.formats import CALIBRATION, COLUMNS, Pair, check_columns, read_pair, with_calibration
from llmrl.data.lengths import Fitting, OverlongError, fit
from llmrl.data.preparing import COUNTED, Options, Part, PreparationKeys, Prepared, Reading, Say
from llmrl.data.splits import Rows
from llmrl.data.tokenization import Encoded

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
CALIBRATION_COLUMNS = ("calibration_ids", "calibration_lengths")


class PreferenceData(Prepared):
    """Pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (int32 lists); to train on, where they were asked for,
    also `calibration_ids`, all of a row's calibration answers one after another, and `calibration_lengths`, the length
    of each."""


def prepare_preferences(
    config: PreparationKeys,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    calibration: bool = False,
    **options: Unpack[Options],
) -> PreferenceData:
    """Read, check, render and tokenise preference pairs (formats: `llmrl.data.formats`).

    calibration: read the training rows' further answers as well. Raises RefusedError naming source, row, column and
    remedy.
    """
    reading = Reading(config, tokenizer, say, COUNTED, **options)
    if CALIBRATION in reading.train.table.column_names and not calibration:
        say(
            f"data: {reading.train.where}: the column `{CALIBRATION}` is not read (VPO reads it with calibration: "
            "column)"
        )
    train, heldout = reading.prepared(lambda rows: _Pairs(reading, rows, calibration and rows is reading.train))
    reading.report("pairs kept")
    _report_shared_prompts(train, heldout, say)
    return PreferenceData(train, heldout, dict(reading.counts), reading.fingerprint)


class _Pairs(Part[Pair, list[Encoded]]):
    """Pairs, the tokens of each: of chosen, rejected and calibration answers."""

    noun = "pairs"

    def __init__(self, reading: Reading, rows: Rows, calibration: bool) -> None:
        super().__init__(reading, rows)
        self.calibration = calibration
        self.id_columns = (*ID_COLUMNS, *(CALIBRATION_COLUMNS if calibration else ()))

    def columns(self) -> Sequence[str]:
        table = self.rows.table
        check_columns(table.column_names, table[0], self.rows.where)
        if not self.calibration:
            return COLUMNS
        if CALIBRATION not in table.column_names:
            raise missing(CALIBRATION, table.column_names, self.rows.where, COLUMNS)
        return (*COLUMNS, CALIBRATION)

    def read(self, row: dict[str, Any]) -> Pair:
        return with_calibration(read_pair(row), row) if self.calibration else read_pair(row)

    def tokens(self, rows: list[Pair]) -> list[list[Encoded] | RowFault]:
        requests = [Request(pair.prompt, (pair.chosen, pair.rejected, *pair.calibration), pair.extras) for pair in rows]
        return encoded(requests, self.encoder)

    def fitted(self, read: Pair, tokens: list[Encoded]) -> dict[str, Any]:
        fitting = self._fitting(tokens)
        self._count(tokens, fitting)
        chosen, rejected, *further = fitting.completions
        columns: list[list[int]] = [fitting.prompt_ids, chosen, rejected]
        if self.calibration:
            columns += [list(itertools.chain.from_iterable(further)), list(map(len, further))]
        return dict(zip(self.id_columns, columns, strict=True))

    def answer_ids(self, row: dict[str, Any]) -> list[int]:
        return row["chosen_ids"]

    def _fitting(self, tokens: list[Encoded]) -> Fitting:
        columns = ("chosen", "rejected", *[CALIBRATION] * (len(tokens) - 2))
        for column, part in zip(columns, tokens, strict=True):
            check_not_empty(part, "prompt", column)
        completions = [part.completion_ids for part in tokens]
        try:
            fitting = fit(tokens[0].prompt_ids, completions, self.keys.max_length, self.keys.truncation_mode)
        except OverlongError as overlong:
            of_prompt = overlong.no_room and self.keys.truncation_mode != "keep_end"
            if not of_prompt and max(map(len, completions[2:]), default=0) > max(map(len, completions[:2])):
                overlong.column = CALIBRATION
            raise
        if fitting.completions[0] == fitting.completions[1]:
            when = "cut to max_length (raise it, or set truncation_mode)" if fitting.cut_completions else "tokenised"
            raise RowFault(
                "rejected", f"equal to `chosen` once {when}, so the pair prefers nothing; mend or remove the row"
            )
        return fitting

    def _count(self, tokens: list[Encoded], fitting: Fitting) -> None:
        self.counts["truncated_prompts"] += fitting.cut_prompts
        self.counts["truncated_completions"] += fitting.cut_completions
        for part, ids in zip(tokens, fitting.completions, strict=True):
            self.counts["retokenised_boundaries"] += part.retokenised
            self.counts["rerendered_prompts"] += part.rerendered
            self.counts["without_stop_token"] += not part.ends
            self.ended += part.ends and len(ids) == len(part.completion_ids)


def _report_shared_prompts(train: Dataset, heldout: Dataset | None, say: Say) -> None:
    """Held-out pairs whose prompt is trained on measure less than they seem to: said, for it may be meant."""
    if heldout is None:
        return
    trained, asked = (
        [hash(tuple(ids)) for batch in part.select_columns(["prompt_ids"]).iter(1000) for ids in batch["prompt_ids"]]
        for part in (train, heldout)
    )
    if shared := sum(map(set(trained).__contains__, asked)):
        say(f"data: the prompts of {shared} of {len(asked)} held-out pairs are also trained on")
