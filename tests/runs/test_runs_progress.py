"""Rates, times and the two ways of showing them."""

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.runs import progress as progress_module
from llmrl.runs.console import Console, SafeStream
from llmrl.runs.progress import Progress, clock

RECIPE = Path(__file__).with_name("toy_recipe.py")


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 5.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def shown(
    progress_steps: list[tuple[float, int, float, int | None]], time: Clock, total: int = 10, start: int = 0
) -> list[str]:
    stream = io.StringIO()
    with Progress(Console(stream=stream), total, start, tokens=0 if start == 0 else None) as progress:
        for seconds, step, loss, tokens in progress_steps:
            time.now += seconds
            progress.step(step, loss, tokens)
    return stream.getvalue().splitlines()


def test_rates_and_the_time_left_follow_from_what_was_done(time: Clock):
    with Progress(Console(quiet=True), 10, 0, tokens=0) as progress:
        assert (progress.tokens_per_second, progress.seconds_left) == (None, None)
        for step in (1, 2, 3, 4):
            time.now += 2.0
            progress.step(step, 0.5, step * 300)
    assert progress.tokens_per_second == 150.0
    assert progress.seconds_left == 12.0


def test_a_resumed_run_counts_from_where_it_goes_on(time: Clock):
    with Progress(Console(quiet=True), 10, 6, tokens=6000) as progress:
        time.now += 4.0
        progress.step(7, 0.5, 7000)
    assert progress.tokens_per_second == 250.0
    assert progress.seconds_left == 12.0


def test_unknown_tokens_give_no_rate(time: Clock):
    with Progress(Console(quiet=True), 10, 6, tokens=None) as progress:
        time.now += 4.0
        progress.step(7, 0.5, None)
    assert progress.tokens_per_second is None


def test_lines_come_first_then_every_ten_seconds_and_last(time: Clock):
    steps = [(3.0, step, 1 / step, 100 * step) for step in range(1, 11)]
    found = shown(steps, time)
    assert [line.split()[1] for line in found] == ["1/10", "5/10", "9/10", "10/10"]
    assert found[1] == "step 5/10  loss 0.2000  33 tokens/s  0:15 left"


def test_methods_that_sample_show_the_reward_before_the_loss(time: Clock):
    stream = io.StringIO()
    with Progress(Console(stream=stream), 2) as progress:
        time.now += 1.0
        progress.step(1, -0.0004, 100, 0.4375)
        time.now += 20.0
        progress.step(2, 0.0003, 200, None)  # nobody had a reward: the last one stays
    assert [line.split("  ")[1:3] for line in stream.getvalue().splitlines()] == [
        ["reward 0.4375", "loss -0.0004"],
        ["reward 0.4375", "loss 0.0003"],
    ]


def test_the_last_step_told_twice_is_one_line(time: Clock):
    assert len(shown([(1.0, 9, 0.5, 900), (20.0, 10, 0.4, 1000), (0.0, 10, 0.4, 1000)], time)) == 2


def test_clock_times():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]


def test_a_dead_stream_is_left_alone():
    class Dead(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise OSError

    stream = SafeStream(Dead())
    assert stream.write("hello") == 5
    stream.flush()
    assert not stream.isatty()


def test_characters_that_a_stream_cannot_hold_are_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream=stream).say("π ≈ 3")
    assert raw.getvalue() == b"\\u03c0 \\u2248 3\n"


def on_a_terminal(command: list[str], term: str) -> tuple[int, str]:
    """Exit code and what a terminal of that kind was sent."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "100"}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, close_fds=True
    )
    os.close(follower)
    sent = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        sent += part
    os.close(leader)
    return process.wait(60), sent.decode(errors="replace")


def test_a_terminal_gets_a_bar_with_the_figures(tmp_path: Path):
    command = [
        sys.executable,
        str(RECIPE),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "6",
        "--step_seconds",
        "0.1",
    ]
    code, sent = on_a_terminal(command, "xterm-256color")
    assert code == 0
    assert "━" in sent
    assert "6/6" in sent
    assert "tokens/s" in sent
    assert "evaluation heldout at step 6: loss 0.5" in sent


def test_a_dumb_terminal_gets_lines(tmp_path: Path):
    command = [sys.executable, str(RECIPE), "--output_dir", str(tmp_path / "out"), "--max_steps", "3"]
    code, sent = on_a_terminal(command, "dumb")
    assert code == 0
    assert "\x1b" not in sent
    assert "step 3/3  loss 0.3333" in sent


def test_a_terminal_that_goes_away_stops_nothing(tmp_path: Path):
    out = tmp_path / "out"
    leader, follower = pty.openpty()
    command = [sys.executable, str(RECIPE), "--output_dir", str(out), "--max_steps", "10", "--step_seconds", "0.1"]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    assert os.read(leader, 1024)
    os.close(leader)
    assert process.wait(60) == 0
    assert '"completed"' in (out / "summary.json").read_text()
