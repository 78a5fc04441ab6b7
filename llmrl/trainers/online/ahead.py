"""Rollouts of the next step, collected in a thread while the learner trains on this one's."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from llmrl.rollout.collector import Collected
from llmrl.trainers.online.collected import Share, sound


class Ahead:
    """A collection in a thread of its own; `position` is the place in the rows before it."""

    def __init__(self, position: int, collect: Callable[[], list[Share]]) -> None:
        self.position = position
        self._future: Future[list[Share]] = Future()
        self._thread = Thread(target=self._run, args=(collect,), name="rollouts of the next step", daemon=True)
        self._thread.start()

    def _run(self, collect: Callable[[], list[Share]]) -> None:
        try:
            self._future.set_result(collect())
        except BaseException as error:
            self._future.set_exception(error)

    def wait(self) -> None:
        """Until it has ended, however it did."""
        self._thread.join()

    def result(self) -> list[Share]:
        """What it brought; raises what it raised."""
        return self._future.result()

    def sound(self) -> list[Collected] | None:
        """What it brought, or None where it failed."""
        self.wait()
        return None if self._future.exception() else sound(self._future.result())
