"""What the learner promises beside gradients: references, refusals, frozen parts, exact state."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.groups import random_pairs
from support.models import make_tiny_model
from transformers import AutoModelForCausalLM

from llmrl.config import ModelKeys
from llmrl.errors import RefusedError, RunFailedError
from llmrl.learner.learner import MOST_OVERFLOWS, Learner
from llmrl.learner.loading import add_lora, load_model, model_without_storage
from llmrl.learner.options import LearnerOptions
from llmrl.learner.policy import Policy
from llmrl.objectives.dpo import DPO
from llmrl.objectives.scored import Objective

DPO_LOSS = DPO().objective()


def build(model: Any, **options: Any) -> Learner:
    return Learner(model, LearnerOptions(**options), Accelerator(cpu=True), lambda text: None)


def lora(**settings: Any) -> Any:
    return add_lora(make_tiny_model(), ModelKeys(model_name_or_path="tiny", use_peft=True, lora_r=4, **settings))


@pytest.mark.parametrize("kind", ["adapter_off", "frozen", "precomputed"])
def test_a_policy_changed_in_memory_starts_at_ln_2_against_itself(kind: str, draw: np.random.Generator) -> None:
    model = make_tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if kind == "adapter_off":
        model = add_lora(model, ModelKeys(model_name_or_path="tiny", use_peft=True))
    learner = build(model, reference=kind, tokens_per_microbatch=70)
    pairs = random_pairs(draw, 6)
    if kind == "precomputed":
        known = learner.logprobs(pairs)
        pairs = [
            tuple(replace(s, reference_logprobs=k) for s, k in zip(g, ks, strict=True))
            for g, ks in zip(pairs, known, strict=True)
        ]
    metrics = learner.update(pairs, DPO_LOSS)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"] == 0.0


@pytest.mark.parametrize(("kind", "said"), [("none", "built without a reference"), ("precomputed", "do not carry")])
def test_a_reference_that_is_not_in_memory_is_not_made_up(kind: str, said: str, draw: np.random.Generator) -> None:
    learner, pairs = build(make_tiny_model(), reference=kind), random_pairs(draw, 2)
    with pytest.raises(RuntimeError, match=said):
        learner.update(pairs, DPO_LOSS)
    with pytest.raises(RuntimeError, match=said):
        learner.logprobs(pairs, of_reference=True)


def test_the_reference_stays_where_the_policy_started(draw: np.random.Generator) -> None:
    pairs = random_pairs(draw, 4)
    for model, kind in ((make_tiny_model(), "frozen"), (lora(), "adapter_off")):
        learner = build(model, reference=kind, learning_rate=1e-2, total_steps=5)
        before = learner.logprobs(pairs)
        for _ in range(3):
            learner.update(pairs, DPO_LOSS)
        for was, still, now in zip(
            before, learner.logprobs(pairs, of_reference=True), learner.logprobs(pairs), strict=True
        ):
            np.testing.assert_array_equal(was[0], still[0])
            assert np.abs(was[0] - now[0]).max() > 1e-3


def test_a_preference_is_learned(draw: np.random.Generator) -> None:
    learner = build(make_tiny_model(), reference="frozen", learning_rate=3e-3, lr_scheduler_type="constant")
    pairs = random_pairs(draw, 4)
    for _ in range(20):
        metrics = learner.update(pairs, DPO_LOSS)
    assert metrics["loss"] < 0.3
    assert metrics["rewards/accuracies"] == 1.0


def test_only_the_adapter_moves(draw: np.random.Generator) -> None:
    model = lora()
    learner = build(model, learning_rate=1e-2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learner.update(random_pairs(draw, 2), DPO_LOSS)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_every_trainable_parameter_moves(draw: np.random.Generator) -> None:
    model = make_tiny_model(tie_word_embeddings=True)
    learner = build(model, reference="frozen", learning_rate=1e-2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learner.update(random_pairs(draw, 4), DPO_LOSS)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_nothing_to_train_is_refused() -> None:
    model = make_tiny_model().requires_grad_(False)
    with pytest.raises(RefusedError, match="no trainable parameter"):
        build(model)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path: Path) -> None:
    from peft import PeftModel

    lora().save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="is_trainable"):
        build(PeftModel.from_pretrained(make_tiny_model(), tmp_path))


def test_an_adapter_on_top_of_an_adapter_is_refused_for_what_is_saved_would_lack_the_first(tmp_path: Path) -> None:
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    make_tiny_model().save_pretrained(base)
    keys = ModelKeys(model_name_or_path=adapter, use_peft=True, lora_target_modules=["q_proj"])
    first = load_model(base, keys, torch.float32, print)
    for parameter in first.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    first.save_pretrained(adapter)
    words = "is an adapter, and with use_peft a new one .*merge the first"
    with pytest.raises(RefusedError, match=words):
        load_model(adapter, keys, torch.float32, print)
    with pytest.raises(RefusedError, match=words):
        model_without_storage(adapter, keys)
    whole = load_model(adapter, keys.model_copy(update={"use_peft": False}), torch.float32, lambda text: None)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(whole(ids).logits, first(ids).logits, atol=1e-4, rtol=0)


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    with pytest.raises(RefusedError, match="lm_head"):
        lora(lora_target_modules=["q_proj", "lm_head"])


def test_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(RefusedError, match="lora_target_modules"):
        lora(lora_target_modules=["queries"])


def test_adapter_off_without_an_adapter_is_refused() -> None:
    with pytest.raises(RefusedError, match="use_peft"):
        build(make_tiny_model(), reference="adapter_off")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_changes_nothing(where: str, draw: np.random.Generator) -> None:
    def broken(logprobs: torch.Tensor, scored: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bad = logprobs.sum() * float("nan") if where == "loss" else (logprobs.sum() * 0).sqrt()
        return bad, {}

    model = make_tiny_model()
    learner = build(model, reference="frozen")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RunFailedError, match="not finite"):
        learner.update(random_pairs(draw, 2), Objective(broken))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state for the whole process, and another precision needs another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_frozen_reference_computes_in_the_policys_mixed_precision(draw: np.random.Generator) -> None:
    exact = Learner(make_tiny_model(), LearnerOptions(reference="precomputed"), Accelerator(cpu=True), print)
    pairs = random_pairs(draw, 6)
    exact_logprobs = exact.logprobs(pairs)
    AcceleratorState._reset_state(reset_partial_state=True)
    learner = Learner(
        make_tiny_model(), LearnerOptions(reference="frozen"), Accelerator(cpu=True, mixed_precision="bf16"), print
    )
    assert np.abs(learner.logprobs(pairs)[0][0] - exact_logprobs[0][0]).max() > 1e-5  # the precision is really another
    assert learner.update(pairs, DPO_LOSS)["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.fixture
def scaling_learner(fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> Learner:
    """A learner with float16's loss scaler, which accelerate makes for GPUs only: torch's own, put in by hand."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**24))
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
    return Learner(make_tiny_model(), LearnerOptions(reference="frozen", total_steps=9), accelerator, print)


def test_an_overflow_lowers_the_loss_scale_and_changes_nothing_else(
    scaling_learner: Learner, draw: np.random.Generator
) -> None:
    pairs, huge = random_pairs(draw, 2), Objective(lambda lp, _: (lp.sum(), {}))
    before = {name: weight.clone() for name, weight in scaling_learner.causal_lm.named_parameters()}
    rate = scaling_learner.learning_rate
    overflowing = scaling_learner.update(pairs, huge)
    assert math.isnan(overflowing["grad_norm"])
    assert math.isfinite(overflowing["loss"])
    assert scaling_learner.accelerator.scaler.get_scale() == 2.0**23
    assert scaling_learner.learning_rate == rate
    assert all(torch.equal(before[name], weight) for name, weight in scaling_learner.causal_lm.named_parameters())
    norms = [scaling_learner.update(pairs, huge)["grad_norm"] for _ in range(MOST_OVERFLOWS - 2)]
    assert math.isfinite(norms[-1])
    assert scaling_learner.learning_rate < rate
    assert not torch.equal(before["lm_head.weight"], scaling_learner.causal_lm.lm_head.weight)


def test_a_gradient_that_no_loss_scale_makes_finite_ends_the_run(
    scaling_learner: Learner, draw: np.random.Generator
) -> None:
    pairs, broken = random_pairs(draw, 2), Objective(lambda lp, _: ((lp.sum() * 0).sqrt(), {}))
    for _ in range(MOST_OVERFLOWS - 1):
        scaling_learner.update(pairs, broken)
    with pytest.raises(RunFailedError, match="not finite"):
        scaling_learner.update(pairs, broken)


def test_state_is_restored_to_the_bit_and_small_under_lora(tmp_path: Path, draw: np.random.Generator) -> None:
    pairs = random_pairs(draw, 4)
    learner = build(lora(lora_dropout=0.5), learning_rate=1e-2, total_steps=10)
    learner.update(pairs, DPO_LOSS)
    learner.save(tmp_path)
    straight = [learner.update(pairs, DPO_LOSS)["grad_norm"] for _ in range(2)]
    again = build(lora(lora_dropout=0.5), learning_rate=1e-2, total_steps=10)
    again.load(tmp_path)
    assert [again.update(pairs, DPO_LOSS)["grad_norm"] for _ in range(2)] == straight
    trainable = sum(p.numel() for p in learner.causal_lm.parameters() if p.requires_grad)
    assert (tmp_path / "trained.safetensors").stat().st_size < 4 * trainable + 20_000


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    build(lora()).save(tmp_path)
    with pytest.raises(RunFailedError, match="other parameters"):
        build(lora(lora_target_modules=["q_proj"])).load(tmp_path)


def test_export_loads_with_from_pretrained(tmp_path: Path, draw: np.random.Generator) -> None:
    learner = build(make_tiny_model(tie_word_embeddings=True), reference="frozen", learning_rate=1e-2)
    learner.update(random_pairs(draw, 2), DPO_LOSS)
    learner.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(learner.causal_lm.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_value_head_scores_the_predicting_states(draw: np.random.Generator) -> None:
    policy = Policy(make_tiny_model(), value_head=True)
    assert policy.value_head is not None
    learner = build(make_tiny_model(), value_head=True, reference="frozen")
    from llmrl.learner.batches import padded_inputs, tree_inputs

    pairs = random_pairs(draw, 3)
    with torch.no_grad():
        packed = learner.policy(tree_inputs(pairs, "cpu")).values_N
        padded = learner.policy(padded_inputs(pairs, "cpu")).values_N
    assert packed is not None
    assert packed.shape == (sum(s.num_scored for g in pairs for s in g),)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_entropies_are_those_of_the_full_distribution(draw: np.random.Generator) -> None:
    from llmrl.learner.batches import tree_inputs

    learner = build(make_tiny_model(), reference="frozen")
    pair = random_pairs(draw, 1)[0]
    with torch.no_grad():
        entropies = learner.policy(tree_inputs([pair], "cpu"), with_entropy=True).entropies_N
        expected = []
        for sequence in pair:
            ids = torch.from_numpy(sequence.token_ids)[None]
            log_p = learner.causal_lm(input_ids=ids).logits[0].log_softmax(-1)
            expected.append(-(log_p.exp() * log_p).sum(-1)[np.flatnonzero(sequence.scored) - 1])
    torch.testing.assert_close(entropies, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_temperature_divides_the_logits(draw: np.random.Generator) -> None:
    pair = random_pairs(draw, 1)[0]
    learner = build(make_tiny_model(), temperature=0.5, reference="frozen")
    (scored,) = learner.logprobs([pair])
    ids, at = torch.from_numpy(pair[0].token_ids), np.flatnonzero(pair[0].scored)
    with torch.no_grad():
        log_p = (learner.causal_lm(input_ids=ids[None]).logits[0] / 0.5).log_softmax(-1)
    np.testing.assert_allclose(scored[0], log_p[at - 1, ids[at]].numpy(), atol=1e-5)
