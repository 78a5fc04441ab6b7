"""Ranks that wait for one another without a collective, here as threads with a store in memory between them."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from llmrl.learner import meeting
from llmrl.learner.meeting import Meeting, RankLostError


class Ranks:
    """Two ranks' meeting places, in one process."""

    def __init__(
        self, patch: pytest.MonkeyPatch, silence: float = 60.0, store: HashStore | None = None, number: int = 0
    ) -> None:
        store = store or HashStore()
        patch.setattr(meeting, "_get_default_store", lambda: store)
        self.first, self.second = (
            Meeting(SimpleNamespace(process_index=rank, num_processes=2), timedelta(seconds=silence), number)  # type: ignore[arg-type]
            for rank in (0, 1)
        )


def beside(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def never() -> bool:
    return False


def test_the_first_to_come_waits_for_the_last_at_every_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, order = Ranks(monkeypatch), []

    def comes_first() -> None:
        for number in range(3):
            ranks.first.wait(never)
            order.append(("gone on", number))

    waiting = beside(comes_first)
    for number in range(3):
        time.sleep(0.05)
        order.append(("came", number))
        ranks.second.wait(never)
        while ("gone on", number) not in order:
            time.sleep(0.001)
    waiting.join(10)
    assert order == [(what, number) for number in range(3) for what in ("came", "gone on")]


def test_what_an_earlier_run_said_is_not_heard_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    earlier = Ranks(monkeypatch, store=store)
    assert earlier.first.stop_asked(True)
    assert earlier.second.stop_asked(False)
    later = Ranks(monkeypatch, store=store, number=1)
    assert not later.second.stop_asked(False)


def test_a_wish_to_stop_is_heard_by_who_works_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    assert not ranks.first.stop_asked(False)
    waiting = beside(lambda: ranks.second.wait(lambda: True))
    while not ranks.first.stop_asked(False):
        time.sleep(0.001)
    ranks.first.wait(never)
    waiting.join(10)
    assert not waiting.is_alive()
    assert ranks.first.stop_asked(False)
    assert ranks.second.stop_asked(False)


def test_one_that_works_is_waited_for_beyond_the_limit_of_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, silence=0.5)

    def works() -> None:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            ranks.second.stop_asked(False)
            time.sleep(0.01)
        ranks.second.wait(never)

    working = beside(works)
    ranks.first.wait(never)
    working.join(10)


def test_one_of_which_nothing_is_heard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankLostError, match=r"nothing was heard of process 1 for 0 s"):
        Ranks(monkeypatch, silence=0.1).first.wait(never)


def test_a_store_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)

    def gone(key: str, number: int) -> int:
        raise RuntimeError("Connection reset by peer\nFrames: ...")

    ranks.second._store = SimpleNamespace(add=gone)  # type: ignore[assignment]
    with pytest.raises(RankLostError, match=r"launcher is gone \(Connection reset by peer\)$"):
        ranks.second.stop_asked(False)


def test_one_process_alone_waits_for_nobody() -> None:
    alone = Meeting(SimpleNamespace(process_index=0, num_processes=1))  # type: ignore[arg-type]
    alone.wait(never)
    assert not alone.stop_asked(False)
    assert alone.stop_asked(True)
