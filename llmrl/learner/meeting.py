"""Ranks that wait for one another for as long as it takes, and hear meanwhile whether one of them was asked to stop.

A collective has a time limit, and a process inside one hears no signal. Rollouts have no limit: what may keep one rank
busy for hours ends in a meeting, where the others look into the process group's store a few times a second.

Invariants
- All ranks come to the same meetings in the same order. A wish to stop is never taken back.
- Nobody waits for a rank that is gone: one of which nothing was heard for `SILENCE` ends the wait with an error.
"""

import itertools
import time
from collections.abc import Callable
from datetime import timedelta

from accelerate import Accelerator
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from llmrl.errors import RunFailedError

SILENCE = timedelta(minutes=30)
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks into the store: a short wait is over soon, a long one costs nothing."""


class RankLostError(RunFailedError):
    """A rank is gone, so that nothing can be done together any more, not even a checkpoint."""


class Meeting:
    """The meeting place of a run's ranks; with one rank nobody is waited for."""

    _numbers = itertools.count()

    def __init__(self, accelerator: Accelerator, silence: timedelta = SILENCE, number: int | None = None) -> None:
        """Made by all ranks, once a run. `silence`: how long nothing may be heard of a rank that is waited for.

        `number`: of the run among those in these processes; None counts them.
        """
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.silence = silence.total_seconds()
        self._store: Store | None = None
        if self.world_size > 1:
            number = next(self._numbers) if number is None else number
            self._store = PrefixStore(f"llmrl/meeting/{number}", _get_default_store())
        self._met, self._told = 0, False

    def stop_asked(self, here: bool) -> bool:
        """Whether any rank was asked to stop; `here`: this one was.

        Says as well that this rank is at work: to be called every few seconds while others may wait for it.
        """
        if self._store is None:
            return here
        self._add(f"beat/{self.rank}", 1)
        tell, self._told = here and not self._told, self._told or here
        return self._add("stop", int(tell)) > 0

    def wait(self, asked: Callable[[], bool]) -> None:
        """Until all ranks are here; `asked` tells whether this one was asked to stop, which the others then hear.

        Raises RankLostError where one of them is gone.
        """
        if self._store is None:
            return
        self._met += 1
        self._add("arrived", 1)
        heard, pause = _LastHeard(self), FIRST_PAUSE
        # The number counts arrivals at all meetings, and nobody comes to the next one before everyone was at this one.
        while self._add("arrived", 0) < self._met * self.world_size:
            self.stop_asked(asked())
            heard.look()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def beats(self, rank: int) -> int:
        """How often something was heard of a rank."""
        return self._add(f"beat/{rank}", 0)

    def _add(self, key: str, number: int) -> int:
        assert self._store is not None
        try:
            return self._store.add(key, number)
        except RuntimeError as error:  # torch's DistError, or what an older store raises
            raise RankLostError(f"the first process or its launcher is gone ({str(error).splitlines()[0]})") from error


class _LastHeard:
    """When a waiting rank has last seen the others at work."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting, self._looked_at = meeting, time.monotonic()
        self._beats = dict.fromkeys(range(meeting.world_size), -1)
        self._changed_at = dict.fromkeys(range(meeting.world_size), self._looked_at)

    def look(self) -> None:
        """Raises RankLostError where one has been silent for too long; looks ten times within that."""
        now, silence = time.monotonic(), self._meeting.silence
        if now - self._looked_at < silence / 10:
            return
        self._looked_at = now
        for rank, before in self._beats.items():
            beats = self._meeting.beats(rank)
            if beats != before:
                self._beats[rank], self._changed_at[rank] = beats, now
            elif now - self._changed_at[rank] > silence:
                raise RankLostError(
                    f"nothing was heard of process {rank} for {silence:,.0f} s while the others waited for it: it is "
                    "gone, or hangs"
                )
