"""The DPO policies that credit.py and beam_width.py look at, trained by the recipe's own command where they are not yet
in `folder`."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "dpo_policies"


@dataclass(frozen=True)
class Trained:
    """How a policy is trained. reference: what it was trained from; None where it is a LoRA adapter on it."""

    title: str
    reference: str | None
    arguments: str


POLICIES = {
    "starter": Trained("starter, DPO of all weights", "starter", "--config recipes/dpo/tiny.yaml"),
    "smollm2": Trained(
        "SmolLM2-135M-Instruct, DPO of a LoRA adapter",
        None,
        "--config recipes/dpo/laptop.yaml --dataset_name data/arithmetic/pairs/train.jsonl --max_steps 16 "
        "--pairs_per_step 8 --max_length 256 --learning_rate 1e-4 --save_steps 4 --eval_rows 0",
    ),
}


def command(name: str, output_dir: Path | str) -> list[str]:
    """The command that trains a policy, without the interpreter."""
    words = ["--config_file", "launch/accelerate/cpu.yaml", "recipes/dpo/run.py"]
    return [*words, *shlex.split(POLICIES[name].arguments), "--output_dir", str(output_dir)]


def policy(name: str, folder: Path) -> Path:
    """The folder of a trained policy."""
    run = folder / name
    summary = run / "summary.json"
    if not summary.exists() or json.loads(summary.read_text()).get("status") != "completed":
        words = [sys.executable, "-m", "accelerate.commands.launch", *command(name, run)]
        resumed = ["--resume_from_checkpoint", "latest"] if run.exists() else []
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        subprocess.run([*words, *resumed], cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    return run / "final"
