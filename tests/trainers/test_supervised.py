"""Batch arithmetic and configuration of the recipes that TRL's trainers train."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.recipe_run import make_model, make_pairs

from llmrl.errors import RefusedError
from llmrl.trainers import reward, sft
from llmrl.trainers.with_trl.supervised import step_parts

BASE = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 100))
def test_parts_multiply_to_the_step_and_fit(share, world_size, rows_that_fit):
    rows, passes = step_parts("sequences_per_step", share * world_size, world_size, rows_that_fit)
    assert rows * passes * world_size == share * world_size
    assert 1 <= rows <= max(rows_that_fit, 1)
    assert not [n for n in range(rows + 1, min(rows_that_fit, share) + 1) if share % n == 0]


@pytest.mark.parametrize(("per_step", "remedy"), [(6, "use 4 or 8"), (3, "use 4$"), (9, "use 8 or 12")])
def test_steps_that_processes_cannot_share(per_step, remedy):
    with pytest.raises(RefusedError, match=f"pairs_per_step {per_step} .* 4 processes; {remedy}"):
        step_parts("pairs_per_step", per_step, 4, 8)


def test_descriptions_carry_the_arithmetic():
    config = sft.SFTConfig(**BASE, sequences_per_step=32, max_length=256, tokens_per_microbatch=2048, max_steps=5)
    described = sft.describe(config, 2)
    assert described["sequences per step"] == "32 = 2 processes x 2 forward passes x 8 sequences"
    assert described["optimizer steps"] == "5, 160 sequences"
    pairs = reward.RewardConfig(**BASE, pairs_per_step=32, max_length=256, tokens_per_microbatch=2048)
    assert reward.describe(pairs, 1)["pairs per step"] == "32 = 1 processes x 8 forward passes x 4 pairs"


def test_a_reward_model_refuses_or_drops_faulty_pairs_as_the_methods_of_pairs_do(tmp_path: Path) -> None:
    file = make_pairs(tmp_path / "pairs.jsonl", 4)
    file.write_text(file.read_text() + json.dumps({"prompt": "red", "chosen": "", "rejected": " dog"}) + "\n")
    model = str(make_model(tmp_path / "model"))
    own = {**BASE, "model_name_or_path": model, "dataset_name": str(file), "eval_rows": 0, "max_steps": 1}
    with pytest.raises(RefusedError, match=r"pairs\.jsonl, row 5, column `chosen`: an empty completion"):
        reward.check(reward.RewardConfig(**own))
    said = reward.check(reward.RewardConfig(**own, faulty_rows="drop"))
    assert "data: 4 of 5 pairs kept, 4 to train on: 1 rows dropped as faulty" in said


@pytest.mark.parametrize(
    ("config_type", "settings", "words"),
    [
        (sft.SFTConfig, {"packing": True}, "flash_attention"),
        (sft.SFTConfig, {"merge_adapter": True}, "use_peft"),
        (reward.RewardConfig, {"merge_adapter": True}, "use_peft"),
    ],
)
def test_combinations_that_mean_nothing(config_type, settings, words):
    with pytest.raises(ValidationError, match=words):
        config_type(**BASE, **settings)
