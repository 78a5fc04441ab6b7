"""Online recipes on a small scale: a random word-level model that is paid for saying colours and small numbers."""

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from support.recipe_run import make_model
from support.words import WORDS

from llmrl.trainers import loop, pf_ppo, ppo, rlsp

METHODS: dict[str, ModuleType] = {"loop": loop, "ppo": ppo, "rlsp": rlsp, "pf_ppo": pf_ppo}
REWARD = '''
from llmrl.rewards.texts import text_of

def paid(completions, **columns):
    """Share of the six words that come first in the vocabulary."""
    said = [text_of(completion).split() for completion in completions]
    paid = {"red", "green", "blue", "one", "two", "three"}
    return [sum(word in paid for word in words) / max(len(words), 4) for words in said]
'''
SLEEPY = (
    REWARD
    + """
import os, time
calls = 0

def sleepy(completions, **columns):
    global calls
    calls += 1
    if os.environ.get("RANK", "0") == "0" and calls == CALL and not os.path.exists("AWAKE"):
        open("AWAKE", "w").close()
        time.sleep(300)
    return paid(completions)
"""
)


def write_online_config(tmp: Path, name: str = "config.yaml", **settings: Any) -> Path:
    """A configuration in `tmp`, beside the model, the prompts and the reward that it names."""
    if not (tmp / "model").exists():
        make_model(tmp / "model")
    if not (tmp / "prompts.jsonl").exists():
        draw = random.Random(0)
        rows = [{"prompt": " ".join(draw.choices(WORDS, k=3)), "answer": "1"} for _ in range(64)]
        (tmp / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (tmp / "reward.py").exists():
        (tmp / "reward.py").write_text(REWARD)
    base = {
        "model_name_or_path": str(tmp / "model"),
        "dataset_name": str(tmp / "prompts.jsonl"),
        "output_dir": str(tmp / "run"),
        "rewards": [f"{tmp / 'reward.py'}:paid"],
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",  # a published warm-up would leave the first of a few steps without a rate
        "warmup_ratio": 0,
        "max_steps": 4,
        "eval_rows": 6,
    }
    given = {key: value for key, value in {**base, **settings}.items() if value is not None}
    file = tmp / name
    file.write_text(yaml.safe_dump(given))
    return file


def evals(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "evals.json").read_text())


def sleepy_config(tmp_path: Path, call: int, **settings: Any) -> Path:
    """The first process's reward function sleeps in this call, in a thread that nobody can end; it does so once."""
    file = tmp_path / "reward.py"
    file.write_text(SLEEPY.replace("AWAKE", str(tmp_path / "awake")).replace("CALL", str(call)))
    return write_online_config(tmp_path, rewards=[f"{file}:sleepy"], reward_timeout_seconds=600.0, **settings)
