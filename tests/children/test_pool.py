"""Child processes: hangs, crashes, memory, and that none is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from llmrl.children.pool import KEPT_VARIABLES, ChildStartError
from llmrl.rewards.verifiers import Verifiers

HANGS = [r"9^{9^{9^{9}}}", r"(10^{10})!", r"\binom{10^9}{5\cdot 10^8}", r"\sum_{n=1}^{10^{9}} \frac{1}{n^3}"]
CATASTROPHIC = {"pattern": "(a+)+b", "text": "a" * 60}


@pytest.fixture
def pool() -> Iterator[Verifiers]:
    made = Verifiers(processes=1, seconds=1.5)
    yield made
    made.close()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return holds()


def test_a_verification(pool: Verifiers) -> None:
    assert pool.pids == []
    assert pool.submit("equal", gold=r"\frac{1}{2}", answer="0.5").result().value == 1.0
    assert pool.submit("equal", gold="x+1", answer="1+x").result().value == 1.0
    assert pool.submit("equal", gold="x+1", answer="x-1").result().value == 0.0
    assert len(pool.pids) == 1


@pytest.mark.parametrize("hostile", [HANGS[0], *(pytest.param(h, marks=pytest.mark.slow) for h in HANGS[1:])])
def test_what_hangs_is_killed_and_the_next_one_is_answered(pool: Verifiers, hostile: str) -> None:
    pool.submit("equal", gold="1", answer="2").result()
    (first,) = pool.pids
    answer = pool.submit("equal", gold="x+7", answer=hostile).result()
    assert answer.value is None
    assert "within 1.5 s" in answer.reason
    assert gone(first)
    assert pool.submit("equal", gold="7", answer="7.0").result().value == 1.0
    assert (pool.counts.killed, pool.counts.started) == (1, 2)


def test_a_pattern_that_never_ends_is_killed_though_it_never_lets_go_of_the_interpreter(pool: Verifiers) -> None:
    assert pool.submit("match", **CATASTROPHIC).result().value is None
    assert pool.counts.killed == 1
    assert pool.submit("match", pattern="a.*b$", text="a\nb").result().value == 1.0


def test_a_second_child_is_started_only_where_there_is_work_for_two() -> None:
    pool = Verifiers(processes=2, seconds=20.0)
    try:
        for _ in range(3):
            assert pool.submit("equal", gold="1", answer="1.0").result().value == 1.0
        assert (len(pool.pids), pool.counts.started) == (1, 1)
    finally:
        pool.close()


def test_a_child_that_dies_in_a_request_costs_that_request_only(pool: Verifiers) -> None:
    pool.submit("equal", gold="1", answer="2").result()
    (pid,) = pool.pids
    running = pool.submit("match", **CATASTROPHIC)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    answer = running.result()
    assert (answer.value, answer.reason) == (None, "the child process ended by signal 9")
    assert pool.submit("equal", gold="1", answer="1.0").result().value == 1.0
    assert pool.counts.crashed == 1


def test_a_child_that_dies_between_requests_costs_nothing(pool: Verifiers) -> None:
    pool.submit("equal", gold="1", answer="2").result()
    (pid,) = pool.pids
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: gone(pid))
    assert pool.submit("equal", gold="1", answer="1.0").result().value == 1.0


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    pool = Verifiers(processes=1, seconds=20.0, memory_mb=300)
    try:
        answer = pool.submit("match", pattern="b", text="a" * (120 << 20)).result()
        assert answer.value is None
        assert answer.reason.startswith("the child process ended")
        assert pool.submit("equal", gold="1", answer="1.0").result().value == 1.0
    finally:
        pool.close()


def test_an_exception_is_no_score(pool: Verifiers) -> None:
    answer = pool.submit("equal", gold="1").result()
    assert (answer.value, answer.reason) == (None, "KeyError: 'answer'")
    assert pool.submit("equal", gold="{", answer="1").result().value == 0.0
    assert pool.submit("equal", gold="", answer="1").result().value is None


@pytest.mark.slow
def test_the_event_loop_goes_on_and_others_are_not_delayed() -> None:
    pool = Verifiers(processes=2, seconds=3.0)

    async def run() -> tuple[list[str], int]:
        order: list[str] = []
        ticks = 0

        async def one(name: str, **request: str) -> None:
            await pool.ask(**request)
            order.append(name)

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        quick = [one("quick", kind="equal", gold="1", answer=str(i)) for i in range(20)]
        await asyncio.gather(one("slow", kind="match", **CATASTROPHIC), *quick)
        ticking.cancel()
        return order, ticks

    try:
        for _ in range(2):  # a pool serves one event loop after another
            order, ticks = asyncio.run(run())
            assert order == ["quick"] * 20 + ["slow"]
            assert ticks > 20
    finally:
        pool.close()


def test_close_leaves_no_process_even_in_the_middle_of_a_request() -> None:
    pool = Verifiers(processes=2, seconds=600.0)
    running = [pool.submit("match", **CATASTROPHIC) for _ in range(3)]
    assert wait_until(lambda: len(pool.pids) == 2 and pool.counts.started == 2)
    pids = pool.pids
    pool.close()
    assert all(gone(pid) for pid in pids)
    assert pool.pids == []
    assert [future.result(timeout=10).value for future in running] == [None] * 3
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("equal", gold="1", answer="1")


def test_killed_pools_leave_nobody_after_many_hangs(pool: Verifiers) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    pool.seconds = 0.2
    for _ in range(4):
        assert pool.submit("match", **CATASTROPHIC).result().value is None
    pool.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


PARENT = """
import sys, time
from llmrl.rewards.verifiers import Verifiers
pool = Verifiers(processes=2, seconds=2.0)
for _ in range(2):
    pool.submit("equal", gold="1", answer="2")
while pool.counts.answered < 2 or len(pool.pids) < 2:
    time.sleep(0.01)
pool.submit("match", pattern="(a+)+b", text="a" * 60)
time.sleep(0.2)
print(*pool.pids, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_children_end_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    assert wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_child_does_not_see_our_environment_nor_import_torch(
    monkeypatch: pytest.MonkeyPatch, pool: Verifiers
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    pool.submit("equal", gold="1", answer="2").result()
    process = psutil.Process(pool.pids[0])
    assert set(process.environ()) <= {*KEPT_VARIABLES, "PYTHONPATH"}
    assert process.memory_info().rss < 300 << 20
    assert not [m for m in process.memory_maps() if "libtorch" in m.path]


def test_where_no_child_can_be_started_its_words_are_told() -> None:
    pool = Verifiers(processes=1, memory_mb=20)
    try:
        with pytest.raises(ChildStartError, match="did not start"):
            pool.submit("equal", gold="1", answer="1").result()
        for _ in range(2):
            with pytest.raises(ChildStartError):
                pool.submit("equal", gold="1", answer="1").result()
        with pytest.raises(ChildStartError, match="3 times in a row"):
            pool.submit("equal", gold="1", answer="1").result()
        assert pool.pids == []
    finally:
        pool.close()
