"""Runs in processes of their own that begin at once: each is forked from one that has imported everything.

A run that is to be killed needs a process, and one of several ranks needs several; importing the libraries for each
would take longer than the runs. What a launcher sets for its processes is what `accelerate launch` would set; that the
launcher itself works is for tests of `recipe_run.launch`.
"""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.recipe_run import ROOT, wait_for

IMPORTED = [
    "llmrl.trainers.online.policy_gradient_run", "llmrl.trainers.loop", "llmrl.trainers.ppo",
    "llmrl.trainers.offline.run",
    "transformers.models.llama.modeling_llama", "accelerate", "peft", "datasets", "deepspeed",
    "trl.trainer.sft_trainer", "trl.trainer.reward_trainer",
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
    words = ("--config", str(config), *arguments)
    return fork(_run, (method, words, dies, collective_seconds), log, environment)


def fork(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a module's function in a process of its own, and end it as a recipe's process ends: with the exit code that
    it returns, or 0 for None."""
    process = CONTEXT.Process(target=_work, args=(function, arguments, log, dict(environment or {})))
    process.start()
    return process


def begin_two_ranks(method: str, config: Path, *arguments: str, **options: Any) -> list[BaseProcess]:
    """Start two processes of one run, as a launcher would; their words are in log0 and log1 beside the configuration.

    options: of `begin`; `environment` is both processes'.
    """
    further = options.pop("environment", {})
    return [
        begin(method, config, *arguments, log=config.with_name(f"log{rank}"), environment=own | further, **options)
        for rank, own in enumerate(two_ranks())
    ]


def finish(
    method: str,
    config: Path,
    *arguments: str,
    launcher: str = "cpu",
    code: int = 0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run to the end as one of the project's launch files says; what was said.

    Fails unless every process ends with `code`.
    """
    further = dict(environment or {})
    logs = [config.with_name(f"finished{rank}") for rank in range(1 if launcher == "cpu" else 2)]
    for log in logs:
        log.unlink(missing_ok=True)
    ranks = [further] if launcher == "cpu" else [own | launched(launcher) | further for own in two_ranks()]
    processes = [
        begin(method, config, *arguments, log=log, environment=own) for log, own in zip(logs, ranks, strict=True)
    ]
    codes = [ended(process, 300) for process in processes]
    said = "".join(log.read_text() for log in logs)
    assert codes == [code] * len(codes), (codes, said[-3000:])
    return said


def kill_after_a_checkpoint(method: str, config: Path, run: Path, delay: float = 0.0) -> None:
    """SIGKILL to a run, `delay` seconds after its first checkpoint."""
    process = begin(method, config)
    wait_for(lambda: any((run / "checkpoints").glob("step_*")), process.is_alive)
    time.sleep(delay)
    process.kill()
    assert ended(process) in (-signal.SIGKILL, 0)  # on a fast machine it may have come to its end


def interrupted(method: str, config: Path, run: Path) -> dict[str, Any]:
    """The summary of a run that got SIGTERM on its way."""
    process = begin(method, config)
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 1, process.is_alive)
    process.terminate()
    assert ended(process) == 75
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def signalled(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`function`, at whose `number`th call this process gets SIGTERM."""
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **named)

    return counted


def two_ranks() -> list[dict[str, str]]:
    """What torchrun sets for each of two processes of one run on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank, **settings} for rank in ("0", "1")]


@functools.cache
def launched(launcher: str, *arguments: str) -> dict[str, str]:
    """What `accelerate launch` sets for the processes that it starts with one of the project's launch files."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = str(ROOT / "launch" / "accelerate" / f"{launcher}.yaml")
    words = ["--config_file", file, *arguments, "run.py"]
    chosen, of_file, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if chosen.use_deepspeed:
        chosen.deepspeed_fields_from_accelerate_config = ",".join(of_file.deepspeed_config)
    made = prepare_deepspeed_cmd_env(chosen)[1] if chosen.use_deepspeed else prepare_multi_gpu_env(chosen)
    return {key: value for key, value in made.items() if os.environ.get(key) != value}


def ended(process: BaseProcess, seconds: float = 120) -> int:
    """Its exit code: negative for a signal. Fails where it does not end in time."""
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
    assert code is not None, f"the run has not ended after {seconds} s"
    return code


def _work(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None, environment: dict[str, str]
) -> None:
    os.setsid()
    os.environ.update(environment)
    out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from llmrl.errors import RunInterruptedError
    from llmrl.runs import ranks

    code = function(*arguments) or 0
    ranks.leave(code, together=code in (0, RunInterruptedError.exit_code))


def _run(method: str, words: tuple[str, ...], dies: tuple[str, int] | None, collective_seconds: float | None) -> int:
    import llmrl.runs.report
    from llmrl.runs.launch import run_command
    from llmrl.trainers import METHODS

    llmrl.runs.report.write_report = lambda directory: directory
    if collective_seconds is not None:
        from llmrl.learner import sharding

        sharding.COLLECTIVE_TIMEOUT = timedelta(seconds=collective_seconds)
    if dies is not None:
        owner, name, before = PHASES[dies[0]]()
        setattr(owner, name, _deadly(getattr(owner, name), dies[1], before))
    module = importlib.import_module(METHODS[method])
    return run_command(module.Config, module.describe, module.train, words)


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
