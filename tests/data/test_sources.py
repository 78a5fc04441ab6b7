"""Reading files, folders and datasets objects, and the message for everything that cannot be read."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from llmrl.data.sources import load_rows
from llmrl.errors import RefusedError

ROWS = [{"prompt": f"{i}+1=", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(5)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def to_jsonl(folder: Path) -> str:
    (folder / "d.jsonl").write_text(lines(ROWS))
    return str(folder / "d.jsonl")


def to_gzip(folder: Path) -> str:
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    return str(folder / "d.jsonl.gz")


def to_json(folder: Path) -> str:
    (folder / "d.json").write_text(json.dumps(ROWS, indent=1))
    return str(folder / "d.json")


def to_json_lines_named_json(folder: Path) -> str:
    (folder / "d.json").write_text(lines(ROWS))
    return str(folder / "d.json")


def to_jsonl_with_mark_and_blank_lines(folder: Path) -> str:
    (folder / "d.jsonl").write_text("\ufeff" + lines(ROWS[:2]) + "\n   \n" + lines(ROWS[2:]) + "\n")
    return str(folder / "d.jsonl")


def to_parquet(folder: Path) -> str:
    Dataset.from_list(ROWS).to_parquet(folder / "d.parquet")
    return str(folder / "d.parquet")


def to_csv(folder: Path) -> str:
    Dataset.from_list(ROWS).to_csv(folder / "d.csv", index=False)
    return str(folder / "d.csv")


def to_saved(folder: Path) -> str:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


def to_folder_of_shards(folder: Path) -> str:
    (folder / "data").mkdir()
    for i, part in enumerate((ROWS[:2], ROWS[2:])):
        Dataset.from_list(part).to_parquet(folder / f"data/train-0000{i}-of-00002.parquet")
    return str(folder)


WRITERS = [
    to_jsonl, to_gzip, to_json, to_json_lines_named_json, to_jsonl_with_mark_and_blank_lines, to_parquet, to_csv,
    to_saved, to_folder_of_shards,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_source_gives_the_same_rows(write: Callable[[Path], str], tmp_path: Path) -> None:
    assert load_rows(write(tmp_path), "train").to_list() == ROWS


def test_datasets_objects_are_taken_as_they_are() -> None:
    rows = Dataset.from_list(ROWS)
    assert load_rows(rows).to_list() == ROWS
    assert load_rows(DatasetDict(other=rows), "other").to_list() == ROWS


def test_a_folder_offers_the_splits_that_its_files_are_named_after(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"a": name}]))
    assert [load_rows(str(tmp_path), s)[0]["a"] for s in ("train", "validation", "test")] == ["train", "dev", "test"]


def test_columns_that_only_later_rows_have_are_kept(tmp_path: Path) -> None:
    rows = [{"a": 1}] * 10_001 + [{"a": 2, "late": "x"}]
    (tmp_path / "d.jsonl").write_text(lines(rows))
    read = load_rows(str(tmp_path / "d.jsonl"))
    assert read[0] == {"a": 1, "late": None}
    assert read[10_001] == {"a": 2, "late": "x"}


def test_each_rows_tools_keep_their_own_keys(tmp_path: Path) -> None:
    """Arrow gives every object in a column the keys of all the others: a schema would gain arguments set to null."""
    tools = [[{"name": "f", "parameters": {"x": {"type": "int"}}}], [{"name": "g", "parameters": {"y": {}}}]]
    (tmp_path / "d.jsonl").write_text(lines([{"tools": t} for t in tools]))
    assert [json.loads(row["tools"]) for row in load_rows(str(tmp_path / "d.jsonl"))] == tools


REFUSALS = {
    "nothing in it": ("d.jsonl", "", ["d.jsonl", "empty"]),
    "blank lines only": ("d.jsonl", "\n \n", ["d.jsonl", "empty"]),
    "empty array": ("d.json", "[]", ["d.json", "empty"]),
    "header only": ("d.csv", "prompt,chosen\n", ["d.csv", "empty"]),
    "broken line": ("d.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', ["d.jsonl", "line 2"]),
    "broken line after a blank one": ("d.jsonl", '{"a": 1}\n\n{"a" 2}\n', ["d.jsonl", "line 3"]),
    "broken array": ("d.json", '[{"a": 1},\n{"a": }]', ["d.json", "line 2"]),
    "a line that is no object": ("d.jsonl", '{"a": 1}\n["a"]\n', ["d.jsonl", "line 2", "a list"]),
    "a line that is null": ("d.jsonl", "null\n", ["d.jsonl", "line 1", "null"]),
    "two kinds in a column": ("d.jsonl", '{"a": "x"}\n{"a": 7}\n', ["d.jsonl", "row 2", "`a`", "number", "text"]),
    "two kinds inside a column": ("d.jsonl", '{"a": [{"b": 1}]}\n{"a": [{"b": "x"}]}\n', ["d.jsonl", "row 2", "`a`"]),
    "not UTF-8": ("d.jsonl", '{"a": "\udce9"}\n', ["d.jsonl", "line 1", "UTF-8"]),
    "not UTF-8, far down": ("d.jsonl", '{"a": "x"}\n' * 20 + '{"a": "\udce9"}\n', ["d.jsonl", "line 21", "UTF-8"]),
    "half a surrogate pair": ("d.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}\n', ["d.jsonl", "row 2", "`a`", "cut in two"]),
    "a number of 5000 digits": ("d.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", ["d.jsonl", "line 2"]),
    "brackets without end": ("d.jsonl", '{"a": ' + "[" * 100_000 + "\n", ["d.jsonl", "line 1"]),
    "csv row too long": ("d.csv", "a,b\n1,2\n1,2,3\n", ["d.csv", "line 3", "3 values", "2 columns"]),
    "csv not UTF-8, far down": ("d.csv", "a,b\n" + "1,2\n" * 20 + "1,\udce9\n", ["d.csv", "line 22", "UTF-8"]),
    "csv with semicolons": ("d.csv", "a;b\n1;2\n", ["d.csv", "line 1", "';' separates", "commas"]),
    "csv column twice": ("d.csv", "a,a\n1,2\n", ["d.csv", "line 1"]),
    "not parquet": ("d.parquet", "PAR2 no", ["d.parquet", "damaged"]),
    "not gzip": ("d.jsonl.gz", "no", ["d.jsonl.gz", "damaged"]),
    "unknown kind": ("d.txt", "hello", ["d.txt", ".jsonl"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_read_is_named(case: str, tmp_path: Path) -> None:
    name, content, words = REFUSALS[case]
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RefusedError) as refused:
        load_rows(str(tmp_path / name))
    assert [word for word in words if word not in str(refused.value)] == []


def test_the_row_that_does_not_fit_is_named_in_a_later_chunk(tmp_path: Path) -> None:
    rows = [{"a": [{"b": "x"}]} for _ in range(12_345)]
    rows[11_110] = {"a": [{"b": ["x"]}]}
    (tmp_path / "d.jsonl").write_text(lines(rows))
    with pytest.raises(RefusedError, match=r"row 11111, column `a`"):
        load_rows(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/such/folder", "a/b/c", "runs/later"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(RefusedError, match="no such file or folder") as refused:
        load_rows(name)
    assert name in str(refused.value)
    assert ("README.md beside the preset" in str(refused.value)) == name.startswith("runs/")


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError, match=r"somebody/nothing.*hub"):
        load_rows("somebody/nothing")


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no split `test`, only `train`"):
        load_rows(to_jsonl(tmp_path), "test")


def test_a_folder_without_splits_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines(ROWS))
    with pytest.raises(RefusedError, match=r"pairs\.jsonl"):
        load_rows(str(tmp_path))
