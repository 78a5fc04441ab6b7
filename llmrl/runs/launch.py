"""From a command line to an exit code: what every recipe's run.py calls.

Invariants: 0 done, 2 refused (one message, no traceback, nothing left behind), 75 interrupted after a whole checkpoint,
1 failed (traceback in error.log); every rank ends with the same code and only rank 0 speaks, but for a line from
another that fails; until `train` is called nothing heavy is imported.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel

from llmrl.config.keys import RunKeys
from llmrl.config.parse import parse
from llmrl.config.resolved import to_yaml
from llmrl.errors import RefusedError, RunFailedError, RunInterruptedError
from llmrl.runs import checkpoints, ranks
from llmrl.runs.console import Console, complain
from llmrl.runs.directory import Run
from llmrl.runs.signals import stop_on_signals
from llmrl.runs.summary import Status

ConfigT = TypeVar("ConfigT", bound=RunKeys)
Derived = dict[str, str | int | float]


def main(
    config_type: type[ConfigT],
    describe: Callable[[ConfigT, int], Derived],
    train: Callable[[ConfigT, Run], None],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parses `argv` (default: the process's), trains, and exits with the code of the contract.

    `describe(config, world_size)` gives the derived batch arithmetic for `--dry-run`; it may raise RefusedError and
    must not import torch. `train(config, run)` does the work; see `Run` for what it may call and raise.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    code = run_command(config_type, describe, train, words)
    ranks.leave(code, together=code in (0, RunInterruptedError.exit_code))


def run_command(
    config_type: type[ConfigT],
    describe: Callable[[ConfigT, int], Derived],
    train: Callable[[ConfigT, Run], None],
    argv: Sequence[str],
) -> int:
    """As `main`, but returns the exit code."""
    try:
        with _silence_unless_main():
            command = parse(config_type, argv)
        derived = describe(command.config, ranks.world_size())
        if command.dry_run:
            Console(quiet=not ranks.is_main()).say(dry_run_text(command.config, derived))
            return 0
        run = Run.open(command.config, argv)
    except RefusedError as error:
        return refuse(error)
    return _trained(command.config, run, train)


def dry_run_text(config: BaseModel, derived: Derived) -> str:
    """The resolved file, and the derived figures as comments: the output can be saved and given back as `--config`."""
    width = max((len(key) for key in derived), default=0)
    lines = [f"# {key:<{width}}  {value}" for key, value in derived.items()]
    return "\n".join([to_yaml(config).rstrip(), "", "# derived:", *lines])


def refuse(error: RefusedError) -> int:
    """Says why, on standard error, and gives the exit code."""
    if ranks.is_main():
        complain(f"refused: {error}")
    return error.exit_code


def _trained(config: ConfigT, run: Run, train: Callable[[ConfigT, Run], None]) -> int:
    """Signals are heard to the very end: launchers send the one that ended the run once more, while it is closed."""
    with stop_on_signals(run):
        try:
            train(config, run)
            run.close("completed")
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            with run.listening():
                return _gave_up(run, error)
    if (run.directory / "final").is_dir():
        run.console.say(f"trained model: {run.directory / 'final'}")
    return 0


def _gave_up(run: Run, error: BaseException) -> int:
    """Says and writes why training did not come to its end, and gives the exit code."""
    match error:
        case RefusedError():
            run.withdraw()
            return refuse(error)
        case RunInterruptedError() | KeyboardInterrupt():
            reason = str(error) or "interrupted by the keyboard"
            return _ended(run, "interrupted", reason, RunInterruptedError.exit_code)
        case RunFailedError():
            _write_traceback(run, error)
            return _ended(run, "failed", str(error), error.exit_code)
        case _:
            where = _write_traceback(run, error)
            return _ended(run, "failed", f"{_sentence(error)}. Traceback: {where}", 1)


def _ended(run: Run, status: Status, reason: str, code: int) -> int:
    """Says how it ended and what can be done, writes the summary, and passes the exit code on."""
    newest = checkpoints.latest(run.directory)
    if run.is_main:
        same = "the same command with --resume_from_checkpoint latest"
        remedy = f"\n{newest} is whole; {same} goes on from it"
        if newest is None:
            kept = f" and takes up {run.kept_work}" if run.kept_work else ""
            remedy = f"\nno checkpoint was written yet; {same} starts anew in the same directory{kept}"
        complain(f"{status}: {reason}{'' if '--resume_from_checkpoint' in reason else remedy}")
        try:
            run.close(status, reason)
        except OSError as error:
            complain(f"summary.json could not be written either: {error}")
    return code


def _write_traceback(run: Run, error: BaseException) -> str:
    """Appends the traceback to error.log (error_rankN.log elsewhere than on rank 0) and returns the file's name."""
    name = "error.log" if run.is_main else f"error_rank{ranks.rank()}.log"
    path = run.directory / name
    text = "".join(traceback.format_exception(error))
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError:
        if run.is_main:
            complain(text)
        path = Path("could not be written")
    if not run.is_main:
        # It may have failed alone: the others then only notice that it is gone, and the cause must not hide in a file.
        complain(f"rank {ranks.rank()} failed: {_sentence(error)} (traceback: {path})")
    return str(path)


def _sentence(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".rstrip(": ")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text += ". Lower tokens_per_microbatch, or turn gradient_checkpointing or use_peft on"
    return text


@contextlib.contextmanager
def _silence_unless_main() -> Iterator[None]:
    """`--help` is printed once, not once a rank."""
    if ranks.is_main():
        yield
    else:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            yield
