"""What stands between a method's objective and its loop: rewards as published, warm-ups, filters, reasons to stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import make_tiny_model
from support.online_run import METHODS, evals, write_online_config
from support.recipe_run import final_weights, metrics, run_method
from support.rollouts import rollout

from llmrl.evaluation.intervals import wilson_interval
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import TokenSequence
from llmrl.objectives.value import ValueRegression
from llmrl.rollout.trajectory import RolloutGroup
from llmrl.trainers.online.metrics import heldout_metrics
from llmrl.trainers.online.run import turns_too_few

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
    assert run_method(method, config) == 1
    said = capsys.readouterr()
    assert "in 3 steps in a row" in said.out
    assert "4 steps in a row: all rollouts are equally good" in said.err
    assert (tmp_path / "run" / "checkpoints" / "step_4").exists()


BY_PROMPT = "def by_prompt(prompts, completions, **_):\n    return [float(len(p) % 2) for p in prompts]\n"


@pytest.mark.parametrize(
    ("method", "settings"),
    [("ppo", {}), ("rlsp", {"critic_warmup": 0}), ("loop", {"algorithm": "reinforce_plus_plus"}), ("loop", {})],
)
def test_rewards_that_differ_between_prompts_alone_teach_what_compares_the_step(
    tmp_path: Path, method: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With several samples a prompt, too: a critic learns from them, and so does whitening over the step."""
    (tmp_path / "by_prompt.py").write_text(BY_PROMPT)
    own = {"rewards": [f"{tmp_path / 'by_prompt.py'}:by_prompt"], "max_empty_steps": 2, "samples_per_prompt": 2}
    code = run_method(method, write_online_config(tmp_path, **own, max_steps=3, eval_rows=0, **settings))
    assert code == (0 if settings or method == "ppo" else 1)
    assert ("nothing could be learned" in capsys.readouterr().err) == (code == 1)


def test_steps_in_which_nothing_is_learned_are_counted_on_by_a_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "equal.py").write_text(EQUAL)
    own = {"rewards": [f"{tmp_path / 'equal.py'}:equal"], "max_empty_steps": 4, "save_steps": 2, "max_steps": 9}
    config = write_online_config(tmp_path, **own, eval_rows=0, save_total_limit=9)
    assert run_method("loop", config) == 1
    assert "nothing could be learned in 4 steps in a row" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    for done in (4, 5):  # from step 2; then from the last, whose next step is one too many already
        assert run_method("loop", config, "--resume_from_checkpoint", "latest") == 1
        assert f"nothing could be learned in {done} steps in a row" in capsys.readouterr().err
        assert sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1].name == f"step_{done}"


def test_dapo_judges_groups_before_it_punishes_length(tmp_path: Path) -> None:
    """With rewards that are all equal nothing is left to train on, however different the lengths are."""
    (tmp_path / "equal.py").write_text(EQUAL)
    config = write_online_config(
        tmp_path, rewards=[f"{tmp_path / 'equal.py'}:equal"], algorithm="dapo_clip", max_steps=1, eval_rows=0,
        prompts_per_step=2, max_completion_length=20,
    )  # fmt: skip
    assert run_method("loop", config) == 0
    assert metrics(tmp_path / "run")[0]["updates"] == 0


def sampled(run: Path, step: int = 1) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()]


def test_dapo_without_dynamic_sampling_trains_on_what_it_got(tmp_path: Path) -> None:
    (tmp_path / "equal.py").write_text(EQUAL)
    config = write_online_config(
        tmp_path, rewards=[f"{tmp_path / 'equal.py'}:equal"], algorithm="dapo_clip", max_steps=2, eval_rows=0,
        dynamic_sampling=False, overlong_buffer=0, max_completion_length=20,
    )  # fmt: skip
    assert run_method("loop", config) == 0
    for step, line in enumerate(metrics(tmp_path / "run"), 1):
        assert (line["rollouts"], line["frac_reward_zero_std"], line["updates"]) == (16, 1, 0)
        assert len({record["row"] for record in sampled(tmp_path / "run", step)}) == 4
        assert not any("penalty" in record for record in sampled(tmp_path / "run", step))


@pytest.mark.parametrize(("method", "buffer"), [("loop", 0.5), ("loop", 1.0), ("rlsp", 0.5), ("pf_ppo", 0.5)])
def test_an_overlong_buffer_punishes_long_answers_beside_the_reward(tmp_path: Path, method: str, buffer: float) -> None:
    """DAPO's Eq. 13 with L 20: of 0.5, 0 up to 10 tokens and -1/10 for each further one. Equal rewards teach then."""
    (tmp_path / "equal.py").write_text(EQUAL)
    config = write_online_config(
        tmp_path, rewards=[f"{tmp_path / 'equal.py'}:equal"], max_steps=1, eval_rows=0, max_completion_length=20,
        overlong_buffer=buffer,
    )  # fmt: skip
    assert run_method(method, config) == 0
    records = sampled(tmp_path / "run")
    free = 20 - 20 * buffer
    for record in records:
        expected = min((free - record["num_sampled"]) / (20 - free), 0.0)
        assert (record["reward"], record.get("penalty", 0.0)) == (0.0, pytest.approx(expected))
    assert len({record["num_sampled"] for record in records}) > 3
    assert min(record.get("penalty", 0.0) for record in records) < 0
    assert metrics(tmp_path / "run")[0]["updates"] >= 1


def test_held_out_rows_may_be_answered_several_times_at_a_temperature(tmp_path: Path) -> None:
    greedy = write_online_config(tmp_path, max_steps=1, eval_rows=6)
    assert run_method("loop", greedy, "--output_dir", str(tmp_path / "greedy")) == 0
    several = write_online_config(tmp_path, max_steps=1, eval_rows=6, eval_temperature=1.0, eval_samples=5)
    assert run_method("loop", several) == 0
    assert run_method("loop", several, "--output_dir", str(tmp_path / "again")) == 0
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "greedy")
    (one, *_), (found, *_) = evals(tmp_path / "greedy"), evals(tmp_path / "run")
    assert evals(tmp_path / "again")[0]["metrics"] == found["metrics"]
    assert (one["metrics"]["n"], found["metrics"]["n"]) == (6, 6)
    assert found["metrics"]["reward"] != one["metrics"]["reward"]
    assert "without_reward" not in found["metrics"]


def test_the_interval_of_several_answers_is_over_rows() -> None:
    """Rows of 1, 1, 0 and 0 in four answers each: four observations, and not sixteen."""
    rows = [[1.0] * 4, [1.0] * 4, [0.0] * 4, [0.0, 0.0, None, 0.0]]
    groups = [
        RolloutGroup(i + 1, {}, [rollout([], [], r, row=i + 1, sample=s) for s, r in enumerate(row)])
        for i, row in enumerate(rows)
    ]
    found = heldout_metrics(groups, 16)
    low, high = wilson_interval(2, 4)
    assert (found["reward"], found["n"], found["without_reward"]) == (0.5, 4, 1)
    assert (found["reward_interval_low"], found["reward_interval_high"]) == (low, high)


@pytest.mark.parametrize("words", ["red", "red blue"])
def test_a_stop_token_ends_answers_and_one_that_is_none_is_refused(
    tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_online_config(tmp_path, max_steps=1, eval_rows=0, stop_tokens=[words], max_completion_length=20)
    code = run_method("loop", config)
    if words != "red":
        assert code == 2
        assert "stop_tokens: 'red blue' is not one token" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        return
    assert "stop_tokens: 'red' stops where it is a token of its own" not in capsys.readouterr().out
    said = [record["messages"][0]["content"].split() for record in sampled(tmp_path / "run")]
    assert any(words and words[-1] == "red" for words in said)
    assert not any("red" in words[:-1] for words in said)


@pytest.mark.parametrize("options", [{}, {"guesses": 1}])
def test_one_turn_of_a_game_of_several_is_refused(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    game = {"dataset_name": None, "rewards": [], "environment": "number_guessing", "environment_options": options}
    code = run_method("loop", write_online_config(tmp_path, max_steps=1, eval_rows=0, max_empty_steps=5, **game))
    if options:
        assert code == 0
        return
    assert code == 2
    assert "rollout.max_turns 1 would cut it off after the first" in capsys.readouterr().err


def test_an_environment_that_always_goes_on_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS + EQUAL)
    own = {"environment": f"{tmp_path / 'endless.py'}:Endless", "rewards": [f"{tmp_path / 'endless.py'}:equal"]}
    config = write_online_config(tmp_path, max_steps=2, eval_rows=0, **own)
    assert run_method("loop", config) == 0
    said = capsys.readouterr().out
    assert said.count("is rollout.max_turns 1 meant?") == 1
    assert "after the last turn of 16 of 16 rollouts" in said
    assert "`multi_turn = True`" in said


@pytest.mark.parametrize(
    ("most", "cut", "too_few"), [(1, 16, True), (1, 15, False), (1, 0, False), (2, 31, False), (2, 32, True)]
)
def test_turns_are_too_few_where_all_rollouts_were_cut_off_or_half_after_one(
    most: int, cut: int, too_few: bool
) -> None:
    assert turns_too_few(cut, 32, most) is too_few
    assert not turns_too_few(0, 0, most)


ENDLESS = """
class Endless:
    def __init__(self, row, seed):
        self.row = row

    def init(self):
        return [{"role": "user", "content": self.row["prompt"]}]

    def step(self, message):
        return [{"role": "user", "content": "cat"}], False

    def close(self):
        pass
"""


@pytest.mark.parametrize("value_gradient", [False, True])
@pytest.mark.parametrize("method", ["ppo", "rlsp", "pf_ppo"])
def test_a_warm_up_of_the_critic_leaves_the_policy_as_it_was(tmp_path: Path, method: str, value_gradient: bool) -> None:
    settings = {"value_gradient": value_gradient, "weight_decay": 0.1, "critic_warmup": 2, "max_steps": 2}
    config = write_online_config(tmp_path, samples_per_prompt=5, eval_rows=0, **settings)
    assert run_method(method, config) == 0
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
