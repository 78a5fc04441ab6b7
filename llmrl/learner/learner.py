"""The learner: one copy of the model, four verbs - `logprobs`, `update`, `weights`, `save`/`load`.

Every rank is handed the same groups and takes its own share, balanced by tokens; callers never branch on sharding.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from llmrl.errors import RefusedError, RunFailedError
from llmrl.learner import forms, reference, sharding, state, together
from llmrl.learner.batches import ModelInputs, scored_tokens
from llmrl.learner.optimizer import adamw, forget, only_value_head
from llmrl.learner.options import LearnerOptions
from llmrl.learner.policy import Policy, Scores
from llmrl.learner.sequences import Floats, Group, per_sequence, split_into_microbatches, split_over_ranks, totals
from llmrl.objectives.scored import Objective, Totals, extreme

MOST_OVERFLOWS = 40
"""Updates in a row that float16's loss scale may spoil: it starts at 2**16 and halves, so by then it is 2**-24."""


class SequenceScores(NamedTuple):
    """Of one token sequence's scored tokens: log-probabilities, and the value head's values where there is one."""

    logprobs: Floats
    values: Floats | None


class Learner:
    """A causal language model that can be scored and updated through any objective.

    Raises RefusedError if there is nothing to train, and says through `say` which form of forward pass was chosen.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel | PeftModel,
        options: LearnerOptions,
        accelerator: Accelerator | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.options = options
        self._phase: dict[str, Any] = {}  # what `restart` changed of them
        self.accelerator = accelerator or sharding.build_accelerator()
        self.policy = Policy(
            causal_lm,
            temperature=options.temperature,
            value_head=options.value_head,
            value_gradient=options.value_gradient,
        )
        forms.disable_dropout(causal_lm)
        form = forms.choose(self.policy, options.form, say)
        if options.gradient_checkpointing:
            forms.enable_gradient_checkpointing(self.policy)
        self.reference_kind = reference.choose(options.reference, isinstance(causal_lm, PeftModel))
        self.frozen = self._frozen_reference() if self.reference_kind == "frozen" else None

        self.optimizer = adamw(self.policy, options)
        self.scheduler = self._schedule()
        # A head whose loss does not reach the language model must not shorten its gradient either.
        apart = self.policy.value_head if not options.value_gradient else None
        self.backend = sharding.build_backend(
            self.accelerator, self.policy, self.optimizer, options.max_grad_norm, apart
        )
        # The scheduler is not prepared: accelerate would step it once per rank.
        self._course = state.Course(self.scheduler)
        state.register(self.accelerator, self.policy, self._course)
        if self.frozen is not None:
            # An engine that casts the policy's weights (DeepSpeed in half precision) must not leave the copy behind.
            self.frozen.to(next(self.policy.parameters()).dtype)
        probe = forms.probe(self.backend.model, causal_lm.config.get_text_config().vocab_size, self.device)
        self.form = forms.check(form, probe, self._precision(), self.device.type == "cpu", say)

    @property
    def causal_lm(self) -> PreTrainedModel | PeftModel:
        """The transformers (or PEFT) model inside."""
        return self.policy.causal_lm

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def learning_rate(self) -> float:
        """What the next update will use."""
        return float(self.scheduler.get_last_lr()[0])

    # -- scoring -------------------------------------------------------------------------------------------------

    def logprobs(
        self,
        groups: list[Group],
        *,
        of_reference: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Floats]]:
        """log pi of the scored tokens of each sequence of each group, float32; the same on every rank.

        `progress` hears after each forward pass how many of this rank's groups are done, and of how many.
        """
        scored = self.scores(groups, of_reference=of_reference, progress=progress)
        return [[sequence.logprobs for sequence in group] for group in scored]

    def scores(
        self,
        groups: list[Group],
        *,
        of_reference: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[SequenceScores]]:
        """As `logprobs`, with the value head's values beside them (none of the reference)."""
        _, mine, batches = self._share(groups)
        scored: dict[int, list[SequenceScores]] = {}
        for batch in self._even(batches):
            members = [mine[i] for i in batch]
            chosen = [groups[i] for i in members] or [forms.dummy_group()]
            found = self._scored(chosen, of_reference)
            logprobs = per_sequence(found.logprobs_N.float().cpu().numpy(), chosen)
            values = None if found.values_N is None else per_sequence(found.values_N.float().cpu().numpy(), chosen)
            for k, i in enumerate(members):
                beside = [None] * len(logprobs[k]) if values is None else values[k]
                scored[i] = [SequenceScores(*pair) for pair in zip(logprobs[k], beside, strict=True)]
            progress(len(scored), len(mine))
        return _merged(self.accelerator, scored, len(groups))

    def _scored(self, groups: list[Group], of_reference: bool) -> Scores:
        inputs = forms.inputs(self.form, groups, self.device)
        if of_reference:
            return Scores(self._reference_scores(inputs), None, None)
        with reference.scoring(self.backend.model):
            return self.backend.model(inputs)

    def _reference_scores(self, inputs: ModelInputs) -> Tensor:
        if self.reference_kind not in reference.IN_MEMORY:
            raise RuntimeError(reference.why_not_asked(self.reference_kind))
        model = self.frozen if self.frozen is not None else self.backend.model
        # The copy was not prepared, so the mixed precision in which the policy computes is entered here.
        with reference.scoring(model), reference.adapters_off(self.policy), self.accelerator.autocast():
            return model(inputs).logprobs_N

    def _frozen_reference(self) -> Policy:
        if sharding.zero_stage(self.accelerator) == 3:
            raise RefusedError(reference.FROZEN_UNDER_ZERO3)
        return reference.frozen_copy(self.policy).to(self.device)

    # -- training ------------------------------------------------------------------------------------------------

    def update(
        self,
        groups: list[Group],
        objective: Objective,
        counts: Totals | None = None,
        *,
        advance_schedule: bool = True,
        language: bool = True,
    ) -> dict[str, float]:
        """One optimizer step on `groups` (all ranks' together); returns the means of the objective's metrics, and
        `loss`, `grad_norm`, `learning_rate`, `num_tokens`, `num_computed_tokens` of this step.

        `counts`: the denominators, where more belongs to the step than is computed (sequences without a gradient).
        `advance_schedule`: the learning rate moves on with it; otherwise call `advance_schedule()` in its time.
        `language`: False leaves the language model as it is and updates the value head alone.

        Raises RunFailedError if the loss or the gradient is not finite, more often in a row than `most_skipped`: until
        then the weights stay, `grad_norm` is NaN and `skipped_updates` 1. A gradient that float16's loss scale has
        made so is no error: the scale is lowered.
        """
        sizes, mine, batches = self._share(groups)
        counts = counts or totals(groups)
        sums: dict[str, list[float | Tensor]] = {}
        even = self._even(batches)
        makes_reference = objective.needs_reference and any(
            s.reference_logprobs is None for group in groups for s in group
        )
        self.backend.model.train()
        with self.backend.step():
            for number, batch in enumerate(even, 1):
                is_last = number == len(even)
                with self.backend.accumulating(is_last):
                    if batch:
                        loss = self._loss([groups[mine[i]] for i in batch], objective, counts, sums)
                    else:
                        loss = self._dummy_loss(makes_reference)
                    self.backend.backward(loss, is_last)
        learning_rate = self.learning_rate
        with nullcontext() if language else only_value_head(self.optimizer):
            grad_norm = self.backend.apply()
        metrics = self._means(sums)
        applied = self._applied(metrics["loss"], grad_norm)
        if applied and advance_schedule:
            self.advance_schedule()
        if not applied:
            grad_norm = float("nan")
        return {
            **metrics,
            **({"skipped_updates": float(not applied)} if self.options.most_skipped else {}),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": float(sum(len(s.token_ids) for g in groups for s in g)),
            "num_computed_tokens": float(sum(sizes)),
        }

    def advance_schedule(self) -> None:
        """The learning rate of the next step of the schedule, after all updates of one; of none, where nothing could be
        learned."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def restart(self, **changes: Any) -> None:
        """A further phase of training, on the weights as they are: an optimizer that remembers nothing, and a schedule
        from its start. `changes`: LearnerOptions of this phase, such as learning_rate and total_steps. Called on all
        ranks; `load` comes back into the phase in which was saved."""
        self._phase |= changes
        self.options = replace(self.options, **changes)
        forget(self.optimizer, self.options)
        self.scheduler = self._course.scheduler = self._schedule()

    def _schedule(self) -> Any:
        options = self.options
        return get_scheduler(
            options.lr_scheduler_type,
            self.optimizer,
            options.warmup_steps,
            max(options.total_steps, 1),
            options.lr_scheduler_kwargs,
        )

    def _applied(self, loss: float, grad_norm: float) -> bool:
        """Whether the update changed the weights; raises RunFailedError when it should have and did not."""
        course = self._course
        course.overflows = course.overflows + 1 if self.backend.overflowed else 0
        if np.isfinite(loss) and 0 < course.overflows < MOST_OVERFLOWS:
            return False
        if np.isfinite(loss) and np.isfinite(grad_norm):
            course.skipped = 0
            return True
        course.skipped += 1
        if course.skipped > self.options.most_skipped or self.backend.applied:
            times = f", {course.skipped} updates in a row" if course.skipped > 1 else ""
            raise RunFailedError(
                f"loss {loss}, gradient norm {grad_norm}: not finite{times}. "
                "Lower learning_rate, or use dtype float32 or bfloat16 rather than float16."
            )
        return False

    def _loss(self, groups: list[Group], objective: Objective, counts: Totals, sums: dict[str, list[Any]]) -> Tensor:
        inputs = forms.inputs(self.form, groups, self.device)
        scored = scored_tokens(groups, counts, self.device)
        if objective.needs_reference and scored.reference_logprobs_N is None:
            scored = scored.with_reference(self._reference_scores(inputs))
        scores: Scores = self.backend.model(inputs, objective.needs_entropy)
        scored = scored.with_scores(scores.entropies_N, scores.values_N)
        loss, metrics = objective.loss(scores.logprobs_N, scored)
        # Kept as tensors: they are copied to the host once a step, not once a micro-batch.
        sums.setdefault("loss", []).append((loss.detach(), 0))
        for name, values in metrics.items():
            if values.numel():
                sums.setdefault(name, []).append(_reduced(name, values.detach().double()))
        # A loss that is no number has no gradient either, whatever autograd says: times NaN, no backend applies it.
        return loss * (1 + 0 * loss.detach())

    def _dummy_loss(self, makes_reference: bool) -> Tensor:
        """The forwards and the backward of nothing, for ranks with fewer micro-batches: collectives are met by all.

        `makes_reference`: the other ranks pass through the model without its adapter, too.
        """
        inputs = forms.inputs(self.form, [forms.dummy_group()], self.device)
        if makes_reference:
            self._reference_scores(inputs)
        scores: Scores = self.backend.model(inputs)
        nothing = scores.logprobs_N.sum() * 0.0
        return nothing if scores.values_N is None else nothing + scores.values_N.sum() * 0.0

    def _means(self, sums: dict[str, list[Any]]) -> dict[str, float]:
        """Means over all elements of all ranks, sums of shares; of what ends in `max` or `min` the largest or smallest.

        Ranks may know other names: one that had nothing to compute knows none.
        """
        mine = {
            name: ((extreme(name) or sum)([float(part) for part, _ in parts]), float(sum(n for _, n in parts)))
            for name, parts in sums.items()
        }
        everyone = together.gather(self.accelerator, mine)
        means = {}
        for name in sorted({name for theirs in everyone for name in theirs}):
            totals, counts = zip(*(theirs[name] for theirs in everyone if name in theirs), strict=True)
            total, count = (extreme(name) or sum)(totals), sum(counts)
            means[name] = total if extreme(name) or not count else total / count
        return means

    def _share(self, groups: list[Group]) -> tuple[list[int], list[int], list[list[int]]]:
        """What each group costs, this rank's groups by their indices, and its micro-batches by indices into those."""
        sizes = [forms.size(self.form, group) for group in groups]
        mine = split_over_ranks(sizes, self.accelerator.num_processes)[self.accelerator.process_index]
        return sizes, mine, split_into_microbatches([sizes[i] for i in mine], self.options.tokens_per_microbatch)

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """As many micro-batches on every rank; those added are empty."""
        most = together.largest(self.accelerator, len(batches))
        return batches + [[] for _ in range(most - len(batches))]

    # -- state ---------------------------------------------------------------------------------------------------

    def weights(self, bucket_bytes: int = 2**28) -> Iterator[tuple[str, Tensor]]:
        """The policy's full parameters by name, gathered bucket by bucket under ZeRO-3; all ranks walk together."""
        yield from state.stream_weights(self.causal_lm, bucket_bytes, sharding.zero_stage(self.accelerator) == 3)

    def save(self, folder: Path) -> None:
        """Everything needed to go on exactly (trainable weights, optimizer, schedule, RNG); called on all ranks."""
        state.save(self.accelerator, folder, self._phase)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, in the phase in which it did; called on all ranks."""
        if phase := state.phase_of(folder):
            self.restart(**phase)
        state.load(self.accelerator, folder)

    def export(self, folder: Path) -> None:
        """The model for others to load with `from_pretrained` (or PEFT); called on all ranks."""
        state.export(self.accelerator, self.backend.model, self.causal_lm, folder)

    # -- checks --------------------------------------------------------------------------------------------------

    def _precision(self) -> torch.dtype:
        """The precision that the forward pass computes in."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return mixed.get(self.accelerator.mixed_precision, self.causal_lm.dtype)


def _reduced(name: str, values: Tensor) -> tuple[Tensor, int]:
    """A micro-batch's share of a metric: its sum or extreme, and how many elements that is the mean of (0: of none, a
    share of a sum)."""
    if extreme(name):
        return (values.max() if extreme(name) is max else values.min()), values.numel()
    return values.sum(), values.numel() if values.ndim else 0


def _merged(
    accelerator: Accelerator, scored: dict[int, list[SequenceScores]], num_groups: int
) -> list[list[SequenceScores]]:
    everyone = together.gather(accelerator, scored)
    scored = {i: parts for share in everyone for i, parts in share.items()}
    return [scored[i] for i in range(num_groups)]
