"""What is wrong is said before training starts, with the place and the remedy, and nothing is left behind."""

import gc
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.recipe_run import make_pairs, run_method, write_config
from transformers import AutoTokenizer

run = partial(run_method, "dpo")


def refusal(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    assert run(config, *arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_data_problems_are_refused_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in make_pairs(tmp_path / "good.jsonl").read_text().splitlines()]
    cases: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
        "missing": ([{k: v for k, v in row.items() if k != "rejected"} for row in rows], ["rejected", "missing.jsonl"]),
        "empty": ([*rows[:2], {**rows[2], "chosen": ""}], ["chosen", "row 3"]),
        "same": ([*rows[:4], {**rows[4], "rejected": rows[4]["chosen"]}], ["row 5"]),
        "long": ([{**rows[0], "prompt": "red " * 300}, *rows[1:]], ["row 1", "max_length"]),
    }
    for name, (bad, words) in cases.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in bad))
        config = write_config(tmp_path, dataset_name=str(file), max_length=200)
        message = refusal(capsys, config)
        assert all(word in message for word in words), message
        assert not (tmp_path / "run").exists()


def test_no_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    message = [{"role": "user", "content": "one"}]
    row = {
        "prompt": message,
        "chosen": [{"role": "assistant", "content": "red"}],
        "rejected": [{"role": "assistant", "content": "dog"}],
    }
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 20)
    assert "chat template" in refusal(capsys, config)


def test_vocabulary_mismatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens([f"further{i}" for i in range(5)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert "do not belong together" in refusal(capsys, config)


def test_no_end_of_sequence_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    settings = tmp_path / "model" / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "eos_token"}
    settings.write_text(json.dumps(kept))
    assert "end-of-sequence" in refusal(capsys, config)


def test_no_pad_token_is_no_obstacle(tmp_path: Path) -> None:
    """Nothing here is found by the pad id: the tree has no padding and padded rows are masked by position."""
    config = write_config(tmp_path, max_steps=2)
    settings = tmp_path / "model" / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "pad_token"}
    settings.write_text(json.dumps(kept))
    assert run(config) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rte", "1e-4"], ["learning_rte", "learning_rate"]),
        (["--beta", "strong"], ["beta", "strong"]),
        (["--reference", "adapter_off"], ["use_peft"]),
        (["--loss_type", "ipo", "--label_smoothing", "0.1"], ["label_smoothing", "ipo"]),
        (["--form", "tree", "--attn_implementation", "eager"], ["attn_implementation"]),
        (["--model_name_or_path", "/nowhere/no_model"], ["no_model"]),
        (["--use_peft", "--lora_target_modules", "q_proj,lm_head"], ["lm_head"]),
    ],
)
def test_configuration_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    message = refusal(capsys, write_config(tmp_path), *arguments)
    assert all(word in message for word in words), message


def test_another_run_in_the_directory_and_changed_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, max_steps=2, save_steps=1)
    assert run(config) == 0
    capsys.readouterr()
    assert "--resume_from_checkpoint" in refusal(capsys, config)
    assert "beta" in refusal(capsys, config, "--resume_from_checkpoint", "latest", "--beta", "0.5")
    make_pairs(tmp_path / "pairs.jsonl", seed=1)
    assert "dataset has changed" in refusal(capsys, config, "--resume_from_checkpoint", "latest")


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        config = write_config(
            tmp_path, output_dir=str(small / "run"), save_steps=1, save_total_limit=None, max_steps=20
        )
        assert run(config) == 1
        message = capsys.readouterr().err
        assert "checkpoint" in message
        assert "is whole" in message
        from llmrl.runs import checkpoints

        newest = checkpoints.latest(small / "run")
        assert newest is not None
        assert not list((small / "run" / "checkpoints").glob(".tmp_*"))
    finally:
        gc.collect()  # the failure's traceback still holds the file that could not be written
        subprocess.run(["umount", str(small)], check=True)
        shutil.rmtree(small)
