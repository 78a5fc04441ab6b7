"""A disk that is full while TRL writes a checkpoint: the one before stays whole and the message says so."""

from pathlib import Path

import pytest
import yaml
from support.forked import finish
from support.recipe_run import make_model

from llmrl.runs import checkpoints

pytestmark = pytest.mark.slow
DISK_MEGABYTES = 2


def test_the_checkpoint_before_is_whole(tmp_path: Path, small_disk: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "red cat", "completion": " blue dog"}\n' * 20)
    config = {
        "model_name_or_path": str(make_model(tmp_path / "model")),
        "dataset_name": str(rows),
        "output_dir": str(small_disk / "run"),
        "max_steps": 40,
        "sequences_per_step": 4,
        "max_length": 32,
        "eval_rows": 0,
        "save_steps": 1,
        "save_total_limit": None,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = finish("sft", tmp_path / "config.yaml", code=1)
    intact = checkpoints.latest(small_disk / "run")
    assert intact is not None
    assert f"{intact} is whole" in said
    assert "--resume_from_checkpoint latest" in said
    assert not (small_disk / "run" / "checkpoints" / ".trl").exists()
