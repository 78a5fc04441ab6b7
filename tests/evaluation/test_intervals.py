"""Wilson's interval against published values and its own definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.evaluation.intervals import Z_95, paired_difference_interval, student_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_values_of_newcombe_1998(successes, n, low, high):
    """Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def trials(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(after, before) of so many trials of each kind."""
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return after, [True] * both + [False] * gained + [True] * lost + [False] * neither


def test_the_paired_difference_of_a_published_table():
    """Airway hyper-responsiveness of Bentur et al. 2009: 1, 1, 7, 12 of 21 children; interval -0.507 to -0.026."""
    after, before = trials(1, 1, 7, 12)
    assert paired_difference_interval(after, before) == pytest.approx((-0.507, -0.026), abs=5e-4)
    assert paired_difference_interval(before, after) == pytest.approx((0.026, 0.507), abs=5e-4)


def test_without_agreement_beyond_chance_it_is_the_independent_one():
    """80 and 40 of 100: the distances to the ends of the two Wilson intervals, squared and added."""
    after, before = trials(32, 48, 8, 12)
    (p_low, p_high), (q_low, q_high) = wilson_interval(80, 100), wilson_interval(40, 100)
    expected = 0.4 - math.hypot(0.8 - p_low, q_high - 0.4), 0.4 + math.hypot(p_high - 0.8, 0.4 - q_low)
    assert paired_difference_interval(after, before) == pytest.approx(expected)


def test_what_two_results_have_in_common_narrows_the_interval():
    """The same two rates, on trials that agree more or less."""
    widths = [
        high - low
        for low, high in (paired_difference_interval(*trials(*t)) for t in ((58, 14, 2, 26), (45, 27, 15, 13)))
    ]
    assert widths[0] < 0.75 * widths[1]
    assert paired_difference_interval([True] * 9, [True] * 9) == pytest.approx((-0.2991, 0.2991), abs=1e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bounds_solve_the_score_equation(case):
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(successes / n - bound) == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_ends_are_exact():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_more_successes_than_trials():
    with pytest.raises(ValueError, match="8 successes in 7 trials"):
        wilson_interval(8, 7)


def test_the_interval_of_a_mean_over_seeds_is_students():
    """Mean 0.3, standard deviation 0.1: 4.303 x 0.1 / sqrt(3) = 0.2484 around it."""
    assert student_interval([0.2, 0.3, 0.4]) == pytest.approx((0.3, 0.0516, 0.5484), abs=1e-4)
    mean, low, high = student_interval([0.25])
    assert mean == 0.25
    assert math.isnan(low)
    assert math.isnan(high)
