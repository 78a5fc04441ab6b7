"""A recipe without a model: its "training" is arithmetic on the step number, so that the right end of a resumed run is
known. The tests start it as a user would start a recipe.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Literal

from llmrl.config import DataKeys, Housekeeping, ModelKeys, OptimizationKeys, RunKeys
from llmrl.errors import RefusedError, RunFailedError, RunInterruptedError
from llmrl.runs import Run, checkpoints, main


class ToyConfig(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy: a sum instead of a model."""

    method: Literal["toy"] = "toy"
    model_name_or_path: str = "none"
    dataset_name: str = "none"
    learning_rate: float = 0.5
    step_seconds: Annotated[float, Housekeeping()] = 0.0
    """How long a step takes."""
    load_seconds: Annotated[float, Housekeeping()] = 0.0
    """How long it takes before the first step."""
    end: Annotated[str, Housekeeping()] = "well"
    """How it ends: well, refused, failed, broken, memory, stuck."""
    data_version: str = "1"
    """Stands for the content of the data."""


def describe(config: ToyConfig, world_size: int) -> dict[str, str | int | float]:
    """Derived figures; refuses more processes than rows, as a real recipe would."""
    if world_size > 16:
        raise RefusedError(f"{world_size} processes for 16 rows a step; launch at most 16")
    return {"rows per step and process": 16 // world_size}


def train(config: ToyConfig, run: Run) -> None:
    """Adds step * learning_rate up; the checkpoint is the sum."""
    time.sleep(config.load_seconds)
    if config.end == "refused":
        raise RefusedError("pairs.jsonl, row 6, column chosen: empty")
    run.verify_dataset("data-1")
    total = 0.0
    if run.checkpoint is not None:
        total = json.loads((run.checkpoint / "state.json").read_text())["total"]
    else:
        run.evaluation(0, "heldout", {"loss": 1.0})
    with run.progress(config.max_steps):
        for step in range(run.start_step + 1, config.max_steps + 1):
            time.sleep(config.step_seconds)
            total += step * config.learning_rate
            run.log(step, {"loss": 1 / step, "num_tokens": 100 * step, "learning_rate": config.learning_rate})
            if run.interrupted and config.end != "stuck":
                _save(config, run, step, total)
                raise RunInterruptedError(f"stopped after step {step}")
            if config.save_steps and step % config.save_steps == 0:
                _save(config, run, step, total)
            _end(config, step)
    _save(config, run, config.max_steps, total)
    run.evaluation(config.max_steps, "heldout", {"loss": 0.5})
    if run.is_main:
        (run.directory / "final").mkdir(exist_ok=True)
        (run.directory / "final" / "total.json").write_text(json.dumps(total))


def _save(config: ToyConfig, run: Run, step: int, total: float) -> None:
    if not run.is_main:
        return

    def write(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"total": total}))
        (folder / "weights.bin").write_bytes(b"w" * 20_000)

    checkpoints.publish(run.directory, step, write, run.manifest("data-1"), config.save_total_limit)


def _end(config: ToyConfig, step: int) -> None:
    if step == 3 and config.end == "failed":
        raise RunFailedError("the toy broke in step 3; mend it")
    if step == 3 and config.end == "broken":
        raise ValueError("an unexpected thing")
    if step == 3 and config.end == "memory":
        raise MemoryError


if __name__ == "__main__":
    main(ToyConfig, describe, train)
