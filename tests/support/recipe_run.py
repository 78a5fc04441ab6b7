"""Recipes as users run them, on a small scale: a random word-level model, pairs that it can learn, the launcher."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from support.models import make_tiny_model
from support.words import WORDS, word_tokenizer

from llmrl.runs.launch import run_command
from llmrl.trainers import METHODS

ROOT = Path(__file__).resolve().parents[2]


def make_model(folder: Path) -> Path:
    """A tiny random Llama with the word tokenizer, as a folder."""
    tokenizer = word_tokenizer()
    make_tiny_model(vocab_size=len(tokenizer), scale=1.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pairs(file: Path, count: int = 60, seed: int = 0) -> Path:
    """Chosen answers use the first words of the vocabulary, rejected ones the others."""
    draw = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(3, 12))),
            "chosen": " " + " ".join(draw.choices(WORDS[:6], k=4)),
            "rejected": " " + " ".join(draw.choices(WORDS[6:], k=5)),
        }
        for _ in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_config(tmp: Path, **settings: Any) -> Path:
    """config.yaml in `tmp`, beside the model and the pairs that it names."""
    if not (tmp / "model").exists():
        make_model(tmp / "model")
    if not (tmp / "pairs.jsonl").exists():
        make_pairs(tmp / "pairs.jsonl")
    base = {
        "model_name_or_path": str(tmp / "model"),
        "dataset_name": str(tmp / "pairs.jsonl"),
        "output_dir": str(tmp / "run"),
        "learning_rate": 1e-3,
        "max_steps": 8,
        "pairs_per_step": 4,
        "eval_rows": 6,
    }
    file = tmp / "config.yaml"
    file.write_text(yaml.safe_dump({**base, **settings}))
    return file


def launch_command(recipe: str, launcher: str, *arguments: str) -> list[str]:
    """`accelerate launch` of a recipe with one of the project's launch files."""
    config = str(ROOT / "launch" / "accelerate" / f"{launcher}.yaml")
    script = str(ROOT / "recipes" / recipe / "run.py")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, script, *arguments]


def run_method(method: str, config: Path, *words: str) -> int:
    """Run a method in this process, as its recipe does; returns the exit code."""
    module = import_module(METHODS[method])
    return run_command(module.Config, module.describe, module.train, ["--config", str(config), *words])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def launch(recipe: str, launcher: str, *arguments: str, timeout: int = 500) -> "subprocess.CompletedProcess[str]":
    """Run to its end."""
    return subprocess.run(
        launch_command(recipe, launcher, *arguments),
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def wait_for(happened: Callable[[], bool], works: Callable[[], bool] = lambda: True, seconds: float = 240) -> None:
    """Until it has; fails if it does not, or if what it waits for does not work any more."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        assert works(), "the run ended before it happened"
        time.sleep(0.05)


def final_weights(run: Path) -> dict[str, bytes]:
    """The bytes of what a run trained."""
    return {file.name: file.read_bytes() for file in sorted((run / "final").glob("*.safetensors"))}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
