"""Items and scorers of reasoning-gym, in child processes of their own (`reasoning_scorer.py`).

Invariants: a score is a finite number from a process that answered in time; a process that hangs or dies costs this one
answer and is replaced.
"""

import functools
from typing import Any

from llmrl.children.pool import Answer, ChildPool, ChildStartError
from llmrl.errors import RefusedError

PROCESSES = 2
MAKE_SECONDS = 300.0
MEMORY_MB = 4096
VARIABLES = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0"}
"""Of the children: texts must hash alike in all of them, for the same seed to make the same items."""


class Scorer:
    """Children that are started when they are needed; safe to call from many threads, which wait for the answer."""

    def __init__(self) -> None:
        self.pool = ChildPool("llmrl.envs.reasoning_scorer", PROCESSES, MAKE_SECONDS, MEMORY_MB, VARIABLES)

    def score(self, item: dict[str, Any], deadline: float) -> float | None:
        """The score of an item's answer, or None where the scorer did not answer within `deadline` seconds.

        0 where the scorer raised an exception. Raises RefusedError where the item is not what it was.
        """
        return self._answer(self.pool.submit("score", deadline, **item).result())

    def items(self, which: dict[str, Any]) -> list[list[str]]:
        """[question, answer] of the items that `which` names; raises RefusedError where they cannot be made."""
        try:
            found = self.pool.submit("items", **which).result()
        except ChildStartError as error:
            raise RefusedError(f"reasoning_gym:{which['task']} makes no items: {error}") from error
        items = self._answer(found)
        if items is None:
            raise RefusedError(f"reasoning_gym:{which['task']} made no items: {found.reason}")
        return list(items)

    def close(self) -> None:
        """End the children; nothing can be asked any more."""
        self.pool.close()

    def _answer(self, found: Answer) -> Any:
        if isinstance(found.value, dict):
            raise RefusedError(found.value["fault"])
        return found.value


@functools.cache
def scorer() -> Scorer:
    """The one of this process."""
    return Scorer()
