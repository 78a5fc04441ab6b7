r"""A critic's regression on returns, alone or beside a policy term.

With V_t the value before token t, G_t its return (`advantages.gae`) and V_old the value that the return was made with:

    L_V = 1/2 mean_t max( (V_t - G_t)^2, (V_old + clip(V_t - V_old, -d, d) - G_t)^2 )

as in PPO's implementations (Schulman et al., arXiv 1707.06347; the larger of the two, as in TRL, verl and OpenRLHF), or
without the clipped half. Which weights the gradient of V reaches is the learner's business.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmrl.objectives.scored import Objective, ScoredTokens


def value_losses(
    values_N: Tensor, returns_N: Tensor, old_values_N: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """[N] -> [N]: half the squared error, the larger of unclipped and clipped where `clip` and old values are given."""
    losses_N = (values_N - returns_N) ** 2
    if clip is not None and old_values_N is not None:
        near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        losses_N = torch.maximum(losses_N, (near_N - returns_N) ** 2)
    return 0.5 * losses_N


def predicted(scored: ScoredTokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, returns and old values [N] of a micro-batch; ValueError names what is missing."""
    if scored.predicted_values_N is None:
        raise ValueError("a value loss needs a model with a value head")
    if "returns" not in scored.token_values_N:
        raise ValueError('a value loss needs token_values["returns"]: see llmrl.objectives.advantages.gae')
    return scored.predicted_values_N, scored.token_values_N["returns"], scored.token_values_N.get("old_values")


def value_metrics(scored: ScoredTokens) -> dict[str, Tensor]:
    """Values, returns and their squared distance, per token: a critic that has learned is nearer than their spread."""
    values_N, returns_N, _ = predicted(scored)
    return {
        "values/mean": values_N.detach(),
        "values/return_mean": returns_N,
        "values/squared_error": (values_N.detach() - returns_N) ** 2,
    }


@dataclass(frozen=True)
class ValueRegression:
    """The critic alone: what a warm-up runs before the policy moves (RLSP's code: the first 4 rollouts).

    value_clip: d above, None for no clipping. The mean is over all tokens of the step.
    """

    value_clip: float | None = 0.2

    def objective(self) -> Objective:
        return Objective(self.__call__)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        losses_N = value_losses(*predicted(scored), self.value_clip) * scored.weights_S[scored.sequence_index_N]
        # The zero keeps the log-probabilities in the graph: ranks that share gradients expect one of every parameter.
        loss = losses_N.sum() / (scored.totals.tokens or 1.0) + 0.0 * logprobs_N.sum()
        return loss, {"value_loss": loss.detach(), **value_metrics(scored)}
