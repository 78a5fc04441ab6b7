"""What the ranks of a run tell one another: small Python objects, and whether one of them failed.

Invariants
- Every function is called on all ranks, in the same order: each is a collective, in which a rank waits for the others.
- What one rank fails with, all ranks raise: one that ended alone would leave the others waiting for it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from llmrl.errors import LlmrlError

T = TypeVar("T")


def gather(accelerator: Accelerator, mine: T) -> list[T]:
    """What every rank holds, in the order of the ranks."""
    if accelerator.num_processes == 1:
        return [mine]
    everyone: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def from_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives the first rank, on all of them; the others do not call it. What it raises, all raise."""
    said: list[tuple[Any, LlmrlError | None]] = [_outcome(work) if accelerator.is_main_process else (None, None)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(said, src=0)
    value, failure = said[0]
    if failure is not None:
        raise failure
    found: T = value
    return found


def all_do(accelerator: Accelerator, work: Callable[[], T] | None) -> T | None:
    """What this rank's `work` gives it, once all ranks have done theirs; None: it has nothing to do. Raises on all of
    them what one fails with."""
    value, failure = (None, None) if work is None else _outcome(work)
    raise_together(accelerator, failure)
    return value


def raise_together(accelerator: Accelerator, failure: LlmrlError | None) -> None:
    """Raise on every rank what any of them failed with, on each its own failure where it has one."""
    failures = [each for each in gather(accelerator, failure) if each is not None]
    if failures:
        raise failure or failures[0]


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it is so on one of the ranks at least."""
    return largest(accelerator, int(flag)) > 0


def largest(accelerator: Accelerator, value: int) -> int:
    """The largest of the ranks' numbers."""
    if accelerator.num_processes == 1:
        return value
    found = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)


def _outcome(work: Callable[[], T]) -> tuple[T | None, LlmrlError | None]:
    try:
        return work(), None
    except LlmrlError as error:
        return None, error
