"""What a loss of the policy-gradient family is made of. Loads without torch, so that configurations can say it."""

from dataclasses import dataclass
from typing import Literal, get_args

Ratio = Literal["token", "turn", "sequence", "geometric", "none"]
Clip = Literal["ppo", "reciprocal", "cispo", "none"]
Aggregation = Literal[
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_turn_mean",
    "sequence_mean_token_sum",
    "sequence_sum_constant",
]
KL = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence", "geometric"]

CHOICES = {
    "ratio": get_args(Ratio),
    "clip": get_args(Clip),
    "aggregation": get_args(Aggregation),
    "kl": get_args(KL),
    "correction": get_args(Correction),
    "correction_level": get_args(CorrectionLevel),
}


@dataclass(frozen=True)
class LossSettings:
    """One member of the family; `llmrl.objectives.presets` has the published ones.

    ratio, clip, aggregation: `llmrl.objectives.policy_gradient` has the formulas. clip_low, clip_high: the band; CISPO
    with an absolute cap c and no lower bound is clip_low 1, clip_high c - 1. dual_clip: for A < 0 the ratio counts at
    most this much (above 1 + clip_high; verl 3).
    length_divisor: of `sequence_sum_constant`, which a loss of that kind needs. sequences_divisor: instead of n_S; LOOP
    divides a last, short mini-batch by the full size, so that fewer survivors make a smaller step.
    beta: weight of the KL term in the loss, by the estimator `kl`: k1 = -d, k2 = d^2/2, k3 = e^d - 1 - d with
    d = log pi_ref - log pi. The gradient of k1 is zero on average: it belongs into the reward. kl_by_ratio: times rho,
    which makes k3's gradient unbiased (TRL's use_bias_correction_kl, on by default there).
    entropy_coef: weight of the mean token entropy, subtracted. log_entropy: report it although its weight is 0.
    value_coef, value_clip: weight and clipping of the critic's loss (`llmrl.objectives.value`), aggregated alike.
    correction, correction_level, correction_floor, correction_cap: of the sampler's mismatch. A weight (of a token, of
    a sequence, or a sequence's geometric mean) is cut into [floor, cap], or set to 0 outside.
    """

    ratio: Ratio = "token"
    clip: Clip = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: Aggregation = "token_mean"
    length_divisor: float | None = None
    sequences_divisor: float | None = None
    beta: float = 0.0
    kl: KL = "k3"
    kl_by_ratio: bool = False
    entropy_coef: float = 0.0
    log_entropy: bool = False
    value_coef: float = 0.0
    value_clip: float | None = 0.2
    correction: Correction = "none"
    correction_level: CorrectionLevel = "token"
    correction_floor: float = 0.0
    correction_cap: float = 3.0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("beta", "entropy_coef", "value_coef", "clip_high", "correction_floor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("length_divisor", "sequences_divisor", "value_clip"):
            given = getattr(self, name)
            if given is not None and not given > 0:
                raise ValueError(f"{name} must be above 0, got {given}")
        _check_combinations(self)

    @property
    def band(self) -> tuple[float, float]:
        """[lo, hi], where rho is clipped."""
        if self.clip == "none":
            return 0.0, float("inf")
        low = 1 / (1 + self.clip_high) if self.clip == "reciprocal" else 1 - self.clip_low
        return low, 1 + self.clip_high


def _check_combinations(settings: LossSettings) -> None:
    """Raises ValueError for settings that would be ignored or make no loss."""
    s = settings
    low, high = s.band
    if s.clip != "none" and not 0 <= low <= 1 <= high:
        raise ValueError(f"clip_low must lie in [0, 1], got {s.clip_low}")
    if s.ratio == "none" and s.clip != "none":
        raise ValueError(f"ratio none leaves nothing for clip {s.clip}; set clip to none")
    if s.dual_clip is not None and (s.clip not in ("ppo", "reciprocal") or not s.dual_clip > high):
        raise ValueError(f"dual_clip must be above 1 + clip_high and needs clip ppo or reciprocal, got {s.dual_clip}")
    if s.length_divisor is not None and s.aggregation != "sequence_sum_constant":
        raise ValueError(f"length_divisor has no meaning with aggregation {s.aggregation}")
    if s.sequences_divisor is not None and s.aggregation == "token_mean":
        raise ValueError("sequences_divisor has no meaning with aggregation token_mean")
    if not s.correction_cap >= 1 or s.correction_floor > 1:
        raise ValueError(
            f"correction_floor .. correction_cap must hold 1, got {s.correction_floor}..{s.correction_cap}"
        )
