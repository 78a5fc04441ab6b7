"""Where rows come from: a hub id, a folder, a single file, or a `datasets` object.

Invariants: nothing is returned unless it has at least one row; whatever cannot be read raises `RefusedError` that names
the file (or hub id) and the remedy. Local files are read whole by every rank on its own, without a shared cache.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from llmrl.data.files import read_csv, read_json, read_jsonl
from llmrl.errors import RefusedError

READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": pq.read_table,
    ".csv": read_csv,
    ".jsonl.gz": read_jsonl,
    ".json.gz": read_json,
    ".csv.gz": read_csv,
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WRITTEN = "runs"
"""The folder in which presets look for what commands have written: never the owner of a hub dataset."""
WHO_WRITES = (
    f"what lies in {WRITTEN}/ is written by an earlier command: run the one that the README.md beside the preset gives "
    "for it, or check dataset_name"
)
SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev")}


@dataclass(frozen=True)
class Source:
    """The splits that a name offers; a split's rows are read when asked for. `names` are for messages."""

    names: dict[str, str]
    _readers: Mapping[str, Callable[[], Dataset]] = field(repr=False)

    def rows(self, split: str, wanted_by: str = "split") -> Dataset:
        """The rows of one split. Raises `RefusedError` if there is no such split or it is empty."""
        if split not in self._readers:
            offered = ", ".join(f"`{name}`" for name in self._readers)
            where = next(iter(self.names.values()))
            raise RefusedError(f"{where}: no split `{split}`, only {offered}; set {wanted_by} to one of them")
        rows = self._readers[split]()
        if len(rows) == 0:
            raise RefusedError(f"{self.names[split]}: empty, there is not one row in it; give a file that holds rows")
        return rows


def load_rows(dataset_name: str | Dataset | DatasetDict, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of one split of a hub id, folder, file or `datasets` object, as they are.

    A single file has only the split `train`. Raises `RefusedError` naming the file and line, or the hub id.
    """
    return find_source(dataset_name, config).rows(split)


def find_source(dataset: str | Dataset | DatasetDict, config: str | None = None) -> Source:
    """The splits of whatever the user named; raises `RefusedError` if there is nothing under the name."""
    if isinstance(dataset, Dataset):
        return Source({"train": "the dataset"}, {"train": partial(_itself, dataset)})
    if isinstance(dataset, Mapping):
        return _of_object(dataset, "the dataset")
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return Source({"train": str(path)}, {"train": partial(_read, path)})
    if _suffix(path) or path.parts[:1] == (WRITTEN,) or not HUB_ID.fullmatch(dataset):
        made = WHO_WRITES if path.parts[:1] == (WRITTEN,) else "check dataset_name"
        raise RefusedError(f"{dataset}: no such file or folder (looked from {Path.cwd()}); {made}")
    return _of_hub(dataset, config)


def _of_object(dataset: Mapping[str, Dataset], name: str) -> Source:
    readers = {split: partial(_itself, rows) for split, rows in dataset.items()}
    return Source({split: f"{name}, split {split}" for split in dataset}, readers)


def _itself(rows: Dataset) -> Dataset:
    return rows


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def _read(path: Path) -> Dataset:
    suffix = _suffix(path)
    if suffix is None:
        raise RefusedError(f"{path}: unknown kind of file; known are {', '.join(READERS)}")
    try:
        table = READERS[suffix](path)
    except (OSError, pa.ArrowException, EOFError) as error:
        raise RefusedError(f"{path}: cannot be read ({error}); it is damaged or not a {suffix} file") from None
    return Dataset(table)


def _of_folder(folder: Path) -> Source:
    """`datasets`' own `save_to_disk` layout, or files named after splits: train.jsonl, test-00000-of-00002.parquet."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        try:
            saved = load_from_disk(str(folder))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RefusedError(f"{folder}: a saved dataset that cannot be read ({error})") from None
        return _of_object(saved if isinstance(saved, DatasetDict) else {"train": saved}, str(folder))
    files = {}
    for split in ("train", "validation", "test"):
        found = [f for name in SPLIT_ALIASES.get(split, (split,)) for f in _files_of(folder, name)]
        if found:
            files[split] = found
    if not files:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise RefusedError(
            f"{folder}: no file named after a split, such as train.jsonl or train.parquet (there is {there}); "
            "rename the files or give dataset_name one file"
        )
    names = {split: str(found[0] if len(found) == 1 else found[0].parent) for split, found in files.items()}
    return Source(names, {split: partial(_read_all, found) for split, found in files.items()})


def _files_of(folder: Path, split: str) -> list[Path]:
    places = [f for place in (folder, folder / "data") if place.is_dir() for f in sorted(place.iterdir())]
    return [
        f for f in places if _suffix(f) and re.fullmatch(rf"{split}([-_.]\d[^.]*)?", f.name[: -len(_suffix(f) or "")])
    ]


def _read_all(files: list[Path]) -> Dataset:
    if len(files) == 1:
        return _read(files[0])
    try:
        return Dataset(pa.concat_tables([_read(f).data.table for f in files], promote_options="permissive"))
    except pa.ArrowException as error:
        raise RefusedError(
            f"{files[0].parent}: the files of one split do not have the same columns ({error})"
        ) from None


def _of_hub(name: str, config: str | None) -> Source:
    try:
        loaded = load_dataset(name, config)
    except (DatasetNotFoundError, ConnectionError, HfHubHTTPError, FileNotFoundError) as error:
        raise RefusedError(
            f"{name}: neither a file or folder here nor to be had from the hub ({_first_line(error)}); "
            "check dataset_name, the network, and for a gated dataset your hub login"
        ) from None
    except (ValueError, pa.ArrowException, OSError) as error:
        raise RefusedError(f"{name}: the hub dataset cannot be loaded ({_first_line(error)})") from None
    return _of_object(loaded, name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
