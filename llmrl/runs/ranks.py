"""Which process of how many this is, as accelerate and torchrun tell it in the environment: no torch needed."""

import os


def rank() -> int:
    """This process's number over all machines; 0 writes and speaks."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0
