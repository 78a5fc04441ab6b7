"""Implicit rewards of given tokens: against a plain forward of both models, whatever the batch and form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import VOCABULARY, make_tiny_model

from llmrl.errors import RefusedError
from llmrl.evaluation.implicit import ImplicitReward, learner_drift, without_drift
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import Group, completion

BETA = 0.3


def adapted(seed: int = 0) -> torch.nn.Module:
    base = make_tiny_model(seed=seed)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture
def groups(draw: np.random.Generator) -> list[Group]:
    """Pairs that share their prompt, and one answer alone."""
    prompts = [draw.integers(3, VOCABULARY, n) for n in (7, 4, 9)]
    answers = [[draw.integers(3, VOCABULARY, n) for n in lengths] for lengths in ((5, 3), (1, 8), (6,))]
    return [tuple(completion(p, a) for a in each) for p, each in zip(prompts, answers, strict=True)]


def plain(model: torch.nn.Module, ids: np.ndarray, length: int) -> torch.Tensor:
    """[length, V] log-probabilities of the last `length` tokens' alternatives, from one plain forward."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0, -length - 1 : -1].double()
    return logits.log_softmax(-1)


@pytest.mark.parametrize("budget", [1, 16, 4096])
def test_both_models_log_probs_are_those_of_plain_forwards(groups: list[Group], budget: int) -> None:
    implicit = ImplicitReward(make_tiny_model(seed=0), make_tiny_model(seed=1), BETA, budget)
    done: list[tuple[int, int]] = []
    found = implicit.logprobs(groups, lambda *counts: done.append(counts))
    assert done[-1] == (3, 3)
    for group, scored in zip(groups, found, strict=True):
        for sequence, both in zip(group, scored, strict=True):
            for seed, ours in zip((0, 1), both, strict=True):
                alternatives = plain(make_tiny_model(seed=seed), sequence.token_ids, sequence.num_scored)
                target = torch.from_numpy(sequence.token_ids[-sequence.num_scored :])[:, None]
                assert ours == pytest.approx(alternatives.gather(1, target)[:, 0].numpy(), abs=2e-5)


def test_an_adapter_is_its_own_reference_with_the_adapter_off(groups: list[Group]) -> None:
    own = ImplicitReward(adapted(), None, BETA)  # type: ignore[arg-type]
    merged = adapted().merge_and_unload()  # type: ignore[operator]
    two = ImplicitReward(merged, make_tiny_model(), BETA)
    for ours, theirs in zip(own.logprobs(groups), two.logprobs(groups), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a[0] == pytest.approx(b[0], abs=2e-5)
            assert a[1] == pytest.approx(b[1], abs=1e-6)
            assert np.abs(a[0] - a[1]).max() > 0.01
    for ours, theirs in zip(own.drift(groups), two.drift(groups), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=2e-5)


def test_the_drift_is_the_mean_over_the_reference_of_every_token(groups: list[Group], monkeypatch) -> None:
    monkeypatch.setattr("llmrl.evaluation.implicit.CHUNK_ELEMENTS", 5 * VOCABULARY)  # several chunks
    implicit = ImplicitReward(make_tiny_model(seed=0), make_tiny_model(seed=1), BETA)
    for group, drifts in zip(groups, implicit.drift(groups), strict=True):
        for sequence, ours in zip(group, drifts, strict=True):
            mine, theirs = (plain(make_tiny_model(seed=s), sequence.token_ids, sequence.num_scored) for s in (0, 1))
            assert ours == pytest.approx((BETA * theirs.exp() * (mine - theirs)).sum(-1).numpy(), abs=1e-4)
            assert (ours < 0).all()


def test_a_learner_reports_its_drift_where_its_reference_is_in_memory(groups: list[Group]) -> None:
    learner = Learner(adapted(), LearnerOptions(reference="adapter_off"), say=lambda text: None)  # type: ignore[arg-type]
    drifts = ImplicitReward(adapted(), None, BETA).drift(groups)  # type: ignore[arg-type]
    expected = np.concatenate([part for group in drifts for part in group]).mean()
    assert learner_drift(learner, groups, BETA)["reference_drift"] == pytest.approx(float(expected), abs=1e-6)
    fresh = Learner(make_tiny_model(), LearnerOptions(reference="frozen"), say=lambda text: None)
    assert learner_drift(fresh, groups, BETA)["reference_drift"] == pytest.approx(0.0, abs=1e-7)
    without = Learner(make_tiny_model(), LearnerOptions(reference="precomputed"), say=lambda text: None)
    assert learner_drift(without, groups, BETA) == {}
    assert "reference: frozen" in str(without_drift(without))
    assert without_drift(fresh) is None


def test_no_reference_and_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there is no reference"):
        ImplicitReward(make_tiny_model())
