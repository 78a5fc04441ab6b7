"""A step's rollouts as the learner takes them, and the optimizer steps that are made of them.

    experience = Experience(groups)              # from the collector
    experience.assign_advantages(algorithm)      # after `score` where they are made of more than rewards
    experience.keep(...)                         # those that are trained on
    experience.score(learner, ...)               # old and reference log-probabilities of these
    metrics = experience.train(learner, objective, ...)

Invariants
- Flat vectors `_N` run over the scored tokens of all rollouts in the order of `samples`, `_S` over the rollouts.
- What cannot teach (no advantage, and no other term in the loss) is not computed, but counts in every denominator.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl.learner.learner import Learner
from llmrl.learner.prefix_tree import within_budget
from llmrl.learner.sequences import Floats, Group, per_sequence, totals
from llmrl.objectives.algorithm import Algorithm
from llmrl.objectives.scored import Objective
from llmrl.rollout.trajectory import RolloutGroup
from llmrl.trainers.online.metrics import means_of_updates
from llmrl.trainers.online.sequences import token_sequences


@dataclass
class Sample:
    """One rollout: its pieces for the learner, its reward, which prompt of the step it answers, and whether a limit cut
    it off."""

    pieces: Group
    reward: float
    group: int
    cut: bool

    @property
    def num_scored(self) -> int:
        return sum(piece.num_scored for piece in self.pieces)


class Experience:
    """The rollouts of one step that have a reward and at least one sampled token."""

    def __init__(self, groups: Sequence[RolloutGroup]) -> None:
        self.scored, self.num_masked = False, 0
        self.samples = [
            Sample(pieces, rollout.total, number, not rollout.ended_by_itself)
            for number, group in enumerate(groups)
            for rollout in group.rollouts
            if rollout.reward is not None
            if (pieces := token_sequences(rollout, {"reward": rollout.total}))
        ]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def rewards_S(self) -> Tensor:
        return torch.tensor([sample.reward for sample in self.samples], dtype=torch.float32)

    @property
    def group_index_S(self) -> Tensor:
        return torch.tensor([sample.group for sample in self.samples])

    @property
    def sequence_index_N(self) -> Tensor:
        counts = torch.tensor([sample.num_scored for sample in self.samples])
        return torch.arange(len(self.samples)).repeat_interleave(counts)

    def token_values(self, name: str) -> Tensor | None:
        """[N]: what `set_token_values` put there under this name, or None."""
        parts = [piece.token_values.get(name) for sample in self.samples for piece in sample.pieces]
        found = [part for part in parts if part is not None]
        return torch.from_numpy(np.concatenate(found)) if found and len(found) == len(parts) else None

    def set_token_values(self, name: str, values_N: Tensor, indices: Iterable[int] | None = None) -> None:
        """Give every scored token (of the rollouts at these indices) a number under this name."""
        chosen = self.samples if indices is None else [self.samples[i] for i in indices]
        numbers = per_sequence(values_N.float().numpy(), [sample.pieces for sample in chosen])
        for sample, parts in zip(chosen, numbers, strict=True):
            sample.pieces = tuple(
                replace(piece, token_values={**piece.token_values, name: part})
                for piece, part in zip(sample.pieces, parts, strict=True)
            )

    def score(self, learner: Learner, *, old: bool, reference: bool, values: bool, idle: bool = True) -> None:
        """Ask the learner, as it is now, for what the updates will compare with: `old_logprobs`, `old_values`, and the
        reference's log-probabilities. `idle` False: not of rollouts without an advantage, which no update computes."""
        self.scored = True
        chosen = [i for i in range(len(self)) if idle or self._has_advantage(i)]
        groups = self._groups(chosen, learner.options.tokens_per_microbatch)
        if chosen and (old or values):
            scored = [piece for group in learner.scores(groups) for piece in group]
            self.set_token_values("old_logprobs", _joined(piece.logprobs for piece in scored), chosen)
            if values:
                found = [piece.values for piece in scored if piece.values is not None]
                assert len(found) == len(scored), "values need a value head"
                self.set_token_values("old_values", _joined(found), chosen)
        if chosen and reference:
            parts = iter([piece for group in learner.logprobs(groups, of_reference=True) for piece in group])
            for i in chosen:
                pieces = self.samples[i].pieces
                self.samples[i].pieces = tuple(replace(piece, reference_logprobs=next(parts)) for piece in pieces)

    def reference_logprobs(self) -> Tensor | None:
        """[N], or None where `score` was not asked for them."""
        parts = [piece.reference_logprobs for sample in self.samples for piece in sample.pieces]
        found = [part for part in parts if part is not None]
        return torch.from_numpy(np.concatenate(found)) if found else None

    def assign_advantages(self, algorithm: Algorithm) -> Tensor:
        """Put `advantages` (and with a critic `returns`) on the tokens; returns each rollout's largest |A|, [S]."""
        if not self.samples:
            return torch.zeros(0)
        advantages_N, returns_N = algorithm.advantages(
            self.rewards_S,
            self.sequence_index_N,
            self.group_index_S,
            self.token_values("old_logprobs"),
            self.reference_logprobs(),
            self.token_values("old_values"),
        )
        self.set_token_values("advantages", advantages_N)
        if returns_N is not None:
            self.set_token_values("returns", returns_N)
        largest_S = torch.zeros(len(self.samples))
        return largest_S.scatter_reduce(0, self.sequence_index_N, advantages_N.abs().float(), "amax")

    def keep(self, indices: Sequence[int]) -> None:
        """Only these rollouts, in their old order."""
        self.samples = [self.samples[i] for i in sorted(indices)]

    def leave_out_cut(self) -> None:
        """Take away the rollouts that a limit cut off, `num_masked` of them; the others' advantages stay."""
        before = len(self)
        self.samples = [sample for sample in self.samples if not sample.cut]
        self.num_masked += before - len(self)

    def set_weights(self, weights_S: Sequence[float]) -> None:
        """How many times each rollout counts; those that count 0 times leave."""
        for sample, weight in zip(self.samples, weights_S, strict=True):
            sample.pieces = tuple(replace(piece, weight=float(weight)) for piece in sample.pieces)
        self.samples = [sample for sample, weight in zip(self.samples, weights_S, strict=True) if weight > 0]

    def train(
        self,
        learner: Learner,
        objective: Objective,
        *,
        epochs: int,
        rollouts_per_update: int | None,
        seed: int,
        skip_idle: bool,
        whole_prompts: bool = False,
        language: bool = True,
    ) -> dict[str, float]:
        """All optimizer steps of one step of the method; returns the means of their metrics, `num_trained_tokens` of
        the sequences that went into them and `num_computed_tokens` that were computed for it, once for each epoch.

        Every epoch goes through all rollouts once, in an order drawn from `seed`, `rollouts_per_update` at a time
        (None: all); `whole_prompts`: about as many, a prompt's rollouts in one update. `skip_idle`: rollouts without an
        advantage add nothing to the gradient and are not computed. `language` False trains the value head alone.
        """
        batches = self._minibatches(epochs, rollouts_per_update, seed, whole_prompts)
        done: list[dict[str, float]] = []
        for indices in batches:
            counts = totals(self._groups(indices))
            teaching = [i for i in indices if not skip_idle or self._has_advantage(i)]
            if teaching:
                groups = self._groups(teaching, learner.options.tokens_per_microbatch)
                done.append(learner.update(groups, objective, counts, advance_schedule=False, language=language))
        learner.advance_schedule()
        return means_of_updates(done, learner.learning_rate)

    def prompts(self) -> list[Group]:
        """The rollouts of each prompt together, as one group."""
        return self._groups(range(len(self)))

    def _has_advantage(self, index: int) -> bool:
        return any(bool(np.any(piece.token_values["advantages"])) for piece in self.samples[index].pieces)

    def _minibatches(self, epochs: int, size: int | None, seed: int, whole_prompts: bool = False) -> list[list[int]]:
        count = len(self.samples)
        if size is None or size >= count:
            return [list(range(count)) for _ in range(epochs)] if count else []
        draw = np.random.RandomState(seed % 2**32)
        if whole_prompts:
            members: dict[int, list[int]] = {}
            for index, sample in enumerate(self.samples):
                members.setdefault(sample.group, []).append(index)
            prompts = list(members.values())
            return [
                batch
                for _ in range(epochs)
                for batch in _near(size, [prompts[i] for i in draw.permutation(len(prompts))])
            ]
        orders: list[NDArray[np.int64]] = [draw.permutation(count) for _ in range(epochs)]
        return [order[start : start + size].tolist() for order in orders for start in range(0, count, size)]

    def _groups(self, indices: Iterable[int], budget: int | None = None) -> list[Group]:
        """The rollouts at these indices, those of one prompt together, so that the prompt is computed once.

        With a `budget` of tokens a prompt's rollouts are divided, where together they would exceed what one forward
        pass should compute; nothing compares them any more.
        """
        members: dict[int, list[Group]] = {}
        for index in sorted(indices):
            members.setdefault(self.samples[index].group, []).append(self.samples[index].pieces)
        return [group for rollouts in members.values() for group in within_budget(rollouts, budget)]


def _near(size: int, prompts: Iterable[list[int]]) -> list[list[int]]:
    """The prompts' rollouts in order, cut between prompts where that comes nearest to batches of `size`."""
    batches: list[list[int]] = []
    for rollouts in prompts:
        if batches and 2 * len(batches[-1]) + len(rollouts) <= 2 * size:
            batches[-1] = batches[-1] + rollouts
        else:
            batches.append(rollouts)
    return batches


def _joined(parts: Iterable[Floats]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(parts)))
