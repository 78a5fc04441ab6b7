"""A reward model in a run: it reads the dialogue that the policy saw, though the row's prompt is text."""

import json
from pathlib import Path

import pytest
import torch
from support.models import make_tiny_model
from support.online_run import run_online, write_online_config
from support.recipe_run import metrics
from support.words import word_tokenizer
from transformers import AutoModelForSequenceClassification

from llmrl.rewards.model import score


def test_rollouts_have_the_models_scores_of_their_dialogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrl.runs.report.write_report", lambda *arguments, **named: None)
    make_tiny_model(eos_token_id=2).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model.save_pretrained(tmp_path / "liked")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "liked")
    config = write_online_config(
        tmp_path, samples_per_prompt=1, prompts_per_step=8, eval_rows=0, max_steps=1,
        rewards=[{"function": str(tmp_path / "liked"), "options": {"batch_size": 4, "wait_seconds": 0.1}}],
    )  # fmt: skip
    assert run_online("ppo", config) == 0
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    asked = [[{"role": "user", "content": rows[rollout["row"] - 1]}, *rollout["messages"]] for rollout in rollouts]
    ids = [tokenizer.apply_chat_template(dialogue, return_dict=False) for dialogue in asked]
    expected = score(model, ids, tokenizer.pad_token_id).tolist()
    assert [rollout["scores"]["liked"] for rollout in rollouts] == pytest.approx(expected, abs=1e-5)
    assert metrics(tmp_path / "run")[0]["reward"] == pytest.approx(sum(expected) / 8, abs=1e-5)
