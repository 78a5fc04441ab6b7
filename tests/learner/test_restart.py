"""A further phase of training: the weights stay, and the optimizer is as if it had just been made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.groups import random_pairs
from support.scoring import tiny_learner

from llmrl.learner.learner import Learner
from llmrl.objectives.cpl import BehaviourCloning

SECOND: dict[str, Any] = {
    "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 1, "total_steps": 4
}  # fmt: skip


def updated(learner: Learner, steps: int) -> list[float]:
    groups = random_pairs(np.random.default_rng(0), 3)
    return [learner.update(groups, BehaviourCloning().objective())["learning_rate"] for _ in range(steps)]


@pytest.mark.parametrize("value_head", [False, True], ids=["policy", "critic"])
def test_it_goes_on_as_a_new_learner_with_these_weights_would(value_head: bool) -> None:
    further: dict[str, Any] = {"value_head": True, "value_learning_rate": 0.1} if value_head else {}
    first = tiny_learner(reference="precomputed", total_steps=9, weight_decay=0.1, **further)
    updated(first, 3)
    fresh = tiny_learner(reference="precomputed", weight_decay=0.1, **further)
    fresh.policy.load_state_dict(first.policy.state_dict())
    fresh.restart(**SECOND)  # of a learner that has not made a step: only its schedule changes
    first.restart(**SECOND)
    rates = updated(first, 3)
    assert rates == updated(fresh, 3)
    assert rates == pytest.approx([0, 3e-4, 3e-4 * 0.75])
    for name, weight in fresh.policy.state_dict().items():
        assert torch.equal(first.policy.state_dict()[name], weight), name
    assert first.optimizer.param_groups[0]["initial_lr"] == 3e-4


def test_a_checkpoint_comes_back_into_its_phase(tmp_path: Path) -> None:
    first, again = (tiny_learner(reference="none", total_steps=9) for _ in range(2))
    updated(first, 2)
    first.restart(**SECOND)
    updated(first, 2)
    first.save(tmp_path)
    again.load(tmp_path)
    assert again.options == first.options
    assert updated(again, 2) == updated(first, 2)
    for name, weight in first.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], weight), name


def test_what_was_learned_before_leaves_traces_only_without_it() -> None:
    """The moments matter: a schedule alone that starts again ends elsewhere."""
    restarted, goes_on = (tiny_learner(reference="precomputed", lr_scheduler_type="constant") for _ in range(2))
    for learner in (restarted, goes_on):
        updated(learner, 3)
    restarted.restart()
    for learner in (restarted, goes_on):
        updated(learner, 1)
    ends = [torch.cat([p.flatten() for p in learner.policy.parameters()]) for learner in (restarted, goes_on)]
    assert not torch.allclose(*ends, atol=1e-5)
