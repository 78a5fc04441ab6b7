"""What of a step's rollouts is scored and trained on, and what is said of it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from support.models import make_tiny_model
from support.online_run import METHODS, write_online_config
from support.recipe_run import metrics, run_method
from support.rollouts import rollout, turn

from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import Group
from llmrl.objectives.advantages import worth_training
from llmrl.objectives.filtration import reward_fit
from llmrl.objectives.presets import preset
from llmrl.rollout.trajectory import Rollout, RolloutGroup
from llmrl.trainers.online.experience import Experience
from llmrl.trainers.online.reward_fits import RECENT_STEPS, RewardFits


def simple(reward: float, prompt: int, length: int) -> Rollout:
    ids = [prompt, prompt + 1, *range(10 + prompt, 10 + prompt + length)]
    return rollout([ids], [turn(2, 2 + length, logprobs=[-4.0] * length)], reward)


def experience_of(*rewards: list[float]) -> Experience:
    return Experience([
        RolloutGroup(n, {}, [simple(reward, 5 * n, 2 + i) for i, reward in enumerate(given)])
        for n, given in enumerate(rewards, 1)
    ])  # fmt: skip


class Counting(Learner):
    """A learner that knows how many sequences it was asked to score."""

    def __init__(self) -> None:
        options = LearnerOptions(learning_rate=1e-2, reference="precomputed")
        super().__init__(make_tiny_model(), options, Accelerator(cpu=True), lambda text: None)
        self.asked = 0

    def scores(self, groups: list[Group], **named: Any) -> Any:
        self.asked += sum(len(group) for group in groups)
        return super().scores(groups, **named)


def test_filtering_before_scoring_is_the_same_update_with_less_work() -> None:
    """LOOP's Algorithm 1: advantages need rewards alone, so that what is not trained on is never scored."""
    algorithm = preset("loop")
    found = {}
    for first in ("score", "filter"):
        learner, experience = Counting(), experience_of([1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.505, 0.5])
        if first == "score":
            experience.score(learner, old=True, reference=False, values=False)
        experience.keep(worth_training(experience.assign_advantages(algorithm), 0.01))
        if first == "filter":
            experience.score(learner, old=True, reference=False, values=False)
        objective = algorithm.policy_gradient(40, 2).objective()
        done = experience.train(learner, objective, epochs=2, rollouts_per_update=2, seed=1, skip_idle=True)
        found[first] = done, [p.detach().clone() for p in learner.causal_lm.parameters()], learner.asked
    before, after = found["score"], found["filter"]
    assert after[0] == pytest.approx(before[0], rel=1e-4, abs=1e-6)
    for mine, theirs in zip(before[1], after[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (before[2], after[2]) == (9, 3)
    assert before[0]["updates"] == 4


def test_rollouts_that_no_update_computes_are_not_scored() -> None:
    learner, experience = Counting(), experience_of([1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    experience.assign_advantages(preset("dr_grpo"))
    experience.score(learner, old=True, reference=False, values=False, idle=False)
    assert learner.asked == 3
    assert [set(p.token_values) for s in experience.samples for p in s.pieces] == (
        [{"advantages", "old_logprobs"}] * 3 + [{"advantages"}] * 3
    )


def picky(tmp_path: Path, **settings: Any) -> Path:
    """Prompts of which every second teaches nothing."""
    (tmp_path / "picky.py").write_text(
        "def picky(prompts, completions, **columns):\n"
        "    return [len(set(said.split())) * (len(prompts[0]) % 2) for said in completions]\n"
    )
    return write_online_config(tmp_path, rewards=[f"{tmp_path / 'picky.py'}:picky"], eval_rows=0, **settings)


def test_a_run_of_loop_scores_what_it_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    scores = Learner.scores

    def counted(self: Learner, groups: list[Group], **named: Any) -> Any:
        asked.append([piece.token_values["advantages"][0] for group in groups for piece in group])
        return scores(self, groups, **named)

    monkeypatch.setattr(Learner, "scores", counted)
    assert run_method("loop", picky(tmp_path, max_steps=3)) == 0
    assert 1 <= len(asked) <= 3
    assert all(abs(advantage) >= 0.01 for step in asked for advantage in step)
    assert sum(map(len, asked)) < 3 * 16


def kept(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", ["loop", "ppo", "rlsp", "pf_ppo"])
def test_truncated_rollouts_are_judged_and_not_trained_on(tmp_path: Path, method: str) -> None:
    own = {"critic_warmup": 0} if method == "rlsp" else {}
    settings = {"max_steps": 1, "samples_per_prompt": 5, "max_completion_length": 6, "eval_rows": 0, **own}
    tokens = {}
    for mask in (False, True):
        config = write_online_config(
            tmp_path, output_dir=str(tmp_path / str(mask)), mask_truncated_completions=mask, **settings
        )
        assert run_method(method, config) == 0
        (line,) = metrics(tmp_path / str(mask))
        tokens[mask] = line
    cut = [one["end_state"] == "truncated-length" for one in kept(tmp_path / "True", 1)]
    assert 0 < sum(cut) < len(cut)
    same = ("reward", "reward_std", "num_tokens", "completions/clipped_ratio")
    assert [tokens[True][name] for name in same] == [tokens[False][name] for name in same]
    assert 0 < tokens[True]["num_trained_tokens"] < tokens[False]["num_trained_tokens"]
    assert tokens[True]["rollout/masked"] == sum(cut)
    assert "rollout/masked" not in tokens[False]


def test_a_filtration_chooses_among_what_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each prompt's five rollouts the best and the worst are cut off; the pair is then of the other three."""
    (tmp_path / "order.py").write_text(
        "def order(completions, **_):\n    return [float(i) for i in range(len(completions))]\n"
    )
    ends = property(lambda rollout: rollout.reward not in (0.0, 4.0))
    monkeypatch.setattr(Rollout, "ended_by_itself", ends)
    trained: list[float] = []
    train = Experience.train

    def noted(self: Experience, *arguments: Any, **named: Any) -> Any:
        trained.extend(self.rewards_S.tolist())
        return train(self, *arguments, **named)

    monkeypatch.setattr(Experience, "train", noted)
    config = write_online_config(
        tmp_path, rewards=[f"{tmp_path / 'order.py'}:order"], filtration="best_worst", max_steps=1, eval_rows=0,
        samples_per_prompt=5, mask_truncated_completions=True, overlong_buffer=0.5,
    )  # fmt: skip
    assert run_method("pf_ppo", config) == 0
    (line,) = metrics(tmp_path / "run")
    assert (len(trained), line["filtration/rows_mean"], line["rollout/masked"]) == (8, 2, 8)
    assert line["reward"] == 2  # of all five, before any punishment of length
    kept_rewards = [one["reward"] + one.get("penalty", 0.0) for one in kept(tmp_path / "run", 1)]
    groups = [sorted(kept_rewards[5 * i + 1 : 5 * i + 4]) for i in range(4)]
    assert sorted(trained) == pytest.approx(sorted(one for group in groups for one in (group[0], group[-1])))


def test_a_run_in_which_all_that_could_teach_is_masked_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Rollout, "ended_by_itself", False)
    config = write_online_config(tmp_path, mask_truncated_completions=True, max_empty_steps=2, eval_rows=0)
    assert run_method("loop", config) == 1
    assert "in 2 steps in a row: whatever could teach ran into a limit, and mask_trunc" in capsys.readouterr().err


def test_whole_prompts_are_computed_once_an_epoch(tmp_path: Path) -> None:
    """With updates of one prompt's four rollouts each prompt is computed once, else up to four times."""
    computed = {}
    for kind in ("rollouts", "prompts"):
        settings = {"minibatches": kind, "rollouts_per_update": 4, "max_steps": 1, "eval_rows": 0, "epochs_per_step": 1}
        assert run_method("loop", write_online_config(tmp_path, output_dir=str(tmp_path / kind), **settings)) == 0
        (line,) = metrics(tmp_path / kind)
        computed[kind] = line["num_computed_tokens"], line["num_trained_tokens"]
    assert computed["prompts"][0] < computed["rollouts"][0]
    assert computed["prompts"][1] == computed["rollouts"][1]


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "last"),
    [
        ("rlsp", {}, 0.1),  # cosine to a tenth
        ("rlsp", {"lr_scheduler_kwargs": {"min_lr_rate": 0.5}}, 0.5),
        ("pf_ppo", {}, 0.0),  # cosine
        ("ppo", {}, 0.0),  # linear
        ("loop", {}, 1.0),  # constant
    ],
)
def test_published_schedules_are_the_defaults(method: str, settings: dict[str, Any], last: float) -> None:
    config = METHODS[method].Config(
        model_name_or_path="starter", output_dir="x", dataset_name="x", rewards=["correct_number"], **settings
    )
    warmup = 3 if method in ("rlsp", "pf_ppo") else 0
    options = LearnerOptions(
        learning_rate=1.0,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=config.schedule_numbers,
        warmup_steps=math.ceil(config.warmup_ratio * 100),
        total_steps=100,
    )
    learner = Learner(make_tiny_model(), options, Accelerator(cpu=True), lambda text: None)
    rates = []
    for _ in range(101):
        rates.append(learner.learning_rate)
        learner.optimizer.step()  # without a gradient: nothing moves
        learner.advance_schedule()
    assert rates.index(1.0) == warmup
    assert rates[-1] == pytest.approx(last, abs=1e-9)
    middle = 3 + 97 // 2
    if method == "rlsp":
        cosine = 0.5 * (1 + math.cos(math.pi * (middle - 3) / 97))
        assert rates[middle] == pytest.approx(last + (1 - last) * cosine)


def test_numbers_that_a_schedule_does_not_take_are_refused() -> None:
    keys = {"model_name_or_path": "starter", "output_dir": "x", "dataset_name": "x", "rewards": ["correct_number"]}
    with pytest.raises(
        ValidationError, match="names `min_lr`, which lr_scheduler_type linear does not take; it takes none"
    ):
        METHODS["ppo"].Config(**keys, lr_scheduler_kwargs={"min_lr": 0.1})
    with pytest.raises(ValidationError, match="it takes lr_end, power"):
        METHODS["ppo"].Config(**keys, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"min_lr_rate": 0.1})


# -- PF-PPO: how well the reward predicts the actual score -------------------------------------------------------------


def judged(*pairs: tuple[float, float | None]) -> RolloutGroup:
    """The rollouts of one prompt by their rewards and actual scores."""
    rollouts = [simple(reward, 5, 1) for reward, _ in pairs]
    for one, (_, score) in zip(rollouts, pairs, strict=True):
        one.scores = {"right": score}
    return RolloutGroup(1, {}, rollouts)


def test_fits_are_over_the_latest_steps_and_in_every_checkpoint() -> None:
    """The page's T4, its nine responses in three steps, after a step that is forgotten by then."""
    steps = [
        judged((0.8, 1), (0.3, 0), (-0.6, 0)),
        judged((0.5, 1), (0.1, 1), (-0.2, 0.5)),
        judged((0.9, 0.5), (0.4, 1), (-0.9, 0)),
    ]
    fits = RewardFits("right", 2.0)
    fits.add([judged((9.0, 0.0), (-9.0, 1.0))])
    assert fits.metrics(torch.Generator())["filtration/slope/none"] < 0
    for step in [*steps, *[judged((1.0, None))] * (RECENT_STEPS - 3)]:
        fits.add([step])
    again = RewardFits("right", 2.0)
    again.load_state_dict(fits.state_dict())
    found, repeated = (each.metrics(torch.Generator().manual_seed(3)) for each in (fits, again))
    assert repeated == found
    rewards = torch.tensor([0.8, 0.3, -0.6, 0.5, 0.1, -0.2, 0.9, 0.4, -0.9], dtype=torch.float64)
    scores = torch.tensor([1, 0, 0, 1, 1, 0.5, 0.5, 1, 0], dtype=torch.float64)
    plain = reward_fit(rewards, scores)  # every reward lies in an interval of its own
    assert found["filtration/r_squared/none"] == pytest.approx(plain.r_squared)
    assert found["filtration/r_squared/none"] == pytest.approx(0.39691, abs=1e-6)
    assert found["filtration/slope/none"] == pytest.approx(plain.slope)
    assert found["filtration/points/none"] == 9
    assert found["filtration/points/best"] == 3
    assert found["filtration/slope/best"] < 0
    assert (
        found["filtration/r_squared_low/none"]
        < found["filtration/r_squared/none"]
        < found["filtration/r_squared_high/none"]
    )


def test_fits_of_a_resumed_run_are_those_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(
        "def long(completions, **columns):\n    return [float(len(said) > 12) for said in completions]\n"
    )
    rewards = [
        f"{tmp_path / 'reward.py'}:paid",
        {"function": f"{tmp_path / 'long.py'}:long", "name": "long", "weight": 0},
    ]
    settings = {"rewards": rewards, "truth": "long", "samples_per_prompt": 5, "save_steps": 2, "eval_rows": 0}
    config = write_online_config(tmp_path, save_total_limit=5, **settings)
    assert run_method("pf_ppo", config) == 0
    run = tmp_path / "run"
    whole = metrics(run)[-1]
    for done in ("checkpoints/step_4", "final"):
        shutil.rmtree(run / done)
    assert run_method("pf_ppo", config, "--resume_from_checkpoint", "latest") == 0
    resumed = metrics(run)[-1]
    names = [name for name in whole if name.startswith(("filtration/", "loss"))]
    assert any("r_squared_low" in name for name in names)
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
