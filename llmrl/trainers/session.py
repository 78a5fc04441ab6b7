"""What surrounds the steps of every training loop: resuming, logging, evaluating, saving, stopping when asked.

    session = Session(run, learner, tokenizer, total_steps, data_fingerprint, evaluate)
    for step in session.steps():
        session.record(learner.update(groups_of(step), objective))
    session.finish()

Invariants
- What a step does depends on its number, the weights and the RNG state only, and a checkpoint holds the last two: so a
  run that was killed and resumed ends with the weights of one that was not.
- A checkpoint is taken between steps, after the logging of its step, by all ranks together.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from llmrl.errors import RefusedError, RunFailedError, RunInterruptedError
from llmrl.evaluation.progress import Ticker
from llmrl.learner.learner import Learner
from llmrl.learner.meeting import RankLostError
from llmrl.learner.together import any_rank
from llmrl.runs import Run, checkpoints
from llmrl.runs.final import publish_model

STATE_FILE = "trainer_state.json"
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)
"""What loading a checkpoint raises whose files are not as they were written."""
Evaluations = dict[str, dict[str, float]]
"""Metrics by the name of the evaluation."""


class Session:
    """One run's steps. `evaluate()` is called before training, every `eval_steps` and at the end.

    `callbacks` are transformers' TrainerCallbacks: they get the run's configuration as `args`, and may ask through
    `control` for an evaluation, a checkpoint, or the end.
    """

    def __init__(
        self,
        run: Run,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        total_steps: int,
        data_fingerprint: str,
        evaluate: Callable[[], Evaluations],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.run, self.learner, self.tokenizer = run, learner, tokenizer
        self.total_steps, self.data_fingerprint, self.evaluate = total_steps, data_fingerprint, evaluate
        self.state = TrainerState(max_steps=total_steps, is_world_process_zero=run.is_main)
        self.control = TrainerControl()
        self.callbacks = list(callbacks)
        self._evaluated_at, self._saved_at = -1, -1

    def steps(self) -> Iterator[int]:
        """Numbers of the steps still to do, from 0; between two of them everything else happens."""
        run = self.run
        if run.checkpoint is not None:
            self._load(run.checkpoint)
            self.state = TrainerState.load_from_json(str(run.checkpoint / STATE_FILE))
            self.state.is_world_process_zero, self.state.max_steps = run.is_main, self.total_steps
            self._saved_at = run.start_step
            if self._was_given_up(run.start_step):
                self._evaluate(run.start_step)
        else:
            self._evaluate(0)
        self._tell("on_train_begin")
        with run.progress(self.total_steps) as self._progress:
            for step in range(run.start_step, self.total_steps):
                self.control = TrainerControl()
                self._tell("on_step_begin")
                yield step
                self._after(step + 1)
                if self.control.should_training_stop:
                    run.note(f"a callback ended training after step {step + 1}.")
                    break

    def record(self, metrics: dict[str, float]) -> None:
        """Take the metrics of the step just done; they are logged every `logging_steps` and at the last step."""
        self.state.global_step += 1
        self.state.num_input_tokens_seen += int(metrics["num_tokens"])
        step, cadence = self.state.global_step, self.run.config.logging_steps
        self._progress.step(step, metrics["loss"], self.state.num_input_tokens_seen, metrics.get("reward"))
        if step % cadence == 0 or step == self.total_steps:
            line = {**metrics, "num_tokens": self.state.num_input_tokens_seen}
            self.run.log(step, line)
            self._tell("on_log", logs=line)

    def save_after_this_step(self) -> None:
        """Leave a checkpoint once the step that is under way is done."""
        self.control.should_save = True

    def checkpoint(self) -> None:
        """A checkpoint of the steps done so far, if there are any and it has not been left yet."""
        if self.state.global_step > 0:
            self._save(self.state.global_step)

    @contextmanager
    def before_updates(self) -> Iterator[None]:
        """Around what a step does before it changes any weight, such as sampling: where that fails or is interrupted,
        a checkpoint of the steps done so far is left. What is refused after the first step is a failure."""
        try:
            yield
        except RankLostError:  # those that are left cannot save together
            raise
        except Exception as error:
            self.checkpoint()
            if self.state.global_step > 0 and isinstance(error, RefusedError):
                raise RunFailedError(str(error)) from error
            raise

    def watched(self, what: str) -> Ticker:
        """For what takes long within a step: hears how much of it is done and of how much, says so now and then, and
        raises RunInterruptedError on all ranks where a signal asked one of them to stop. Called as often on every rank,
        within `before_updates`."""
        return _Watched(self, what)

    def is_asked_to_stop(self) -> bool:
        """Whether a signal asked one of the ranks; called on all of them."""
        return any_rank(self.learner.accelerator, self.run.interrupted)

    def finish(self) -> None:
        """The last checkpoint, the last evaluation, and the model in `final/`.

        Saved first: whoever ends the process during a long evaluation loses the evaluation only, and a resumed run
        makes it again.
        """
        self._save(self.state.global_step)
        if self._evaluated_at != self.state.global_step:
            self._evaluate(self.state.global_step)
        self._tell("on_train_end")
        publish_model(self.run, self._export, self.learner.accelerator.wait_for_everyone)

    def _load(self, checkpoint: Path) -> None:
        try:
            self.learner.load(checkpoint)
        except UNREADABLE as error:
            what = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            raise RunFailedError(
                f"{checkpoint} cannot be loaded, so its files must have been changed since they were written, or "
                f"another version of llmrl has written them ({what}). Name an older one: --resume_from_checkpoint PATH"
            ) from error

    def _after(self, step: int) -> None:
        config = self.run.config
        self._tell("on_step_end")
        if self.control.should_evaluate or self._evaluation_is_due(step):
            self._evaluate(step)
        stop = self.is_asked_to_stop()
        if stop or self.control.should_save or (config.save_steps and step % config.save_steps == 0):
            self._save(step)
        if stop and step < self.total_steps:
            raise RunInterruptedError(f"a signal asked for it after step {step} of {self.total_steps}")

    def _evaluation_is_due(self, step: int) -> bool:
        cadence = self.run.config.eval_steps
        return bool(cadence) and step % cadence == 0 and step < self.total_steps

    def _was_given_up(self, step: int) -> bool:
        """Whether the run from which this one goes on was ended during its evaluation after this step."""
        recorded = any(entry["step"] == step for entry in self.run.metrics.evaluations)
        missing = self.run.is_main and not recorded and self._evaluation_is_due(step)
        return any_rank(self.learner.accelerator, missing)

    def _evaluate(self, step: int) -> None:
        results = self.evaluate()
        for name, metrics in results.items():
            self.run.evaluation(step, name, metrics)
        self._evaluated_at = step
        self._tell(
            "on_evaluate", metrics={f"eval_{key}": v for metrics in results.values() for key, v in metrics.items()}
        )

    def _save(self, step: int) -> None:
        if self._saved_at == step:
            return
        root, accelerator = self.run.directory, self.learner.accelerator
        if self.run.is_main:
            checkpoints.begin(root, step)
        accelerator.wait_for_everyone()
        folder = checkpoints.pending(root, step)
        with checkpoints.guarded(root, step):
            self.learner.save(folder)
            if self.run.is_main:
                self.state.save_to_json(str(folder / STATE_FILE))
        accelerator.wait_for_everyone()
        if self.run.is_main:
            checkpoints.commit(root, step, self.run.manifest(self.data_fingerprint), self.run.config.save_total_limit)
        accelerator.wait_for_everyone()
        self._saved_at = step
        self._tell("on_save")

    def _export(self, folder: Path) -> None:
        self.learner.export(folder)
        if self.run.is_main:
            self.tokenizer.save_pretrained(folder)

    def _tell(self, event: str, **extra: object) -> None:
        for callback in self.callbacks:
            answer = getattr(callback, event)(
                self.run.config,
                self.state,
                self.control,
                model=self.learner.causal_lm,
                processing_class=self.tokenizer,
                optimizer=self.learner.optimizer,
                lr_scheduler=self.learner.scheduler,
                **extra,
            )
            self.control = self.control if answer is None else answer


class _Watched(Ticker):
    """A ticker that ends the run, with a checkpoint, where a signal asks for it."""

    def __init__(self, session: Session, what: str) -> None:
        super().__init__(session.run.console.say, what)
        self._session = session

    def __call__(self, done: int, total: int) -> None:
        super().__call__(done, total)
        if self._session.is_asked_to_stop():
            raise RunInterruptedError(f"a signal asked for it during: {self.what} ({done} of {total})")
