"""Which process of how many this is, as accelerate and torchrun tell it in the environment: no torch needed."""

import os
import sys


def rank() -> int:
    """This process's number over all machines; 0 writes and speaks."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def leave_group() -> None:
    """Ends this process's part in torch's process group, where there is one.

    A process that just exits may be aborted by the group's own threads, and the launcher then reports a failure.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
