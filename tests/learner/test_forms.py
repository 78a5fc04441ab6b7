"""The prefix tree against each model's own forward, over the architectures that people fine-tune."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.groups import branching_group, random_pairs
from support.models import make_tiny_model
from transformers import PreTrainedModel

from llmrl.errors import RefusedError
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.policy import Policy
from llmrl.objectives.dpo import DPO

ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 12}),
    ("phi3", {}),
    ("gemma2", {"sliding_window": 12, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    ("gemma3_text", {"sliding_window": 12}),
    ("granite", {"logits_scaling": 4.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("smollm3", {}),
]


def learner_for(model: PreTrainedModel, said: list[str] | None = None, **options: Any) -> Learner:
    return Learner(model, LearnerOptions(**options), Accelerator(cpu=True), (said if said is not None else []).append)


@pytest.mark.parametrize(
    ("kind", "settings"), ARCHITECTURES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(ARCHITECTURES)]
)
def test_tree_equals_the_models_own_forward(kind: str, settings: dict[str, Any], draw: np.random.Generator) -> None:
    model = make_tiny_model(kind, **settings)
    groups = [branching_group(draw), *random_pairs(draw, 2)]
    model.set_attn_implementation("eager")
    truth = []
    with torch.no_grad():
        for sequence in (s for g in groups for s in g):
            log_p = model(input_ids=torch.from_numpy(sequence.token_ids)[None]).logits[0].float().log_softmax(-1)
            at = np.flatnonzero(sequence.scored)
            truth.append(log_p[at - 1, torch.from_numpy(sequence.token_ids[at])].numpy())

    said: list[str] = []
    learner = learner_for(model, said)
    assert learner.form == "tree", said
    ours = [parts for group in learner.logprobs(groups) for parts in group]
    for mine, true in zip(ours, truth, strict=True):
        np.testing.assert_allclose(mine, true, atol=2e-5)


def test_a_model_that_cannot_take_the_tree_gets_padded_rows_and_it_is_said() -> None:
    said: list[str] = []
    model = make_tiny_model("mamba2", num_heads=8, head_dim=8, n_groups=1, state_size=8, expand=2, chunk_size=16)
    learner = learner_for(model, said)
    assert learner.form == "padded"
    assert any("padded" in text for text in said)


def test_a_tree_that_was_asked_for_and_cannot_be_is_refused() -> None:
    model = make_tiny_model("mamba2", num_heads=8, head_dim=8, n_groups=1, state_size=8, expand=2, chunk_size=16)
    with pytest.raises(RefusedError, match="form: tree"):
        learner_for(model, form="tree")


def test_a_silently_wrong_tree_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions without the tree's attention, as in a model that ignored `layout`: the loss would still go down."""
    from llmrl.learner import attention

    def causal(module: Any, query: Any, key: Any, value: Any, mask: Any, *, layout: Any = None, **kwargs: Any) -> Any:
        mask = None if layout is not None else mask
        return attention.sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, causal)
    said: list[str] = []
    learner = learner_for(make_tiny_model(), said)
    assert learner.form == "padded"
    assert any("differs" in text for text in said)


def test_an_unknown_step_between_states_and_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model()
    plain = Policy.plain_logprobs
    monkeypatch.setattr(Policy, "plain_logprobs", lambda self, inputs: plain(self, inputs) * 1.5)
    with pytest.raises(RefusedError, match="differ from its own logits"):
        learner_for(model)


def test_gradient_checkpointing_changes_nothing(draw: np.random.Generator) -> None:
    groups = random_pairs(draw, 3)
    plain = learner_for(make_tiny_model(), reference="frozen")
    spared = learner_for(make_tiny_model(), reference="frozen", gradient_checkpointing=True)
    first, second = (one.update(groups, DPO().objective()) for one in (plain, spared))
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)
    for a, b in zip(plain.causal_lm.parameters(), spared.causal_lm.parameters(), strict=True):
        torch.testing.assert_close(a, b)
