"""Rows of an environment of one's own: which are used, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.online_run import write_online_config

from llmrl.errors import RefusedError
from llmrl.trainers.loop import LOOPConfig
from llmrl.trainers.online.task import OnlineTask

SUMS = """
class Sums:
    def __init__(self, row, seed):
        self.number = row["number"]

    def init(self):
        return [{"role": "user", "content": str(self.number)}]

    def step(self, message):
        return [], True, {"right": 1.0}

    def close(self):
        pass

    @staticmethod
    def rows(split, count, seed):
        return [{"number": number} for number in (range(5) if split == "train" else range(3, 9))]
"""


def task(tmp_path: Path, **settings: Any) -> tuple[OnlineTask, list[str]]:
    (tmp_path / "sums.py").write_text(SUMS)
    own = {"environment": f"{tmp_path / 'sums.py'}:Sums", "rewards": [], **settings}
    config = LOOPConfig(**yaml.safe_load(write_online_config(tmp_path, **own).read_text()))
    said: list[str] = []
    return OnlineTask(config, said.append, None, config.resolve().overlong_buffer), said


def test_rows_of_the_environments_own_that_are_in_both_splits_are_counted(tmp_path: Path) -> None:
    made, said = task(tmp_path, dataset_name=None)
    assert (len(made.data.train), len(made.data.heldout)) == (5, 6)
    assert sum("2 of 6 held-out rows are also trained on" in line for line in said) == 1


def test_a_data_set_beside_rows_of_the_environments_own_is_refused_with_the_way_to_use_these(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError,
        match=r"row 1, the environment .* does not begin: KeyError: 'number'.*rows of its own, which --dataset_name",
    ):
        task(tmp_path)


def test_how_many_of_the_held_out_rows_are_evaluated_is_said(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for split, count in (("train", 4), ("test", 3)):
        (rows / f"{split}.jsonl").write_text("".join(f'{{"number": {i}}}\n' for i in range(count)))
    made, said = task(tmp_path, dataset_name=str(rows), eval_rows=2)
    assert len(made.data.heldout) == 2
    assert sum("the first 2 of the held-out rows are evaluated (eval_rows)" in line for line in said) == 1
