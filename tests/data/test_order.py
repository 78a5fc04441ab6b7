"""The order of rows: a permutation in every epoch, a function of the step alone."""

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.data.order import epoch_order, rows_for_step

seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(st.integers(1, 300), seeds, st.integers(0, 5))
def test_every_epoch_has_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_rows, seed, epoch)) == list(range(num_rows))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), seeds)
def test_steps_laid_end_to_end_are_the_epochs_laid_end_to_end(num_rows: int, rows_per_step: int, seed: int) -> None:
    steps = 2 * num_rows // rows_per_step + 2
    taken = [row for step in range(steps) for row in rows_for_step(step, rows_per_step, num_rows, seed)]
    epochs = [row for epoch in range(len(taken) // num_rows + 1) for row in epoch_order(num_rows, seed, epoch)]
    assert len(taken) == steps * rows_per_step
    assert taken == epochs[: len(taken)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_same_in_every_version() -> None:
    """Checkpoints of an older version go on with these orders: if this fails, resumed runs see other rows."""
    assert epoch_order(10, 42, 0) == [0, 6, 8, 7, 3, 9, 4, 2, 5, 1]
    assert epoch_order(10, 42, 1) == [3, 2, 1, 7, 8, 5, 4, 0, 6, 9]


def test_global_random_states_are_neither_read_nor_changed() -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), str(np.random.get_state()), tuple(torch.get_rng_state().tolist())

    before = states()
    first = epoch_order(1000, 7, 3)
    assert states() == before
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert epoch_order(1000, 7, 3) == first


def test_impossible_requests_are_errors() -> None:
    for step, rows_per_step, num_rows in ((0, 4, 0), (0, 0, 4), (-1, 4, 4)):
        try:
            rows_for_step(step, rows_per_step, num_rows, 0)
        except ValueError:
            continue
        raise AssertionError((step, rows_per_step, num_rows))
