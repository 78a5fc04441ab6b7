r"""The published algorithms of the policy-gradient family: a preset's name, and nothing else, is the algorithm.

Loads without torch, so that configurations can read it. Where a paper and its authors' code differ both are presets or
the difference is noted, and the bare name is the paper's:

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

from dataclasses import replace
from typing import Any, Literal

from llmrl.objectives.algorithm import Algorithm
from llmrl.objectives.settings import LossSettings

SEQUENCE_MEAN: Literal["sequence_mean_token_mean"] = "sequence_mean_token_mean"
LOOP = Algorithm(
    "leave_one_out",
    LossSettings(aggregation=SEQUENCE_MEAN, clip_low=0.1, clip_high=0.1),
    epochs=2,
    rollouts_per_update=32,
    constant_divisor=True,
)


def _loop(**changes: Any) -> Algorithm:
    """LOOP with these settings of its loss."""
    return replace(LOOP, loss=replace(LOOP.loss, **changes))


PRESETS: dict[str, Algorithm] = {
    "ppo": Algorithm("gae", LossSettings(value_coef=0.1), whitening="unbiased", kl="reward", beta=0.05, epochs=4),
    "loop": LOOP,
    "loop_code": _loop(clip="reciprocal"),
    "loop_turn": _loop(ratio="turn", aggregation="sequence_mean_turn_mean"),
    "loop_trajectory": _loop(ratio="sequence"),
    "rloo": Algorithm(
        "leave_one_out",
        LossSettings(ratio="sequence", clip="none", aggregation=SEQUENCE_MEAN),
        kl="reward",
        beta=0.05,
    ),
    "reinforce": Algorithm(
        "group_mean", LossSettings(ratio="none", clip="none", aggregation="sequence_mean_token_sum")
    ),
    "grpo": Algorithm("group_normalised", LossSettings(aggregation=SEQUENCE_MEAN), kl="loss", beta=0.04),
    "dr_grpo": Algorithm("group_mean", LossSettings(aggregation="sequence_sum_constant")),
    "gspo": Algorithm(
        "group_normalised",
        LossSettings(ratio="geometric", clip_low=3e-4, clip_high=4e-4, aggregation=SEQUENCE_MEAN),
    ),
    "cispo": Algorithm("group_normalised", LossSettings(clip="cispo", clip_low=1.0, clip_high=4.0)),
    "dapo_clip": Algorithm(
        "group_normalised", LossSettings(clip_high=0.28), updates=16, dynamic_sampling=True, overlong_buffer=0.2
    ),
    "reinforce_plus_plus": Algorithm("reward_to_go", whitening="population", kl="reward", beta=0.01),
    "reinforce_plus_plus_baseline": Algorithm("batch_normalised", LossSettings(kl="k2"), kl="loss", beta=0.001),
    "rlsp": Algorithm(
        "gae",
        LossSettings(value_coef=1.0),
        whitening="population",
        kl="reward",
        beta=0.05,
        score_clip=10.0,
        updates=4,
        critic_warmup=4,
    ),
    "pf_ppo": Algorithm(
        "gae",
        LossSettings(value_coef=1.0, aggregation=SEQUENCE_MEAN),
        whitening="population",
        kl="reward",
        beta=0.01,
        score_clip=10.0,
        updates=4,
    ),
}


def preset(name: str) -> Algorithm:
    """The algorithm of that name. ValueError for an unknown one, and for a bare `dapo`, which names two methods."""
    if name == "dapo":
        raise ValueError(
            "dapo names two methods: dapo_clip (ByteDance, arXiv 2503.14476, decoupled clipping, a preset here) and "
            "direct_advantage (Direct Advantage Policy Optimization, arXiv 2412.18279, a method of its own)"
        )
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
