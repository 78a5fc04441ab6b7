"""Online runs in processes of their own that begin at once: each is forked from one that has imported everything.

A run that is to be killed needs a process; importing the libraries for each would take longer than the runs.
"""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

IMPORTED = [
    "llmrl.trainers.online", "llmrl.trainers.loop", "llmrl.trainers.ppo", "transformers.models.llama.modeling_llama",
    "accelerate", "peft", "datasets",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)


def begin(
    method: str,
    config: Path,
    *arguments: str,
    log: Path | None = None,
    dies: tuple[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    collective_seconds: float | None = None,
) -> BaseProcess:
    """Start a run in a process group of its own; its words go to `log`.

    dies: it kills itself in the nth call of one of `PHASES`. environment: variables that it has beside this process's.
    collective_seconds: how long collectives wait for other ranks.
    """
    own = dict(environment or {})
    process = CONTEXT.Process(target=_work, args=(method, config, arguments, log, dies, own, collective_seconds))
    process.start()
    return process


def begin_two_ranks(method: str, config: Path, *arguments: str, **options: Any) -> list[BaseProcess]:
    """Start two processes of one run, as a launcher would; their words are in log0 and log1 beside the configuration.

    options: of `begin`; `environment` is both processes'.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings |= options.pop("environment", {})
    return [
        begin(
            method, config, *arguments, log=config.with_name(f"log{rank}"),
            environment={"RANK": rank, "LOCAL_RANK": rank, **settings}, **options,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def ended(process: BaseProcess, seconds: float = 120) -> int:
    """Its exit code: negative for a signal. Fails where it does not end in time."""
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
    assert code is not None, f"the run has not ended after {seconds} s"
    return code


def _work(
    method: str,
    config: Path,
    arguments: tuple[str, ...],
    log: Path | None,
    dies: tuple[str, int] | None,
    environment: dict[str, str],
    collective_seconds: float | None,
) -> None:
    os.setsid()
    os.environ.update(environment)
    out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from support.online_run import run_online

    import llmrl.runs.report

    llmrl.runs.report.write_report = lambda directory: directory
    if collective_seconds is not None:
        from llmrl.learner import sharding

        sharding.COLLECTIVE_TIMEOUT = timedelta(seconds=collective_seconds)
    if dies is not None:
        owner, name, before = PHASES[dies[0]]()
        setattr(owner, name, _deadly(getattr(owner, name), dies[1], before))
    sys.exit(run_online(method, config, *arguments))


def _deadly(function: Callable[..., Any], number: int, before: bool) -> Callable[..., Any]:
    """`function`, whose `number`th call ends the process as kill -9 does, before or after its work."""
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = None if calls == number and before else function(*arguments, **named)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def _rollout() -> tuple[Any, str, bool]:
    from llmrl.rollout.huggingface import HuggingFaceEngine

    return HuggingFaceEngine, "_step", True


def _reward() -> tuple[Any, str, bool]:
    from llmrl.rewards.scoring import Scorer

    return Scorer, "score", True


def _update() -> tuple[Any, str, bool]:
    from llmrl.learner.sharding import PlainBackend

    return PlainBackend, "apply", False


def _sync() -> tuple[Any, str, bool]:
    from llmrl.rollout.huggingface import HuggingFaceEngine

    return HuggingFaceEngine, "sync", False


def _save() -> tuple[Any, str, bool]:
    from llmrl.learner.learner import Learner

    return Learner, "save", False


def _export() -> tuple[Any, str, bool]:
    from llmrl.learner.learner import Learner

    return Learner, "export", False


PHASES: dict[str, Callable[[], tuple[Any, str, bool]]] = {
    "rollout": _rollout,
    "reward": _reward,
    "update": _update,
    "sync": _sync,
    "save": _save,
    "export": _export,
}
"""By name: whose method it is, what it is called, and whether death comes before its work or after it."""
