"""What an algorithm of the policy-gradient family is made of. Loads without torch: configurations read it."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmrl.objectives.settings import LossSettings

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.objectives.policy_gradient import PolicyGradient

Advantage = Literal["gae", "reward_to_go", "leave_one_out", "group_mean", "group_normalised", "batch_normalised"]
Place = Literal["none", "reward", "loss"]
Variance = Literal["none", "unbiased", "population"]


@dataclass(frozen=True)
class Algorithm:
    """How advantages are made, how the loss is built, where the reference comes in; `presets` has the published ones.

    advantage: how it is made; `gae` needs a critic,
    `batch_normalised` is the group's mean subtracted, then whitened over the batch's tokens. whitening: of `gae` and
    `reward_to_go`, by which variance. kl, beta: where the pull to the reference sits, and its weight. gamma, lam: of
    GAE. score_clip: scores are cut to +- this before they become token rewards. epochs: passes over a step's samples,
    updates: optimizer steps in each, unless rollouts_per_update says how many samples each takes.
    constant_divisor: an update divides by the sequences it should have, however many it has. dynamic_sampling: groups
    of equal reward are replaced by fresh ones. overlong_buffer: share of the longest answer over which the soft
    overlong punishment grows to -1; 0 is none. critic_warmup: steps at the start that train the critic alone.
    """

    advantage: Advantage
    loss: LossSettings = field(default_factory=LossSettings)
    whitening: Variance = "none"
    kl: Place = "none"
    beta: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    score_clip: float | None = None
    epochs: int = 1
    updates: int = 1
    rollouts_per_update: int | None = None
    constant_divisor: bool = False
    dynamic_sampling: bool = False
    overlong_buffer: float = 0.0
    critic_warmup: int = 0

    @property
    def needs_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def compares_step(self) -> bool:
        """Whether rollouts are better or worse than the step's others, and not than those of their prompt alone."""
        return self.advantage in ("gae", "reward_to_go")

    @property
    def needs_reference(self) -> bool:
        return self.kl != "none" and self.beta > 0

    def rollouts_in_update(self, rollouts: int) -> int:
        """Samples in one optimizer step, of `rollouts` that a step trains on."""
        return max(min(self.rollouts_per_update or math.ceil(rollouts / self.updates), rollouts), 1)

    def settings(
        self, max_completion_length: int | None = None, sequences_per_update: int | None = None, **own: Any
    ) -> LossSettings:
        """Those of the loss in batches of a certain size, with a caller's `own` over the algorithm's.

        max_completion_length: the constant of Dr.GRPO's divisor. sequences_per_update: LOOP's. Raises ValueError for
        settings that cannot be, and TypeError for unknown ones.
        """
        changes: dict[str, Any] = {"beta": self.beta} if self.kl == "loss" else {}
        if self.constant_divisor and sequences_per_update is not None:
            changes["sequences_divisor"] = sequences_per_update
        settings = dataclasses.replace(self.loss, **changes | own)
        if settings.aggregation != "sequence_sum_constant" or settings.length_divisor is not None:
            return settings
        if max_completion_length is None:
            raise ValueError("aggregation sequence_sum_constant divides by the longest length that was allowed")
        return dataclasses.replace(settings, length_divisor=max_completion_length)

    def policy_gradient(
        self, max_completion_length: int | None = None, sequences_per_update: int | None = None, **own: Any
    ) -> "PolicyGradient":
        """The objective of `settings`."""
        from llmrl.objectives.policy_gradient import PolicyGradient

        return PolicyGradient(**dataclasses.asdict(self.settings(max_completion_length, sequences_per_update, **own)))

    def advantages(
        self,
        scores_S: "Tensor",
        sequence_index_N: "Tensor",
        group_index_S: "Tensor",
        old_logprobs_N: "Tensor | None" = None,
        reference_logprobs_N: "Tensor | None" = None,
        values_N: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor | None]":
        """Scores of a whole step's sequences [S] -> advantages [N] of their scored tokens, and with GAE returns [N].

        With KL in the reward the old and the reference's log-probabilities are needed, with GAE the values. Raises
        ValueError where one is missing or a score is not finite.
        """
        from llmrl.objectives import advantages as adv

        beta = self.beta if self.kl == "reward" else 0.0
        if beta and (old_logprobs_N is None or reference_logprobs_N is None):
            raise ValueError("KL in the reward needs old_logprobs and reference_logprobs")
        old_N = scores_S.new_zeros(len(sequence_index_N)) if old_logprobs_N is None or not beta else old_logprobs_N
        reference_N = old_N if reference_logprobs_N is None or not beta else reference_logprobs_N

        if self.advantage in ("gae", "reward_to_go"):
            shaped = (scores_S, old_N, reference_N, sequence_index_N, beta, self.score_clip)
            rewards_N = adv.shaped_rewards(*shaped)
            returns_N = None
            if self.advantage == "reward_to_go":
                advantages_N = adv.reward_to_go(rewards_N, sequence_index_N, self.gamma)
            elif values_N is None:
                raise ValueError("advantage gae needs the critic's values")
            else:
                advantages_N, returns_N = adv.gae(rewards_N, values_N, sequence_index_N, self.gamma, self.lam)
            if self.whitening != "none":
                advantages_N = adv.whiten(advantages_N, unbiased=self.whitening == "unbiased")
            return advantages_N, returns_N

        rewards_S = adv.shaped_scores(scores_S, old_N, reference_N, sequence_index_N, beta)
        if self.advantage == "batch_normalised":
            lengths_S = sequence_index_N.bincount(minlength=len(scores_S))
            advantages_S = adv.batch_normalised(adv.group_mean(rewards_S, group_index_S), lengths_S)
        else:
            make = {
                "leave_one_out": adv.leave_one_out,
                "group_mean": adv.group_mean,
                "group_normalised": adv.group_normalised,
            }[self.advantage]
            advantages_S = make(rewards_S, group_index_S)
        return advantages_S[sequence_index_N], None
