r"""The published algorithms of the policy-gradient family: a preset's name, and nothing else, is the algorithm.

Loads without torch, so that configurations can read it. A preset says three things: how the loss is built
(`LossSettings`), how advantages are made, and where the reference comes in. Where a paper and its authors'
code differ both are presets or the difference is noted, and the bare name is the paper's:

    ppo          arXiv 1707.06347 with GAE, critic, KL in the reward (arXiv 2203.02155); numbers as in TRL's former PPO
    loop         arXiv 2502.01600, Eq. 10: leave-one-out, ratio and clipping a token, mean over a rollout's action
                 tokens, then over rollouts. Clip and epochs stand only in the code
    loop_code    the same as the authors run it: clipped to [1/(1+e), 1+e] instead of [1-e, 1+e]
    loop_turn    the paper's ablation with a ratio a turn; the mean over turns is our reading, no text gives it
    loop_trajectory  Eq. 9, the paper's "bandit": one ratio a rollout
    rloo         arXiv 2402.14740: leave-one-out on the sequence's probability, unclipped, KL in the reward
    reinforce    reward less its group's mean, on the sequence's probability; on-policy
    grpo         arXiv 2402.03300: std-normalised, mean of sequence means, k3 in the loss at 0.04 (TRL: 0)
    dr_grpo      arXiv 2503.20783: no std, no length in the divisor but a constant, no KL
    gspo         arXiv 2507.18071: geometric mean of the ratios, clipped to 1 - 3e-4 .. 1 + 4e-4
    cispo        arXiv 2506.13585: the weight is clipped, no token dropped. The paper tunes only an upper bound that it
                 does not print: 5 is TRL's recommendation; verl's band is clip_low 0.2, clip_high 0.28
    dapo_clip    arXiv 2503.14476: clip-higher, global token mean, dynamic sampling, soft overlong punishment, no KL
    reinforce_plus_plus           arXiv 2501.03262: reward to go, normalised over the batch's tokens, KL in the reward
    reinforce_plus_plus_baseline  reward less its group's mean, then normalised over the batch; KL in the loss
    rlsp         arXiv 2502.06773: PPO with lambda 0.95, KL 0.05, critic warm-up of four rollouts (code)
    pf_ppo       arXiv 2409.06957: PPO as its authors' code runs it, mean of row means, scores cut to +-10

KL coefficients of `reinforce_plus_plus*` are not in what we read: 0.01 and 0.001 are ours. `rloo`'s is TRL's.
"""

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
class Preset:
    """One algorithm.

    loss: settings of LossSettings that differ from its defaults. advantage: how it is made; `gae` needs a critic,
    `batch_normalised` is the group's mean subtracted, then whitened over the batch's tokens. whitening: of `gae` and
    `reward_to_go`, by which variance. kl, beta: where the pull to the reference sits, and its weight. gamma, lam: of
    GAE. score_clip: scores are cut to +- this before they become token rewards. epochs: passes over a step's samples,
    updates: optimizer steps in each, unless rollouts_per_update says how many samples each takes.
    constant_divisor: an update divides by the sequences it should have, however many it has. dynamic_sampling: groups
    of equal reward are replaced by fresh ones. overlong_buffer: share of the longest answer over which the soft
    overlong punishment grows to -1; 0 is none. critic_warmup: steps at the start that train the critic alone.
    """

    advantage: Advantage
    loss: dict[str, Any] = field(default_factory=dict)
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
        """Those of the loss, with a caller's `own` over the preset's.

        max_completion_length: the constant of Dr.GRPO's divisor. sequences_per_update: LOOP's. Raises ValueError for
        settings that cannot be, and TypeError for unknown ones.
        """
        settings = dict(self.loss)
        if self.kl == "loss":
            settings["beta"] = self.beta
        if self.constant_divisor and sequences_per_update is not None:
            settings["sequences_divisor"] = sequences_per_update
        settings |= own
        if settings.get("aggregation") == "sequence_sum_constant" and settings.get("length_divisor") is None:
            if max_completion_length is None:
                raise ValueError("aggregation sequence_sum_constant divides by the longest length that was allowed")
            settings["length_divisor"] = max_completion_length
        return LossSettings(**settings)

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


SEQUENCE_MEAN = "sequence_mean_token_mean"
CLIP_LOOP = {"clip_low": 0.1, "clip_high": 0.1}
UPDATES_LOOP: dict[str, Any] = {"epochs": 2, "rollouts_per_update": 32, "constant_divisor": True}

PRESETS: dict[str, Preset] = {
    "ppo": Preset("gae", {"value_coef": 0.1}, whitening="unbiased", kl="reward", beta=0.05, epochs=4),
    "loop": Preset("leave_one_out", {"aggregation": SEQUENCE_MEAN, **CLIP_LOOP}, **UPDATES_LOOP),
    "loop_code": Preset(
        "leave_one_out", {"clip": "reciprocal", "aggregation": SEQUENCE_MEAN, **CLIP_LOOP}, **UPDATES_LOOP
    ),
    "loop_turn": Preset(
        "leave_one_out", {"ratio": "turn", "aggregation": "sequence_mean_turn_mean", **CLIP_LOOP}, **UPDATES_LOOP
    ),
    "loop_trajectory": Preset(
        "leave_one_out", {"ratio": "sequence", "aggregation": SEQUENCE_MEAN, **CLIP_LOOP}, **UPDATES_LOOP
    ),
    "rloo": Preset(
        "leave_one_out",
        {"ratio": "sequence", "clip": "none", "aggregation": SEQUENCE_MEAN},
        kl="reward",
        beta=0.05,
    ),
    "reinforce": Preset("group_mean", {"ratio": "none", "clip": "none", "aggregation": "sequence_mean_token_sum"}),
    "grpo": Preset("group_normalised", {"aggregation": SEQUENCE_MEAN}, kl="loss", beta=0.04),
    "dr_grpo": Preset("group_mean", {"aggregation": "sequence_sum_constant"}),
    "gspo": Preset(
        "group_normalised",
        {"ratio": "geometric", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": SEQUENCE_MEAN},
    ),
    "cispo": Preset("group_normalised", {"clip": "cispo", "clip_low": 1.0, "clip_high": 4.0}),
    "dapo_clip": Preset(
        "group_normalised", {"clip_high": 0.28}, updates=16, dynamic_sampling=True, overlong_buffer=0.2
    ),
    "reinforce_plus_plus": Preset("reward_to_go", whitening="population", kl="reward", beta=0.01),
    "reinforce_plus_plus_baseline": Preset("batch_normalised", {"kl": "k2"}, kl="loss", beta=0.001),
    "rlsp": Preset(
        "gae",
        {"value_coef": 1.0},
        whitening="population",
        kl="reward",
        beta=0.05,
        score_clip=10.0,
        updates=4,
        critic_warmup=4,
    ),
    "pf_ppo": Preset(
        "gae",
        {"value_coef": 1.0, "aggregation": SEQUENCE_MEAN},
        whitening="population",
        kl="reward",
        beta=0.01,
        score_clip=10.0,
        updates=4,
    ),
}


def preset(name: str) -> Preset:
    """The algorithm of that name. ValueError for an unknown one, and for a bare `dapo`, which names two methods."""
    if name == "dapo":
        raise ValueError(
            "dapo names two methods: dapo_clip (ByteDance, arXiv 2503.14476, decoupled clipping, a preset here) and "
            "direct_advantage (Direct Advantage Policy Optimization, arXiv 2412.18279, a method of its own)"
        )
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
