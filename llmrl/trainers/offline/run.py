"""A run on a fixed set of groups: what the loops of DPO, VPO, CPL and BRAIn have in common.

    offline = OfflineRun(config, run, tokenizer, data, config.pairs_per_step, callbacks=callbacks)
    offline.prepare(pair, {"preference": partial(preference_metrics, objective=objective)})
    for step in offline.session.steps():
        offline.session.record(offline.learner.update(offline.groups(step), objective))
    offline.session.finish()

Invariants
- Which groups a step sees follows from its number, the seed and the number of rows alone.
- The reference is the policy as it is before its first update, unless a method takes a later one. Its precomputed
  log-probabilities are taken step by step, so that a group is packed beside the same others as in training: log-ratios
  start at exactly 0. A resumed run computes them again, from the same initial weights; those of a later policy are in
  the checkpoints.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from llmrl import models
from llmrl.config import OptimizationKeys
from llmrl.data.order import rows_for_step
from llmrl.data.tokenization import check_vocabulary
from llmrl.learner.learner import Learner
from llmrl.learner.loading import load_config, load_tokenizer, stop_token_ids
from llmrl.learner.sequences import Floats, Group, completion
from llmrl.runs import Run
from llmrl.trainers import checks, setup
from llmrl.trainers.offline.config import FixedDataKeys, OfflineKeys
from llmrl.trainers.session import Evaluations, Session

Say = Callable[[str], None]
DataT = TypeVar("DataT")
GroupOf = Callable[[dict[str, Any]], Group]
"""A tokenised row -> its group, without the reference's log-probabilities."""
HeldoutMetrics = Callable[[list[Group], list[list[Floats]]], dict[str, float]]
"""(held-out groups, the policy's log-probabilities of each of their sequences) -> numbers."""


class PreparedRows(Protocol):
    """Rows by their index, such as a `datasets` object has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


class GroupData(Protocol):
    """Prepared rows: those to train on, those held out, and the fingerprint of both."""

    @property
    def train(self) -> PreparedRows: ...
    @property
    def heldout(self) -> PreparedRows | None: ...
    @property
    def fingerprint(self) -> str: ...


class OfflineRun:
    """A run on a fixed set of groups; the loop stands in the method's own file (above).

    groups_per_step: over all processes together. noun: what a group is called where progress is told.
    learner_options: LearnerOptions that the method sets.
    """

    def __init__(
        self,
        config: OfflineKeys,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        data: GroupData,
        groups_per_step: int,
        noun: str = "pairs",
        callbacks: Sequence[TrainerCallback] = (),
        **learner_options: Any,
    ) -> None:
        run.verify_dataset(data.fingerprint)
        self.config, self.run, self.data, self.groups_per_step, self.noun = config, run, data, groups_per_step, noun
        problems = setup.task_problems(config.task_evaluation, config, tokenizer, run.note)
        self.total_steps = num_steps(config, groups_per_step, len(data.train))
        options = {"reference": config.reference, "form": config.form, **learner_options}
        self.learner: Learner = setup.build_learner(config, self.total_steps, run.note, **options)
        self._answers = setup.task_evaluation(problems, self.learner.causal_lm, self.learner.accelerator, run)
        self.session = Session(
            run, self.learner, tokenizer, self.total_steps, data.fingerprint, self.evaluate, callbacks
        )
        self._known: dict[int, list[Floats]] = {}
        self._heldout: list[Group] = []
        self._metrics: Mapping[str, HeldoutMetrics] = {}

    def prepare(
        self,
        group_of: GroupOf,
        metrics: Mapping[str, HeldoutMetrics],
        *,
        heldout_of: GroupOf | None = None,
        reference: bool = True,
    ) -> None:
        """Score what the reference has to score; call it once, before the first step.

        metrics: of held-out groups, by the name of the evaluation. heldout_of: makes held-out groups, where they are
        others than those trained on. reference: whether the method compares with one at all.
        """
        self._group_of, self._metrics = group_of, metrics
        self._heldout = [(heldout_of or group_of)(row) for row in self.data.heldout or []]
        if reference:
            self.take_reference(range(self.total_steps))

    def take_reference(self, steps: Iterable[int]) -> None:
        """The policy as it is now becomes the reference of the rows that these steps see, and of those held out.

        One that is taken after the first step cannot be made again: `keep_reference`, before the first step.
        """
        if self.learner.reference_kind == "precomputed":
            self.run.note("Computing the reference's log-probabilities with the weights as they are now.")
            self._known = self.scored_rows(steps)
        scored = self.score(self._heldout, f"held-out {self.noun} scored by the reference")
        self._heldout = [with_reference(g, known) for g, known in zip(self._heldout, scored, strict=True)]

    def keep_reference(self) -> None:
        """From now on checkpoints hold the reference's log-probabilities."""
        self.learner.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        """The reference's log-probabilities, by row, and of each held-out group (None: there are none yet)."""
        heldout = [[_tensor(s.reference_logprobs) for s in group] for group in self._heldout]
        return {"known": {row: [_tensor(s) for s in parts] for row, parts in self._known.items()}, "heldout": heldout}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._known = {row: [part.numpy() for part in parts] for row, parts in saved["known"].items()}
        known = [[None if part is None else part.numpy() for part in parts] for parts in saved["heldout"]]
        self._heldout = [with_reference(g, parts) for g, parts in zip(self._heldout, known, strict=True)]

    def rows(self, step: int) -> list[int]:
        """The training rows of step `step` (from 0)."""
        return rows_for_step(step, self.groups_per_step, len(self.data.train), self.config.seed)

    def groups(self, step: int) -> list[Group]:
        """The groups of step `step`, with the reference's log-probabilities where they are precomputed."""
        return [with_reference(self._group_of(self.data.train[row]), self._known.get(row)) for row in self.rows(step)]

    def scored_rows(self, steps: Iterable[int]) -> dict[int, list[Floats]]:
        """Log-probabilities, with the weights as they are, of all rows that these steps see, by row."""
        known: dict[int, list[Floats]] = {}
        batches = [self.rows(step) for step in steps]
        used = len({row for rows in batches for row in rows})
        watched = self.session.watched(f"training {self.noun} scored by the reference")
        for rows in batches:
            if len(known) == used:
                break
            if any(row not in known for row in rows):
                scored = self.learner.logprobs([self._group_of(self.data.train[row]) for row in rows])
                for row, logprobs in zip(rows, scored, strict=True):
                    known.setdefault(row, logprobs)
                watched(len(known), used)
        return known

    def score(self, groups: list[Group], what: str) -> list[list[Floats]]:
        """Log-probabilities with the weights as they are; progress is told in the words of `what`, and a signal is
        heard meanwhile."""
        return self.learner.logprobs(groups, progress=self.session.watched(what))

    def evaluate(self) -> Evaluations:
        """Metrics of the held-out groups, and the answers to the problems of task_evaluation.

        Where they are interrupted, a checkpoint of the steps before is left.
        """
        found: Evaluations = {}
        with self.session.before_updates():
            if self._heldout and self._metrics:
                scored = self.score(self._heldout, f"held-out {self.noun} scored by the policy")
                found = {name: metrics(self._heldout, scored) for name, metrics in self._metrics.items()}
            return found | self._answers()


def num_steps(config: OptimizationKeys, groups_per_step: int, num_groups: int) -> int:
    """Optimizer steps: max_steps, or as many as the epochs need, the last one filled up from the next epoch."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * num_groups / groups_per_step)


def _tensor(logprobs: Floats | None) -> torch.Tensor | None:
    return None if logprobs is None else torch.from_numpy(logprobs)


def with_reference(group: Group, logprobs: Sequence[Floats | None] | None) -> Group:
    """The group with the reference's log-probabilities of its sequences; unchanged for None."""
    if logprobs is None:
        return group
    return tuple(dataclasses.replace(s, reference_logprobs=known) for s, known in zip(group, logprobs, strict=True))


def pair(row: dict[str, Any]) -> Group:
    """A row of PreferenceData -> the group (chosen, rejected)."""
    return completion(row["prompt_ids"], row["chosen_ids"]), completion(row["prompt_ids"], row["rejected_ids"])


def prepared(
    config: FixedDataKeys, prepare: Callable[..., DataT], say: Say, dataset: Any = None, **own: Any
) -> tuple[PreTrainedTokenizerBase, DataT]:
    """The model's tokenizer, checked against its vocabulary, and the configured rows, tokenised.

    prepare: `prepare_preferences` or another of `llmrl.data`, with what it takes of its `own`. dataset: replaces
    `dataset_name` by a `datasets` object.
    """
    path = models.resolve(config.model_name_or_path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, load_config(path))
    stops, faulty_rows = frozenset(stop_token_ids(path)), config.faulty_rows
    options = {"dataset": dataset, "stop_token_ids": stops, "faulty_rows": faulty_rows, **own}
    return tokenizer, prepare(config, tokenizer, say, **options)


def check_offline(
    config: OfflineKeys,
    load: Callable[[Say], tuple[PreTrainedTokenizerBase, GroupData]],
    groups_per_step: int,
    noun: str = "pairs",
) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError.

    load: reads the data as training would.
    """
    said: list[str] = []
    tokenizer, data = load(said.append)
    setup.task_problems(config.task_evaluation, config, tokenizer, said.append)
    steps = num_steps(config, groups_per_step, len(data.train))
    said.append(f"{len(data.train)} {noun} to train on, {len(data.heldout or [])} held out; {steps} optimizer steps")
    return said + checks.fits(config)
