"""What stands between a method's objective and its loop: rewards as published, warm-ups, filters, reasons to stop."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.models import make_tiny_model
from support.online_run import METHODS, run_online, write_online_config
from support.recipe_run import final_weights, metrics

from llmrl.learner.learner import Learner, LearnerOptions
from llmrl.learner.sequences import TokenSequence
from llmrl.objectives.value import ValueRegression
from llmrl.rewards.scoring import Scorer
from llmrl.trainers.rlsp import RLSPConfig


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes longer than a short run's training."""
    monkeypatch.setattr("llmrl.runs.report.write_report", lambda *arguments, **named: None)


def rlsp(**settings: Any) -> RLSPConfig:
    return RLSPConfig(model_name_or_path="starter", output_dir="unused", dataset_name="unused", **settings)


def total(config: RLSPConfig, text: str, tokens: int) -> float:
    scorer = Scorer(config.reward_keys(), lambda said: None)
    try:
        said = [[{"role": "assistant", "content": text}]]
        found = asyncio.run(scorer.score([[]], said, [list(range(tokens))], {"answer": ["10"]}))
    finally:
        scorer.close()
    assert found.totals_S[0] is not None
    return found.totals_S[0]


@pytest.mark.parametrize(
    ("text", "tokens", "paper", "code"),
    [
        (r"\boxed{10}" + " " * 4, 500, 0.8 - 0.2 * 1000 / 500, None),  # T1: V 1, n 500
        ("x" * 400 + r"\boxed{9}", 4000, -0.2 * 1000 / 4000, 0 - 1000 / 100),
        (
            "x" * 380 + "the answer is 10",
            4096,
            0.8 - 0.2 * 1000 / 4096,
            -0.5 - 1000 / 99,
        ),  # no box: -0.5, although right
        ("x" * 400 + r"\boxed{10}", 4000, 0.8 - 0.2 * 1000 / 4000, 1 - 1000 / 100),
    ],
)
def test_rlsp_builds_the_rewards_of_paper_and_code(text: str, tokens: int, paper: float, code: float | None) -> None:
    """rlsp.md section 3: alpha V + (1 - alpha)(-C/n) in the paper; V (-0.5 without a box) - C/n', n' characters / 4."""
    assert total(rlsp(verifier="correct_number"), text, tokens) == pytest.approx(paper)
    if code is not None:
        assert total(rlsp(verifier="correct_number", form_of_reward="code"), text, tokens) == pytest.approx(code)


def test_rlsp_alpha_counts_in_a_runs_own_config_and_is_refused_beside_other_rewards(tmp_path: Path) -> None:
    stored = rlsp(alpha=0.8).model_dump(exclude_unset=False)
    again = RLSPConfig(**{**stored, "alpha": 0.5})
    assert [entry.weight for entry in again.reward_keys().rewards] == [0.5, 0.5]
    with pytest.raises(ValidationError, match="alpha would be ignored"):
        rlsp(alpha=0.5, rewards=["correct_number"])
    with pytest.raises(ValidationError, match="exact_match"):
        rlsp(form_of_reward="code", verifier="exact_match")


EQUAL = "def equal(completions, **columns):\n    return [0.0] * len(completions)\n"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("loop", {"entropy_coef": 0.01}),
        ("loop", {"algorithm": "grpo"}),
        ("ppo", {"samples_per_prompt": 1}),
        ("pf_ppo", {"samples_per_prompt": 5}),
        ("rlsp", {"critic_warmup": 0}),
    ],
)
def test_rewards_that_tell_nothing_apart_end_a_run_of_any_method(
    tmp_path: Path, method: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "equal.py").write_text(EQUAL)
    rewards = [f"{tmp_path / 'equal.py'}:equal"]
    config = write_online_config(tmp_path, rewards=rewards, max_empty_steps=4, max_steps=9, eval_rows=0, **settings)
    assert run_online(method, config) == 1
    said = capsys.readouterr()
    assert "in 3 steps in a row" in said.out
    assert "4 steps in a row: all rollouts are equally good" in said.err
    assert (tmp_path / "run" / "checkpoints" / "step_4").exists()


def test_dapo_judges_groups_before_it_punishes_length(tmp_path: Path) -> None:
    """With rewards that are all equal nothing is left to train on, however different the lengths are."""
    (tmp_path / "equal.py").write_text(EQUAL)
    config = write_online_config(
        tmp_path, rewards=[f"{tmp_path / 'equal.py'}:equal"], algorithm="dapo_clip", max_steps=1, eval_rows=0,
        prompts_per_step=2, max_completion_length=20,
    )  # fmt: skip
    assert run_online("loop", config) == 0
    assert metrics(tmp_path / "run")[0]["updates"] == 0


@pytest.mark.parametrize("value_gradient", [False, True])
@pytest.mark.parametrize("method", ["ppo", "rlsp", "pf_ppo"])
def test_a_warm_up_of_the_critic_leaves_the_policy_as_it_was(tmp_path: Path, method: str, value_gradient: bool) -> None:
    settings = {"value_gradient": value_gradient, "weight_decay": 0.1, "critic_warmup": 2, "max_steps": 2}
    config = write_online_config(tmp_path, samples_per_prompt=5, eval_rows=0, **settings)
    assert run_online(method, config) == 0
    trained, before = final_weights(tmp_path / "run"), (tmp_path / "model" / "model.safetensors").read_bytes()
    assert trained["model.safetensors"] == before
    assert METHODS[method].Config.model_fields["critic_warmup"].default is None


def test_a_critic_that_is_far_off_does_not_shorten_the_policys_gradient() -> None:
    """Clipping counts the value head apart where its loss does not reach the language model."""

    def moved(returns: float) -> tuple[float, float]:
        learner = Learner(
            make_tiny_model(), LearnerOptions(1e-3, value_head=True, value_gradient=False, max_grad_norm=0.5)
        )
        ids, scored = np.arange(5, 13), np.arange(8) >= 4
        numbers = {"returns": np.full(4, returns, np.float32), "old_values": np.zeros(4, np.float32)}
        group = (TokenSequence(ids, scored, token_values=numbers),)
        value = ValueRegression(None)

        def loss(logprobs_N: torch.Tensor, scored: Any) -> Any:
            of_value, _ = value(logprobs_N, scored)
            return of_value - logprobs_N.sum(), {}

        norms = []
        step = learner.optimizer.step
        learner.optimizer.step = lambda *a, **k: (  # type: ignore[method-assign]
            norms.append(torch.cat([p.grad.flatten() for p in learner.causal_lm.parameters()]).norm()),
            step(*a, **k),
        )[1]
        from llmrl.objectives.scored import Objective

        found = learner.update([group], Objective(loss))
        return float(norms[0]), found["grad_norm"]

    near, far = moved(0.1), moved(1000.0)
    assert near[0] == pytest.approx(0.5, rel=1e-4)
    assert far == pytest.approx(near)
