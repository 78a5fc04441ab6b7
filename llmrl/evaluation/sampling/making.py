"""The file of `llmrl sample`: answers from a model that is asked, from a run's rollouts, or from a file of scored
samples, written as they are or as what is made of them.

Invariant: the file is there whole or not at all, and is never written over.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from llmrl import models
from llmrl.config import ModelKeys
from llmrl.data.columns import MEND
from llmrl.data.faults import RowFault, refusal
from llmrl.data.scored_rows import as_segments, best_and_worst, best_of_n, check_scored_columns, right_and_wrong
from llmrl.data.sources import find_source
from llmrl.data.splits import whole
from llmrl.errors import RefusedError, RunFailedError
from llmrl.evaluation.sampling.keys import Form, SampleKeys
from llmrl.files import write_lines
from llmrl.learner.loading import DTYPES, load_model, load_tokenizer, max_positions
from llmrl.rewards import run_rollouts
from llmrl.rewards.scored_samples import Asked, ScoringTally, asked, sample_scored
from llmrl.rewards.scoring import Scorer
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams
from llmrl.runs.disk import is_disk_failure

Row = dict[str, Any]
Say = Callable[[str], None]

FORMS: dict[Form, Callable[[Row, SampleKeys], list[Row]]] = {
    "scored": lambda row, keys: [row],
    "pairs": lambda row, keys: right_and_wrong(row, keys.pairs_per_prompt, keys.right_above or 0.0),
    "best_and_worst": lambda row, keys: best_and_worst(row),
    "best": lambda row, keys: best_of_n(row, keys.right_above),
    "segments": lambda row, keys: as_segments(row),
}


def make(keys: SampleKeys, say: Say) -> int:
    """Write the file; returns how many rows. Raises RefusedError for what can be seen before a model is loaded, and
    RunFailedError where too few rows are made, or the disk fails."""
    output = Path(keys.output)
    _check_output(output)
    making = _Making(keys, say)
    try:
        with making.source() as rows:
            output.parent.mkdir(parents=True, exist_ok=True)
            count = write_lines(output, making.enough(rows), ensure_ascii=False, allow_nan=False)
    except OSError as error:
        if not is_disk_failure(error):
            raise
        raise RunFailedError(
            f"output: {output} cannot be written: {error.strerror}. Free space, and start anew"
        ) from None
    say(f"{output}: {count} rows of form {keys.form}")
    return count


class _Making:
    """Rows on their way into the file."""

    def __init__(self, keys: SampleKeys, say: Say) -> None:
        self.keys, self.say, self.num_rows = keys, say, 0

    @contextmanager
    def source(self) -> Iterator[Iterator[Row]]:
        """The rows of the wanted form, from wherever the keys say."""
        keys = self.keys
        if keys.from_run is not None:
            yield self._formed(rows_of_run(Path(keys.from_run), keys.steps, keys.form == "segments"))
        elif keys.from_samples is not None:
            yield self._of_file(keys.from_samples)
        else:
            with self._asking() as rows:
                yield self._formed(rows)

    def enough(self, rows: Iterator[Row]) -> Iterator[Row]:
        """At most `max_rows` of them. Raises RunFailedError at their end where they are too few."""
        for row in islice(rows, self.keys.max_rows):
            self.num_rows += 1
            yield row
        if self.num_rows < self.keys.least_rows:
            raise RunFailedError(
                f"only {self.num_rows} rows of form {self.keys.form}, and there are to be {self.keys.least_rows}: of a "
                "prompt, pairs need better and worse answers, the best a right one, and only answers that ended by "
                "themselves count. Remedy: more prompts, more answers to each, a larger max_new_tokens, or a model "
                "that is neither always right nor always wrong"
            )

    def _formed(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            yield from [row] if "segments" in row else FORMS[self.keys.form](row, self.keys)

    def _of_file(self, name: str) -> Iterator[Row]:
        with _said_of("dataset_name", "from_samples"):
            source = find_source(name)
            rows = whole(source.rows("train", "from_samples"), source.names["train"])
        check_scored_columns(rows.table.column_names, rows.where)
        for number, row in zip(rows.numbers, rows.table, strict=True):
            try:
                yield from FORMS[self.keys.form](dict(row), self.keys)
            except RowFault as fault:
                raise refusal(rows.where, {number: fault}) from None

    @contextmanager
    def _asking(self) -> Iterator[Iterator[Row]]:
        """Scored samples of the model, as they come."""
        keys = self.keys
        logging.disable_progress_bar()
        assert keys.model is not None
        assert keys.prompts is not None
        with _said_of("dataset_name", "prompts"):
            source = find_source(keys.prompts)
            rows = whole(source.rows(keys.split, "split"), source.names[keys.split])
        rows = rows.select(range(min(len(rows), keys.max_prompts or len(rows))))
        with _said_of("model_name_or_path", "model"):
            path = models.resolve(keys.model, self.say)
            tokenizer, longest = load_tokenizer(path), max_positions(path)
        prompts = asked(rows, tokenizer)
        _check_room(prompts, keys.max_new_tokens, longest)
        scorer = Scorer(keys, self.say)
        try:
            scorer.check(rows.table.column_names, rows.where)
            engine = _engine(keys, path, tokenizer)
            self.say(f"{rows.where}: {len(rows)} prompts, {keys.samples_per_prompt} answers of {keys.model} to each")
            sampling = SamplingParams(keys.max_new_tokens, keys.temperature, keys.samples_per_prompt, keys.seed)
            yield sample_scored(engine, tokenizer, prompts, sampling, scorer, ScoringTally(), self._show(len(rows)))
        finally:
            scorer.close()

    def _show(self, num_prompts: int) -> Callable[[ScoringTally], None]:
        def show(tally: ScoringTally) -> None:
            self.say(
                f"{tally.prompts} of {num_prompts} prompts, {tally.samples} samples, mean reward "
                f"{tally.total / max(tally.scored, 1):.3f} of {tally.scored} with one; {tally.cut_off} cut off; "
                f"{tally.mixed} prompts with better and worse ones; {self.num_rows} rows"
            )

        return show


def rows_of_run(run: Path, steps: Sequence[int] = (), as_segments: bool = False) -> Iterator[Row]:
    """Scored samples, or scored segments, of a run's rollouts in these steps (none named: all that were kept).

    Raises RefusedError where they are not there.
    """
    config = config_of_run(run)
    kept = {int(file.stem.removeprefix("step_")): file for file in (run / "rollouts").glob("step_*.jsonl")}
    absent = [step for step in steps if step not in kept]
    if absent or not kept:
        there = f"those of steps {', '.join(map(str, sorted(kept)))} are" if kept else "none is"
        raise RefusedError(
            f"from_run: {run} has no rollouts{f' of step {absent[0]}' if absent else ''}; {there} there. A run of a "
            "method that samples keeps those of its newest steps (save_rollouts)"
        )
    as_text = not load_tokenizer(models.resolve(config["model_name_or_path"])).chat_template
    template = {"chat_template_kwargs": config["chat_template_kwargs"]} if config.get("chat_template_kwargs") else {}
    read = run_rollouts.segment_rows if as_segments else run_rollouts.scored_rows
    for step in sorted(steps or kept):
        for row in read(kept[step], as_text):
            yield {**row, **template}


def config_of_run(run: Path) -> dict[str, Any]:
    """The keys that a run was given. Raises RefusedError for what is no run directory."""
    if not (run / "config.yaml").is_file():
        raise RefusedError(f"from_run: {run} is not a run directory: there is no config.yaml in it")
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return config


def _engine(keys: SampleKeys, path: str, tokenizer: PreTrainedTokenizerBase) -> HuggingFaceEngine:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES.get(keys.dtype) or (torch.bfloat16 if device == "cuda" else torch.float32)
    with _said_of("model_name_or_path", "model"):
        model = load_model(path, ModelKeys(model_name_or_path=path), dtype, lambda text: None)
    return HuggingFaceEngine(model.to(device).eval(), tokenizer)


@contextmanager
def _said_of(elsewhere: str, here: str) -> Iterator[None]:
    """What is said of a training's key is said of the one that has its place here."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(str(error).replace(elsewhere, here)) from None


def _check_room(prompts: Asked, max_new_tokens: int, longest: int | None) -> None:
    for number, ids in zip(prompts.rows.numbers, prompts.prompt_ids, strict=True):
        if longest is not None and len(ids) + max_new_tokens > longest:
            raise RefusedError(
                f"{prompts.rows.where}, row {number}, column `prompt`: {len(ids)} tokens, and max_new_tokens "
                f"{max_new_tokens} more, but the model takes {longest}. Remedy: a lower max_new_tokens, or {MEND}"
            )


def _check_output(output: Path) -> None:
    if output.exists():
        raise RefusedError(f"output: {output} is there already, and is not written over. Remedy: another name")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RefusedError(f"output: {output} cannot be written below {folder}. Remedy: another folder")
