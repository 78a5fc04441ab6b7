"""Columns of token ids and their fingerprint."""

from typing import Any

import datasets
from datasets import Dataset, List, Value

from llmrl.data.mapping import Fingerprint, combined, mapped
from llmrl.data.splits import whole


def digest(*batches: list[list[int]], name: str = "ids") -> str:
    fingerprint = Fingerprint()
    for batch in batches:
        fingerprint.update(name, batch)
    return fingerprint.hexdigest()


def test_the_fingerprint_tells_rows_from_each_other_and_not_batches() -> None:
    assert digest([[1, 2], [3]]) == digest([[1, 2]], [[3]])
    others = [digest([[1], [2, 3]]), digest([[3], [1, 2]]), digest([[1, 2], [3], []]), digest([[1, 2], [4]])]
    assert len({digest([[1, 2], [3]]), digest([[1, 2], [3]], name="other"), *others}) == 6


def test_parts_are_told_from_each_other() -> None:
    def parts(*rows: list[list[int]]) -> str:
        fingerprints = [Fingerprint() for _ in rows]
        for fingerprint, part in zip(fingerprints, rows, strict=True):
            fingerprint.update("ids", part)
        return combined(fingerprints)

    assert len({parts([[1], [2]], [[3]]), parts([[1]], [[2], [3]]), parts([[1], [2], [3]])}) == 3


def test_the_fingerprint_is_the_same_in_every_version() -> None:
    """It is kept in checkpoints: if this fails, every older run looks as if its data had changed."""
    assert digest([[1, 2], [3]], [[]]) == "eaed18edcc1686eaa9373a6e22ef9bdc"


def test_columns_have_narrow_ids_and_wide_row_numbers() -> None:
    def double(rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        return [{"ids": [r["a"], r["a"]], "row": n, "b": "x"} for r, n in zip(rows, numbers, strict=True) if r["a"] % 2]

    before = datasets.are_progress_bars_disabled()
    rows = whole(Dataset.from_dict({"a": list(range(6)), "c": [0] * 6}), "d").select([5, 4, 1])
    result = mapped(rows, double, ("ids",), {"b": Value("string")})
    assert result.to_list() == [{"ids": [5, 5], "row": 6, "b": "x"}, {"ids": [1, 1], "row": 2, "b": "x"}]
    assert result.features["ids"] == List(Value("int32"))
    assert result.features["row"] == Value("int64")
    assert datasets.are_progress_bars_disabled() == before


def test_nothing_kept_is_an_empty_table_with_its_columns() -> None:
    result = mapped(whole(Dataset.from_dict({"a": [1, 2]}), "d"), lambda rows, numbers: [], ("ids",))
    assert len(result) == 0
    assert result.column_names == ["ids", "row"]
