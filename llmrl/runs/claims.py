"""Who may write into a directory, and which checkpoint a run may go on from.

Invariants: a directory belongs to one run; going on is asked for, never assumed; a checkpoint is used only by a run
whose configuration agrees with it in every key that changes the result. A directory "holds a run" when it has any of
`OURS`; other files in it (a scheduler's log, notes) are left alone and do not matter.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from llmrl.config.keys import RunKeys
from llmrl.config.resolved import differing_keys, result_keys
from llmrl.config.schema import CoreLoader
from llmrl.errors import RefusedError
from llmrl.runs import checkpoints, ranks

LENGTH = ("max_steps", "num_train_epochs")
OURS = (
    "config.yaml", "environment.json", "metrics.jsonl", "evals.json", "summary.json", "checkpoints", "final",
    "rollouts", "rounds", "report.html", "samples.json",
)  # fmt: skip


def checkpoint_to_resume(config: RunKeys, directory: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, or None for a start from the beginning."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints.latest(directory)
        if found is None and (damaged := checkpoints.damaged(directory)):
            raise RefusedError(
                f"no checkpoint of {directory} is whole: "
                + "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
                + ". Restore it, or remove the directory to begin anew"
            )
        return found
    checkpoints.read_manifest(Path(wanted))
    return Path(wanted)


def claimable(config: RunKeys) -> Path | None:
    """Whether the run could begin in its output_dir, and from which checkpoint; changes nothing.

    Raises RefusedError where it could not: another run's directory or checkpoint, no checkpoint, no permission.
    """
    directory = Path(config.output_dir)
    checkpoint = checkpoint_to_resume(config, directory)
    refuse_occupied(config, directory, checkpoint)
    if checkpoint is not None:
        verify_checkpoint(config, checkpoint, checkpoints.read_manifest(checkpoint))
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise RefusedError(f"output_dir {directory} cannot be used: no permission to write into {there}")
    return checkpoint


def refuse_occupied(config: RunKeys, directory: Path, checkpoint: Path | None) -> None:
    """The directory must be free, or hold this very run where it shall go on."""
    if directory.exists() and not directory.is_dir():
        raise RefusedError(f"output_dir {directory} is a file; name a directory")
    held = [name for name in OURS if (directory / name).exists()]
    if not held:
        return
    if config.resume_from_checkpoint is None:
        raise RefusedError(
            f"output_dir {directory} already holds a run ({', '.join(held[:4])}). Go on with it by "
            "--resume_from_checkpoint latest, or name another output_dir"
        )
    if checkpoint is not None and checkpoint.resolve().parent != (directory / "checkpoints").resolve():
        raise RefusedError(
            f"output_dir {directory} already holds a run, and {checkpoint} is not one of its checkpoints. "
            "Name another output_dir, or a checkpoint of this run"
        )
    if checkpoint is None:
        _refuse_other_config(config, directory)


def _refuse_other_config(config: RunKeys, directory: Path) -> None:
    """Starting afresh replaces the metrics that are there, so they must be those of an earlier attempt at this run."""
    try:
        stored = yaml.load((directory / "config.yaml").read_text(encoding="utf-8"), Loader=CoreLoader)
    except FileNotFoundError:
        return
    except (OSError, ValueError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict):
        raise RefusedError(
            f"output_dir {directory} holds a config.yaml that no run has written; name another output_dir"
        )
    differences = differing_keys(config, result_keys(config, stored))
    if differences:
        raise RefusedError(
            f"output_dir {directory} holds no checkpoint to resume, but another run, made with other values of\n"
            + "".join(f"  - {line}\n" for line in differences)
            + "Name another output_dir, or remove this one if nothing in it is worth keeping"
        )


def verify_checkpoint(config: RunKeys, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Raises RefusedError when the checkpoint belongs to another run. One of another length is the same, where nothing
    depends on that."""
    stored = manifest.get("config", {})
    now = result_keys(config)
    if config.length_is_free and not 0 < now["max_steps"] < manifest.get("step", 0):
        stored = {**stored, **{key: now[key] for key in LENGTH if key in stored}}
    differences = differing_keys(config, stored)
    if differences:
        raise RefusedError(
            f"{checkpoint} is another run's checkpoint; it was made with other values of\n"
            + "".join(f"  - {line}\n" for line in differences)
            + "Give the same values to go on with it, or start a new run in another output_dir"
        )


def verify_world_size(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Raises RefusedError when the checkpoint belongs to another number of processes."""
    before = manifest.get("world_size", 1)
    if before != ranks.world_size():
        raise RefusedError(
            f"{checkpoint} was written by {before} processes and {ranks.world_size()} run now: the "
            f"optimizer's shards and random states do not fit. Launch {before} processes, or begin anew elsewhere"
        )
