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


class RowCursor:
    """Rows one after another, in the same order as `rows_for_step`, for steps that take as many as they need.

    `position` counts the rows taken since the start; `state_dict` and `load_state_dict` put it into a checkpoint.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed, self.position = num_rows, seed, 0

    def take(self, count: int) -> list[int]:
        """The next `count` rows."""
        rows = []
        for position in range(self.position, self.position + count):
            epoch, place = divmod(position, self.num_rows)
            rows.append(int(_permutation(self.num_rows, self.seed, epoch)[place]))
        self.position += count
        return rows

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises that RandomState, unlike Generator, draws the same numbers in every later version: a checkpoint
    # can be resumed after an upgrade.
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4")).permutation(num_rows)
