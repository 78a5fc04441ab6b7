"""Confidence intervals of what evaluations report."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z_95 = 1.959963984540054
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom: 97.5% of it lie below."""


def paired_difference_interval(after: Sequence[bool], before: Sequence[bool]) -> tuple[float, float]:
    """95% interval of the difference of two success rates, `after` - `before`, in the same trials, in the same order.

    Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10: as for independent rates the distances to the ends
    of the two Wilson intervals are squared and added, less what the rates have in common, by their correlation phi.
    """
    n = len(after)
    pairs = list(zip(after, before, strict=True))
    both, gained = pairs.count((True, True)), pairs.count((True, False))
    lost, neither = pairs.count((False, True)), pairs.count((False, False))
    p, q = (both + gained) / n, (both + lost) / n
    (p_low, p_high), (q_low, q_high) = wilson_interval(both + gained, n), wilson_interval(both + lost, n)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    agreement: float = both * neither - gained * lost
    agreement = max(agreement - n / 2, 0) if agreement > 0 else agreement
    phi = agreement / math.sqrt(margins) if margins else 0.0

    def added(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return p - q - added(p - p_low, q_high - q), p - q + added(p_high - p, q - q_low)


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, `successes` of `n` trials; 95% unless `z` says otherwise.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); unlike p -+ z s it is never empty at 0 or n successes.
    No trials: (0, 1). Raises ValueError where `successes` is not between 0 and n.
    """
    if n == 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the exact bound is 0 or 1; rounding must not leave 1e-17 there.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def mean_interval(values: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """(mean, low, high): of zeros and ones Wilson's interval, else mean -+ z s / sqrt(n); NaN without a value."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan, math.nan
    mean = sum(values) / n
    if all(value in (0, 1) for value in values):
        return mean, *wilson_interval(sum(values), n, z)
    half = z * math.sqrt(sum((value - mean) ** 2 for value in values) / max(n - 1, 1) / n)
    return mean, mean - half, mean + half


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95% interval of the mean of one to ten values, such as those of seeds; of a single
    value NaN."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
