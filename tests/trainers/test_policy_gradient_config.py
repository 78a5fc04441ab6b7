"""From keys to the algorithm in force: presets are the published ones, keys change what they say, none is ignored."""

from typing import Any

import pytest
from pydantic import ValidationError
from support.online_run import METHODS

from llmrl.objectives.presets import PRESETS, preset
from llmrl.trainers.online.experience import _near
from llmrl.trainers.online.policy_gradient_config import PolicyGradientConfig

OF_CRITICS = ("ppo", "rlsp", "pf_ppo")


def config(algorithm: str, **settings: Any) -> PolicyGradientConfig:
    """16 prompts x 8 samples; `algorithm` is a method where it has a critic."""
    method = algorithm if algorithm in OF_CRITICS else "loop"
    own = {} if method != "loop" else {"algorithm": algorithm}
    base = {"model_name_or_path": "starter", "dataset_name": "x", "output_dir": "y", "samples_per_prompt": 8}
    rewards = {} if method == "rlsp" else {"rewards": ["correct_number"]}
    return METHODS[method].Config(**{**base, **rewards, **own, **settings})


def described(algorithm: str, **settings: Any) -> dict[str, Any]:
    given = config(algorithm, **settings)
    return METHODS[given.method].describe(given, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_any_key_is_the_published_algorithm(name: str) -> None:
    given = config(name)
    found, published = given.resolve(), preset(name)
    sizes = {"max_completion_length": 256, "sequences_per_update": 32}
    assert found.loss == published.settings(**sizes)
    names = set(vars(published)) - {"loss"}
    assert {key: getattr(found, key) for key in names} == {key: getattr(published, key) for key in names}
    assert found.policy_gradient() == published.policy_gradient(**sizes)
    assert described(name)["algorithm"] == f"{name}, as published"


def test_the_dry_run_says_what_is_in_force() -> None:
    lines = described("loop_code")
    assert lines["optimizer steps per step"] == "2 epochs x 4 updates of 32 rollouts"
    assert lines["loss"] == (
        "ratio of a token, clipped (reciprocal) to [0.909091, 1.1]; sequence_mean_token_mean, divided by 32 rollouts"
    )
    own = described("grpo", beta=0, clip_high=0.28, rollouts_per_update=16, dynamic_sampling=True, overlong_buffer=0.25)
    assert own["algorithm"] == (
        "grpo, but for kl none (published: loss), beta 0.0 (published: 0.04), rollouts_per_update 16 (published: 1 "
        "updates an epoch), dynamic_sampling True (published: False), overlong_buffer 0.25 (published: 0.0), "
        "clip_high 0.28 (published: 0.2)"
    )
    assert own["advantages"] == (
        "group_normalised; prompts of equal rewards are replaced; length is punished in the last 25% before its limit"
    )
    assert own["KL to the reference"] == "none"
    assert described("grpo")["KL to the reference"] == "k3 in the loss, beta 0.04"
    assert "which one update a step never reaches" in described("grpo")["loss"]
    assert "never reaches" not in own["loss"]
    same = described("rlsp", rollouts_per_update=32)  # of 128: four updates, as published
    assert same["algorithm"] == "rlsp, as published"
    critic = described("ppo", lam=1, value_coef=0.5, entropy_coef=0.01, engine={"kind": "vllm"})
    assert critic["advantages"] == "gae, gamma 1, lambda 1, whitened (unbiased variance)"
    assert critic["loss"].endswith("token_mean; entropy x 0.01; values x 0.5")
    assert critic["KL to the reference"] == "k1 in the reward, beta 0.05"
    assert critic["sampler's correction"] == "truncate, a token, up to 3"
    for key in (
        "lam 1.0 (published: 0.95)",
        "value_coef 0.5 (published: 0.1)",
        "correction truncate (published: none)",
    ):
        assert key in critic["algorithm"]


@pytest.mark.parametrize(
    ("algorithm", "settings", "said"),
    [
        (
            "rlsp",
            {"alpha": 0.1, "length_constant": 5},
            "alpha 0.1 (published: 0.8), length_constant 5.0 (published: 1000.0)",
        ),
        ("rlsp", {"form_of_reward": "code"}, "form_of_reward code (published: paper)"),
        ("rlsp", {"alpha_end": 1}, "alpha_end 1.0 (published: None)"),
        ("rlsp", {"judge": "j.py:effort"}, "judge j.py:effort (published: none)"),
        ("rlsp", {"verifier": "correct_number"}, "verifier correct_number (published: accuracy)"),
        ("rlsp", {"exploration_options": {"cap": 9}}, "exploration_options {'cap': 9} (published: {})"),
        ("rlsp", {"reward_missing": "leave_out"}, "reward_missing leave_out (published: no_score)"),
        ("rlsp", {"rewards": ["correct_number"]}, "rewards one's own (published: RLSP's)"),
        ("loop", {"min_advantage": 0.5}, "min_advantage 0.5 (published: 0.01)"),
        ("loop", {"minibatches": "prompts"}, "minibatches prompts (published: rollouts)"),
        ("grpo", {"reward_clip": 2}, "reward_clip 2.0 (published: None)"),
        ("ppo", {"value_gradient": True}, "value_gradient True (published: False)"),
    ],
)
def test_the_dry_run_says_what_else_is_not_as_published(algorithm: str, settings: dict[str, Any], said: str) -> None:
    assert described(algorithm, **settings)["algorithm"] == f"{algorithm}, but for {said}"


def test_the_dry_run_says_what_is_rewarded() -> None:
    assert described("loop")["reward"] == "1 correct_number"
    assert described("rlsp", alpha=0.75)["reward"] == "0.75 verifier (accuracy) + 0.25 exploration (scale 1000.0)"
    game = {"environment": "wordle", "rewards": [], "rollout": {"max_turns": 6}, "environment_weight": 2}
    assert described("loop", reward_clip=3, **game)["reward"] == "2 the environment's own, held within +-3"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("epochs_per_step", 3, "epochs"), ("rollouts_per_update", 16, "rollouts_per_update"), ("gamma", 0.9, "gamma"),
        ("lam", 0.5, "lam"), ("critic_warmup", 7, "critic_warmup"), ("overlong_buffer", 0.5, "overlong_buffer"),
        ("dynamic_sampling", True, "dynamic_sampling"), ("beta", 0.3, "beta"),
    ],
)  # fmt: skip
def test_a_key_changes_the_field_that_it_names_and_no_other(key: str, value: float, field: str) -> None:
    before, after = config("pf_ppo").resolve(), config("pf_ppo", **{key: value}).resolve()
    assert {name for name, its in vars(after).items() if its != getattr(before, name)} == {field}
    assert getattr(after, field) == value


@pytest.mark.parametrize("key", ["clip_low", "clip_high", "entropy_coef", "value_coef", "value_clip"])
def test_a_key_of_the_loss_reaches_the_objective(key: str) -> None:
    assert getattr(config("ppo", **{key: 0.37}).resolve().policy_gradient(), key) == 0.37


def test_beta_goes_where_the_algorithm_has_its_kl() -> None:
    assert (config("rloo", beta=0.2).resolve().kl, config("loop", beta=0.2).resolve().kl) == ("reward", "loss")
    assert config("loop", beta=0.2).resolve().policy_gradient().beta == 0.2
    assert config("rloo", beta=0.2).resolve().policy_gradient().beta == 0
    assert config("grpo", beta=0).resolve().policy_gradient().beta == 0


def test_loops_divisor_is_never_more_than_a_steps_rollouts() -> None:
    assert config("loop", prompts_per_step=2).resolve().policy_gradient().sequences_divisor == 16
    assert config("loop", rollouts_per_update=64).resolve().policy_gradient().sequences_divisor == 64


@pytest.mark.parametrize(("samples", "size"), [(8, 32), (6, 30), (20, 40), (24, 24), (48, 48), (64, 64)])
def test_loops_divisor_is_of_whole_prompts_where_updates_are(samples: int, size: int) -> None:
    """And of so many rollouts updates are, where none has left: each is a full step."""
    given = config("loop", minibatches="prompts", samples_per_prompt=samples, prompts_per_step=16).resolve()
    assert (given.policy_gradient().sequences_divisor, given.rollouts_in_update(16 * samples)) == (size, size)
    prompts = [list(range(i, i + samples)) for i in range(0, 16 * samples, samples)]
    full = _near(given.rollouts_in_update(16 * samples), prompts)[:-1]
    assert {len(batch) for batch in full} == {size}
    free = config("loop", samples_per_prompt=samples, prompts_per_step=16).resolve()
    assert free.policy_gradient().sequences_divisor == 32


@pytest.mark.parametrize(
    ("algorithm", "settings", "said"),
    [
        ("loop_code", {"clip_low": 0.1}, r"clip_low would be ignored: the band of LOOP's code is \[1 / \(1 \+ clip_h"),
        ("rloo", {"clip_high": 0.3}, "clip_high would be ignored: this algorithm does not clip"),
        ("reinforce", {"clip_low": 0.3}, "clip_low would be ignored"),
        ("grpo", {"min_advantage": 0.5}, "min_advantage would be ignored: it is LOOP's filter, and grpo has none"),
        ("ppo", {"dynamic_sampling": True}, "a critic is the baseline"),
        ("rlsp", {"dynamic_sampling": True}, "a critic is the baseline"),
        ("reinforce_plus_plus", {"dynamic_sampling": True, "samples_per_prompt": 1}, "samples_per_prompt 1 that is"),
        ("pf_ppo", {"dynamic_sampling": True, "samples_per_prompt": 1, "filtration": "none"}, "samples_per_prompt 1"),
        ("loop", {"overlong_buffer": 1.5}, "overlong_buffer"),
        ("loop", {"eval_samples": 4}, "eval_samples 4 at eval_temperature 0"),
        ("loop", {"eval_temperature": -1}, "eval_temperature"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(algorithm: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(algorithm, **settings)


def test_what_is_off_by_itself_may_be_said_to_be_off() -> None:
    assert not config("ppo", dynamic_sampling=False, samples_per_prompt=1).resolve().dynamic_sampling
    off = config("dapo_clip", dynamic_sampling=False, overlong_buffer=0)
    assert (off.resolve().dynamic_sampling, off.resolve().overlong_buffer) == (False, 0)
