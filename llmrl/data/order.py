"""Which rows a step sees, as a pure function of the step.

Invariants: nothing is remembered between calls, so a resumed run needs only the number of its step; no global random
state is read or changed; in every epoch each row comes exactly once.
"""

import functools
import hashlib

import numpy as np


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The rows 0 .. num_rows - 1 in the order of this epoch (from 0)."""
    return _permutation(num_rows, seed, epoch).tolist()


def rows_for_step(step: int, rows_per_step: int, num_rows: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (from 0), `rows_per_step` of them.

    A step that reaches the end of an epoch goes on into the next one, so every step has the same number of rows.
    """
    if num_rows < 1 or rows_per_step < 1 or step < 0:
        raise ValueError(f"no rows for step {step} of {rows_per_step} rows from {num_rows}")
    rows: list[int] = []
    position = step * rows_per_step
    while len(rows) < rows_per_step:
        epoch, start = divmod(position, num_rows)
        taken = _permutation(num_rows, seed, epoch)[start : start + rows_per_step - len(rows)].tolist()
        rows += taken
        position += len(taken)
    return rows


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises that RandomState, unlike Generator, draws the same numbers in every later version: a checkpoint
    # can be resumed after an upgrade.
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4")).permutation(num_rows)
