"""What is said of an update that is not finite where it is not the learning rate's doing."""

from collections.abc import Iterator
from contextlib import contextmanager

from llmrl.errors import RunFailedError

HUGE = 1e4
"""By which nobody means to multiply a loss."""


@contextmanager
def naming_huge(**factors: float) -> Iterator[None]:
    """Around an update: its failure names those of the loss's factors, by their keys, that are above HUGE."""
    try:
        yield
    except RunFailedError as error:
        huge = " and ".join(f"{name} {factor:g}" for name, factor in factors.items() if factor > HUGE)
        if not huge or type(error) is not RunFailedError:
            raise
        raise RunFailedError(f"{error} First of all lower {huge}, by which the loss is multiplied.") from error
