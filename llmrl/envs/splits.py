"""Rows of which none is in both splits.

A row's split is decided by a hash of what makes it the row it is, so no seed, count or order can move it.
"""

import hashlib
from collections.abc import Iterable
from random import Random

from llmrl.envs.protocol import Row, Split
from llmrl.errors import RefusedError

TEST_PERCENT = 20


def split_of(key: str) -> Split:
    """The split of a row from `key`, which spells what makes it different from others."""
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return "test" if percent < TEST_PERCENT else "train"


def pick(candidates: Iterable[tuple[str, Row]], split: Split, count: int, world: str) -> list[Row]:
    """The first `count` different rows of `split` among (key, row) candidates; fewer where there are no more.

    Raises RefusedError, naming the `world`, where there is none at all.
    """
    if split not in ("train", "test"):
        raise RefusedError(f"{world} has the splits `train` and `test`, not `{split}`")
    chosen: dict[str, Row] = {}
    for key, row in candidates:
        if len(chosen) >= count:
            break
        if key not in chosen and split_of(key) == split:
            chosen[key] = row
    if not chosen and count > 0:
        raise RefusedError(
            f"{world} is too small: none of its episodes is in the {split} split. Remedy: make it larger."
        )
    return list(chosen.values())


def sampled(total: int, count: int, seed: int) -> list[int]:
    """Different indices below `total` in random order: all of them, or enough for `count` rows of either split."""
    return Random(seed).sample(range(total), min(total, 1000 + count * 1000 // TEST_PERCENT))
