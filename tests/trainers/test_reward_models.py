"""A reward model in a run: it reads the dialogue that the policy saw, though the row's prompt is text."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_tiny_model
from support.online_run import write_online_config
from support.recipe_run import metrics, run_method
from support.words import word_tokenizer
from transformers import AutoModelForSequenceClassification

from llmrl.errors import RefusedError
from llmrl.rewards.keys import RewardKeys
from llmrl.rewards.model import score
from llmrl.rewards.scoring import Scorer, Scores
from llmrl.trainers.rlsp import RLSPConfig


@pytest.fixture
def liked(tmp_path: Path) -> Path:
    """A reward model."""
    make_tiny_model(eos_token_id=2).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(100)  # far from [0, 1]
    model.save_pretrained(tmp_path / "liked")
    word_tokenizer().save_pretrained(tmp_path / "liked")
    return tmp_path / "liked"


def judged_by(model: Path, **options: Any) -> RLSPConfig:
    judge = {"function": str(model), "options": options}
    return RLSPConfig(model_name_or_path="starter", output_dir="x", dataset_name="x", alpha=0.5, judge=judge)


def test_a_reward_model_judges_within_0_and_1_or_not_at_all(liked: Path) -> None:
    """It is a judge of RLSP's through a sigmoid; its own scores, of any size, would outweigh the verifier."""
    with pytest.raises(RefusedError, match=r"judge: a reward model's scores are of any size.*its option sigmoid, true"):
        Scorer(judged_by(liked).reward_keys(), print)

    def scores(keys: RewardKeys) -> Scores:
        scorer = Scorer(keys, print)
        found = asyncio.run(scorer.score(["cat"] * 2, ["red blue", "one two three"], [[5], [5]], {"answer": ["1"] * 2}))
        scorer.close()
        return found

    (logits,) = scores(RewardKeys(rewards=[{"function": str(liked)}])).by_function.values()
    found = scores(judged_by(liked, sigmoid=True).reward_keys())
    expected = [1 / (1 + math.exp(-logit)) for logit in logits if logit is not None]
    assert any(abs(logit) > 1 for logit in logits if logit is not None)
    assert found.by_function["judge"] == pytest.approx(expected, abs=1e-6)
    assert found.totals_S == pytest.approx([0.5 * one for one in expected], abs=1e-6)


def test_rollouts_have_the_models_scores_of_their_dialogues(tmp_path: Path) -> None:
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
    assert run_method("ppo", config) == 0
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    asked = [[{"role": "user", "content": rows[rollout["row"] - 1]}, *rollout["messages"]] for rollout in rollouts]
    ids = [tokenizer.apply_chat_template(dialogue, return_dict=False) for dialogue in asked]
    expected = score(model, ids, tokenizer.pad_token_id).tolist()
    assert [rollout["scores"]["liked"] for rollout in rollouts] == pytest.approx(expected, abs=1e-5)
    assert metrics(tmp_path / "run")[0]["reward"] == pytest.approx(sum(expected) / 8, abs=1e-5)
