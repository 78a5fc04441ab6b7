"""A run of TRL's trainers (sft, reward): when to log, evaluate, save and stop, and how it ends.

Invariants
- TRL decides how a step is made; everything around it is decided here, by the run's keys.
- A checkpoint is what TRL wrote, published under its name only when it is whole; a resumed run ends with the weights of
  one that was never interrupted (on a CPU bit for bit).
- Evaluations leave the random state as it was, so their cadence never changes the weights.
"""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrl.config import RunKeys
from llmrl.errors import LlmrlError, RefusedError, RunInterruptedError
from llmrl.learner.together import any_rank
from llmrl.runs import Run, checkpoints
from llmrl.runs.disk import as_disk_failure, is_disk_failure
from llmrl.runs.final import publish_model

SCRATCH = ".trl"  # beside the published checkpoints, on the same file system, so that publishing is a rename
NOT_PUBLISHED = ("training_args.bin", "README.md")
# What TRL and transformers add to a step's metrics and a resumed run would begin again at 0.
NOT_LOGGED = ("num_tokens", "num_input_tokens_seen", "epoch", "train_runtime", "train_tokens_per_second")

Metrics = dict[str, float]
Evaluate = Callable[[], dict[str, Metrics]]


def scratch_of(run: Run) -> str:
    """Where TRL writes before anything is published."""
    return str(run.directory / "checkpoints" / SCRATCH)


def fit(
    trainer: Trainer, run: Run, fingerprint: str, evaluate: Evaluate, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    """Train with a TRL trainer to the end, or to the signal that asks it to stop.

    `evaluate` returns metrics by name of the evaluation; it is called before training, every `eval_steps`, and at the
    end. `fingerprint` is that of the data, held against the checkpoint's. Raises `RunInterruptedError` after a whole
    checkpoint.
    """
    run.verify_dataset(fingerprint)
    director = Director(trainer, run, fingerprint, evaluate)
    for callback in (director, *callbacks):
        trainer.add_callback(callback)
    _clear(trainer, run)
    try:
        with director.progress, _disk_failures_named(trainer, run):
            trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    except _NothingLeft:
        run.note(f"{run.checkpoint} is the last step already: only the evaluation and the model itself are left")
    finally:
        _clear(trainer, run)
    if director.stopped_after is not None:
        raise RunInterruptedError(
            f"a signal asked for it after step {director.stopped_after} of {trainer.state.max_steps}"
        )
    director.evaluate_now(trainer.state.global_step)


class _NothingLeft(Exception):
    """The checkpoint is the last step: transformers would train one step more before it noticed."""


class Director(TrainerCallback):
    """Decides when TRL's trainer logs, evaluates, saves and stops. `stopped_after`: the step, if a signal ended it."""

    def __init__(self, trainer: Trainer, run: Run, fingerprint: str, evaluate: Evaluate) -> None:
        self.trainer, self.run, self.fingerprint, self.evaluate = trainer, run, fingerprint, evaluate
        self.progress = ExitStack()
        self.stopped_after: int | None = None
        self._bar: Any = None

    def evaluate_now(self, step: int) -> None:
        """Evaluate and record."""
        with random_state_kept():
            for name, metrics in self.evaluate().items():
                self.run.evaluation(step, name, metrics)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The evaluation before training, and the progress display."""
        if state.global_step == 0:
            self.evaluate_now(0)
        self._bar = self.progress.enter_context(self.run.progress(state.max_steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing is trained beyond the last step."""
        if state.global_step >= state.max_steps:
            raise _NothingLeft

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What is due after this step."""
        config: RunKeys = self.run.config
        step, last = state.global_step, state.global_step >= state.max_steps
        self._bar.step(step, None, state.num_input_tokens_seen)
        log_is_due = control.should_log or last
        if config.eval_steps and step % config.eval_steps == 0 and not last:
            self.evaluate_now(step)
        stop = any_rank(self.trainer.accelerator, self.run.interrupted)
        control.should_log = log_is_due  # the evaluation logs too, after which transformers takes this step's for done
        control.should_save = stop or last or bool(config.save_steps and step % config.save_steps == 0)
        if stop and not last:
            control.should_training_stop = True
            self.stopped_after = step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """A step's metrics; what TRL logs of evaluations goes another way."""
        if logs and "loss" in logs:
            kept = {name: value for name, value in logs.items() if name not in NOT_LOGGED}
            self.run.log(state.global_step, {**kept, "num_tokens": state.num_input_tokens_seen})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish what TRL has just written, when every rank has."""
        self.trainer.accelerator.wait_for_everyone()
        if self.run.is_main:
            written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            checkpoints.publish(
                self.run.directory,
                state.global_step,
                lambda pending: _move(written, pending),
                self.run.manifest(self.fingerprint),
                self.run.config.save_total_limit,
            )
        self.trainer.accelerator.wait_for_everyone()


def check_export(trainer: Trainer, merge_adapter: bool) -> None:
    """Before training: raises `RefusedError` if `export` could not do what is asked."""
    if merge_adapter and trainer.is_deepspeed_enabled:
        raise RefusedError("merge_adapter: an adapter cannot be merged under DeepSpeed; set it to false")


def export(run: Run, trainer: Trainer, merge_adapter: bool) -> None:
    """The trained model and its tokenizer into `final/`."""

    def write(folder: Path) -> None:
        if merge_adapter and isinstance(trainer.model, PeftModel):
            if run.is_main:
                trainer.model.merge_and_unload().save_pretrained(folder)
        else:
            trainer.save_model(str(folder))
        if run.is_main:
            for name in NOT_PUBLISHED:
                (folder / name).unlink(missing_ok=True)
            trainer.processing_class.save_pretrained(folder)

    publish_model(run, write, trainer.accelerator.wait_for_everyone)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, numpy's and torch's random states are afterwards what they were."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def _disk_failures_named(trainer: Trainer, run: Run) -> Iterator[None]:
    """A disk that failed while TRL wrote a checkpoint becomes a `RunFailedError` that says which one is intact."""
    try:
        yield
    except LlmrlError:
        raise
    except Exception as error:
        if not is_disk_failure(error):
            raise
        written = sum(f.stat().st_size for f in Path(str(trainer.args.output_dir)).rglob("*") if f.is_file())
        intact = checkpoints.latest(run.directory)
        failure = as_disk_failure(error, run.directory, f"checkpoint step_{trainer.state.global_step}", intact, written)
        raise failure or error from error


def _clear(trainer: Trainer, run: Run) -> None:
    """Leftovers of a killed run, or of one that went well."""
    if run.is_main:
        shutil.rmtree(str(trainer.args.output_dir), ignore_errors=True)


def _move(written: Path, pending: Path) -> None:
    for item in written.iterdir():
        if item.name not in NOT_PUBLISHED:
            item.rename(pending / item.name)
    shutil.rmtree(written)
