"""The sft and reward recipes as a user runs them: whole runs, kills, signals, two processes, adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from support.forked import finish, interrupted, kill_after_a_checkpoint
from support.recipe_run import final_weights, launch, make_model, make_pairs, metrics
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.slow


def write_config(tmp: Path, recipe: str, **settings: Any) -> Path:
    """config.yaml in `tmp`, beside the model and the data that it names."""
    make_model(tmp / "model")
    pairs = [json.loads(line) for line in make_pairs(tmp / "pairs.jsonl").read_text().splitlines()]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "model_name_or_path": str(tmp / "model"),
        "dataset_name": str(tmp / ("rows.jsonl" if recipe == "sft" else "pairs.jsonl")),
        "output_dir": str(tmp / "run"),
        "learning_rate": 1e-2,
        "max_steps": 10,
        "sequences_per_step" if recipe == "sft" else "pairs_per_step": 4,
        "max_length": 64,
        "eval_rows": 6,
    }
    file = tmp / "config.yaml"
    file.write_text(yaml.safe_dump({**base, **settings}))
    return file


@pytest.mark.parametrize("recipe", ["sft", "reward"])
def test_a_whole_run_learns_and_its_own_config_repeats_it(tmp_path: Path, recipe: str) -> None:
    config = write_config(tmp_path, recipe, eval_steps=5)
    done = launch(recipe, "cpu", "--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["num_tokens"] > 0 and line["learning_rate"] >= 0 and line["grad_norm"] > 0 for line in lines)
    evals = json.loads((run / "evals.json").read_text())
    assert [entry["step"] for entry in evals] == [0, 5, 10]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["num_tokens"] == lines[-1]["num_tokens"]
    assert summary["eval_after"]["heldout"]["loss"] < summary["eval_before"]["heldout"]["loss"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_10"]
    kind = AutoModelForCausalLM if recipe == "sft" else AutoModelForSequenceClassification
    kind.from_pretrained(run / "final")
    AutoTokenizer.from_pretrained(run / "final")
    # Evaluating more seldom must not change what is trained.
    finish(recipe, run / "config.yaml", "--output_dir", str(tmp_path / "again"), "--eval_steps", "0")
    assert final_weights(tmp_path / "again") == final_weights(run)


@pytest.mark.parametrize(
    ("recipe", "use_peft"), [("sft", True), ("reward", False)], ids=["sft-lora", "reward-all-weights"]
)
def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path: Path, recipe: str, use_peft: bool) -> None:
    config = write_config(tmp_path, recipe, use_peft=use_peft, save_steps=2, max_steps=40, lora_dropout=0.1)
    finish(recipe, config, "--output_dir", str(tmp_path / "reference"))
    kill_after_a_checkpoint(recipe, config, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    finish(recipe, config, "--resume_from_checkpoint", "latest")
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "reference")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "reference")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_38", "step_40"]


def test_a_run_that_was_killed_after_its_last_step_only_finishes(tmp_path: Path) -> None:
    config = write_config(tmp_path, "sft")
    finish("sft", config)
    expected = final_weights(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "final").rename(tmp_path / "kept")
    finish("sft", config, "--resume_from_checkpoint", "latest")
    assert final_weights(tmp_path / "run") == expected
    assert len(metrics(tmp_path / "run")) == 10
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_a_signal_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path, "sft", max_steps=100_000)
    summary = interrupted("sft", config, tmp_path / "run")
    assert summary["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"step_{summary['steps']}" / "manifest.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / ".trl").exists()


@pytest.mark.parametrize(("recipe", "launcher"), [("sft", "cpu_ddp"), ("sft", "cpu_zero3"), ("reward", "cpu_ddp")])
def test_two_processes_follow_the_curve_of_one(tmp_path: Path, recipe: str, launcher: str) -> None:
    """The same rows make a step however many processes share them, so the losses agree; and nothing is compiled."""
    config = write_config(tmp_path, recipe, max_steps=3, learning_rate=1e-3)
    finish(recipe, config)
    extensions = tmp_path / "extensions"
    where = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    finish(recipe, config, "--output_dir", str(tmp_path / "two"), launcher=launcher, environment=where)
    assert not extensions.exists()
    alone, two = metrics(tmp_path / "run"), metrics(tmp_path / "two")
    assert [line["num_tokens"] for line in two] == [line["num_tokens"] for line in alone]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in alone], abs=1e-4)


def test_an_adapter_alone_or_merged_is_the_same_policy(tmp_path: Path) -> None:
    config = write_config(tmp_path, "sft", use_peft=True, lora_r=4)
    finish("sft", config)
    finish("sft", config, "--output_dir", str(tmp_path / "merged"), "--merge_adapter")
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "final").eval()
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(adapter(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
        assert float((base - merged(ids).logits).abs().max()) > 1e-2


def test_prompts_without_room_for_an_answer_are_refused_or_counted(tmp_path: Path) -> None:
    config = write_config(tmp_path, "sft", max_steps=2)
    rows = tmp_path / "rows.jsonl"
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "red cat " * 40, "completion": " blue"}) + "\n")
    assert "no room for an answer" in finish("sft", config, code=2)
    assert not (tmp_path / "run").exists()
    said = finish("sft", config, "--overlong_prompts", "drop")
    assert "rows dropped: their prompts leave no room" in said
