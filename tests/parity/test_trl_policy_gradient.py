"""TRL's own GRPO and RLOO losses, handed the log-probabilities that ours get: the same loss, gradient and metrics.

TRL's `_compute_loss` runs unchanged; what it would take from a model comes from a table of log-probabilities. So a
change of theirs shows here, and no trainer is built.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from llmrl.objectives.policy_gradient import PolicyGradient
from llmrl.objectives.presets import preset
from llmrl.objectives.scored import ScoredTokens, Totals

pytestmark = pytest.mark.slow  # importing TRL's online trainers takes seconds

LENGTHS = [3, 7, 1, 5]
LONGEST, TOKENS = max(LENGTHS), sum(LENGTHS)
MASK_ST = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
ADVANTAGES_S = torch.tensor([0.9, -1.1, 0.4, -0.2])


def table(scale: float, seed: int) -> Tensor:
    return scale * torch.randn(len(LENGTHS), LONGEST, generator=torch.Generator().manual_seed(seed))


OLD_ST = -table(1.0, 0).abs() - 0.1
NEW_ST, REFERENCE_ST = OLD_ST + table(0.3, 1), OLD_ST + table(0.4, 2)
BEHAVIOUR_ST, ENTROPIES_ST = OLD_ST + table(0.5, 3), table(1.0, 4).abs()


def ours(settings: PolicyGradient, sampler: bool = False) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, gradient [S, T] and metrics of the same tokens, flat."""
    kept = MASK_ST.bool()
    new_ST = NEW_ST.clone().requires_grad_()
    scored = ScoredTokens(
        sequence_index_N=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        turn_index_N=torch.zeros(TOKENS, dtype=torch.long),
        group_index_S=torch.tensor([0, 0, 1, 1]),
        totals=Totals(TOKENS, len(LENGTHS), 2),
        reference_logprobs_N=REFERENCE_ST[kept] if settings.beta else None,
        behaviour_logprobs_N=BEHAVIOUR_ST[kept] if sampler else None,
        values_S={"advantage": ADVANTAGES_S},
        token_values_N={"old_logprobs": OLD_ST[kept]},
        entropies_N=ENTROPIES_ST[kept],
    )
    loss, metrics = settings(new_ST[kept], scored)
    loss.backward()
    assert new_ST.grad is not None
    return loss.item(), new_ST.grad, metrics


def theirs(trainer: Any, **settings: Any) -> tuple[float, Tensor, dict[str, list[float]]]:
    new_ST = NEW_ST.clone().requires_grad_()
    stand_in = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type="dapo",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        accelerator=Accelerator(cpu=True),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (new_ST, ENTROPIES_ST, None),
    )
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    ratio = settings.pop("importance_sampling_ratio", None)
    for name, value in settings.items():
        setattr(arguments if hasattr(arguments, name) else stand_in, name, value)
    stand_in.args, stand_in._entropy_bonus_enabled = arguments, stand_in.entropy_coef > 0
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.long),
        "completion_ids": torch.zeros_like(MASK_ST),
        "completion_mask": MASK_ST,
        "advantages": ADVANTAGES_S,
        "old_per_token_logps": OLD_ST,
        "old_logps": (OLD_ST * MASK_ST).sum(1),
        "ref_per_token_logps": REFERENCE_ST,
        "num_items_in_batch": torch.tensor(float(TOKENS)),
    }
    if ratio is not None:
        stand_in.use_vllm, inputs["importance_sampling_ratio"] = True, ratio
    loss = trainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    assert new_ST.grad is not None
    return loss.item(), new_ST.grad, stand_in._metrics["train"]


def check_equal(mine: tuple[float, Tensor, dict[str, Tensor]], oracle: tuple[float, Tensor, dict[str, Any]]) -> None:
    assert mine[0] == pytest.approx(oracle[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(mine[1], oracle[1], rtol=1e-5, atol=1e-7)
    assert mine[1].abs().max() > 0
    shared = [name for name in oracle[2] if name in mine[2] and name != "policy_loss"]
    assert "entropy" in shared
    for name in shared:
        elements = mine[2][name]
        reduced = (
            elements.max() if name.endswith("max") else elements.min() if name.endswith("min") else elements.mean()
        )
        assert reduced.item() == pytest.approx(oracle[2][name][0], rel=1e-5, abs=1e-7), name


SEQUENCE_MEAN = "sequence_mean_token_mean"


@pytest.mark.parametrize(
    ("settings", "their_settings"),
    [
        (PolicyGradient(), {"loss_type": "dapo"}),
        (PolicyGradient(clip_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
        (preset("dapo_clip").policy_gradient(), {"loss_type": "dapo", "epsilon_high": 0.28}),
        (preset("grpo").policy_gradient(), {"loss_type": "grpo", "beta": 0.04}),
        (
            preset("grpo").policy_gradient(kl_by_ratio=True),
            {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        ),
        (preset("dr_grpo").policy_gradient(max_completion_length=16), {"loss_type": "dr_grpo"}),
        (
            preset("gspo").policy_gradient(),
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon_low": 3e-4,
                "epsilon_high": 4e-4,
            },
        ),
        (
            preset("gspo").policy_gradient(clip_low=0.2, clip_high=0.2),
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        ),
        (preset("cispo").policy_gradient(), {"loss_type": "cispo", "epsilon_high": 5.0}),
        (preset("cispo").policy_gradient(clip_high=0.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
        (PolicyGradient(dual_clip=1.4), {"loss_type": "dapo", "delta": 1.4}),
        (PolicyGradient(entropy_coef=0.02), {"loss_type": "dapo", "entropy_coef": 0.02}),
        (preset("loop").policy_gradient(), {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.1}),
    ],
    ids=lambda value: str(sorted(value.items())) if isinstance(value, dict) else "",
)
def test_grpo_family(settings: PolicyGradient, their_settings: dict[str, Any]) -> None:
    from trl import GRPOTrainer

    mine, oracle = ours(settings), theirs(GRPOTrainer, **their_settings)
    if settings.kl_by_ratio:
        oracle[2].pop("kl")  # TRL reports it times the ratio
    check_equal(mine, oracle)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_correction(correction: Any, level: Any) -> None:
    """TRL takes the weights ready made: here by its own lines, `vllm_importance_sampling_mode` LEVEL_CORRECTION."""
    from trl import GRPOTrainer

    differences = (OLD_ST - BEHAVIOUR_ST) * MASK_ST
    ratio = torch.exp(differences.sum(-1, keepdim=True) if level == "sequence" else differences)
    ratio = ratio.clamp(max=1.5) if correction == "truncate" else ratio.masked_fill(ratio > 1.5, 0.0)
    settings = preset("grpo").policy_gradient(correction=correction, correction_level=level, correction_cap=1.5)
    oracle = theirs(GRPOTrainer, loss_type="grpo", beta=0.04, importance_sampling_ratio=ratio)
    check_equal(ours(settings, sampler=True), oracle)


def test_rloo_with_trls_clipped_sequence_ratio() -> None:
    from trl import RLOOTrainer

    settings = preset("rloo").policy_gradient(clip="ppo")
    check_equal(ours(settings), theirs(RLOOTrainer))
    wide = preset("rloo").policy_gradient(clip="ppo", clip_low=0.9, clip_high=5.0)
    check_equal(ours(wide), theirs(RLOOTrainer, epsilon_low=0.9, epsilon_high=5.0))
