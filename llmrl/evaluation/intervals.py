"""Confidence intervals of what evaluations report."""

import math

Z_95 = 1.959963984540054


def difference_interval(after: float, n_after: int, before: float, n_before: int) -> tuple[float, float]:
    """95% interval of p_after - p_before, the proportions of `after` and `before` successes in independent trials.

    Newcombe 1998, Statistics in Medicine 17, 873-890, method 10: the two Wilson intervals' distances, root of squares.
    """
    p, q = after / n_after, before / n_before
    (p_low, p_high), (q_low, q_high) = wilson_interval(after, n_after), wilson_interval(before, n_before)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


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
