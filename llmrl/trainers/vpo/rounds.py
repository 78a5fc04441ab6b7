"""The rounds of online VPO: pairs of what was sampled, calibration answers of the reference, updates on both.

Invariants
- A pair is trained on as the group (chosen, rejected, *calibration answers to the same prompt), with the reference's
  log-probabilities, which are asked for once.
- What an update sees follows from its step, the seed, the pairs so far and the guard's last reading, and a checkpoint
  holds what of that is not in the weights.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmrl.data.order import RowCursor, rows_for_step
from llmrl.errors import RunFailedError
from llmrl.learner.sequences import Group, restored, stored
from llmrl.objectives.vpo import VPO, alpha_of_round
from llmrl.rollout.collector import Task
from llmrl.rollout.protocol import row_seed
from llmrl.rollout.trajectory import Rollout, RolloutGroup
from llmrl.runs import Run
from llmrl.trainers.offline.run import with_reference
from llmrl.trainers.online.metrics import means_of_updates
from llmrl.trainers.online.run import SampledRun
from llmrl.trainers.online.sequences import token_sequences
from llmrl.trainers.vpo.calibration import Answers, drawn_once
from llmrl.trainers.vpo.online_config import VPOOnlineConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

CALIBRATION_SEED = 1_000_003
"""Beside the numbers of steps, from which the seeds of rollouts follow."""


class Labelled(NamedTuple):
    """Pairs (chosen, rejected) of one prompt's samples, how many were equally good or equal, and how many samples a
    limit cut off."""

    pairs: list[tuple[Rollout, Rollout]]
    ties: int
    cut_off: int


def labelled(group: RolloutGroup, pairing: Literal["in_order", "best_worst"]) -> Labelled:
    """The pairs of a prompt's samples that have a reward and ended by themselves.

    A sample that a limit cut off is left out: as the chosen one it would teach the policy not to end.
    """
    judged = [rollout for rollout in group.rollouts if rollout.reward is not None and rollout.num_sampled]
    ended = [rollout for rollout in judged if rollout.ended_by_itself]
    worth = attrgetter("total")
    if pairing == "best_worst":
        couples = [(max(ended, key=worth), min(ended, key=worth))] if len(ended) > 1 else []
    else:
        couples = list(zip(ended[0::2], ended[1::2], strict=False))
    pairs = [
        (first, second) if first.total > second.total else (second, first)
        for first, second in couples
        if first.total != second.total and first.pieces != second.pieces
    ]
    return Labelled(pairs, len(couples) - len(pairs), len(judged) - len(ended))


class Rounds(SampledRun):
    """A run of online VPO; its loop stands in `vpo_online`."""

    config: VPOOnlineConfig

    def __init__(
        self, config: VPOOnlineConfig, run: Run, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()
    ) -> None:
        super().__init__(config, run, needs_reference=True, dataset=dataset, callbacks=callbacks)
        self.answers: Answers = {}
        self.pool: list[Group] = []  # what updates draw from
        self.num_newest = 0
        self.log_ratio = 0.0  # of the latest update's calibration answers

    def state_dict(self) -> dict[str, Any]:
        pool = self.pool if self.config.pairs == "aggregated" else []
        kept = [[stored(sequence) for sequence in group] for group in pool]
        return {**super().state_dict(), "pool": kept, "log_ratio": self.log_ratio}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.pool = [tuple(restored(sequence) for sequence in group) for group in saved["pool"]]
        self.log_ratio = saved["log_ratio"]

    def draw_calibration(self) -> None:
        """Have the reference answer all prompts that the run will use; before the first step."""
        if self.config.calibration != "reference":
            return
        train = self.task.data.train
        used = min(len(train), self.session.total_steps * self.config.prompts_per_step)
        prompts = [train[row] for row in sorted(RowCursor(len(train), self.config.seed).take(used))]
        tasks = [
            Task(p.number, p.row, self.config.calibration_samples, row_seed(self.config.seed, CALIBRATION_SEED, place))
            for place, p in enumerate(prompts)
        ]

        def draw() -> Answers:
            with self.run.listening():
                found = self.sampler.of_tasks(tasks, "calibration answers of the reference", judged=False)
            return {
                group.number: tuple(s for rollout in group.rollouts for s in token_sequences(rollout, {}))
                for group in found.groups
            }

        rows = {prompt.number for prompt in prompts}
        self.answers = drawn_once(self.run, self.learner, rows, draw, self.task.tokenizer.decode)
        if unanswered := sum(not self.answers[row] for row in rows):
            self.run.note(
                f"the reference gave no calibration answer to {unanswered} of {len(rows)} prompts: their pairs are "
                "left out (counted in the metric pairs/without_calibration)"
            )

    def stop_if_unbounded(self) -> None:
        """End the run where the guard says so, with a checkpoint of the steps before."""
        least = self.config.least_log_ratio
        if self.config.below_least == "stop" and least is not None and self.log_ratio < least:
            with self.session.before_updates():
                raise RunFailedError(
                    f"calibration answers have lost {-self.log_ratio:.1f} nats on average, more than least_log_ratio "
                    f"{least:g} allows: the optimistic term has no lower bound. Lower alpha or the learning rate, set "
                    "calibration_floor, or below_least: skip"
                )

    def label(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Make the round's pairs and put them into the pool; what came of it, as metrics."""
        newest: list[Group] = []
        ties = cut_off = unanswered = 0
        for group in groups:
            found = labelled(group, self.config.pairing)
            ties, cut_off = ties + found.ties, cut_off + found.cut_off
            calibration = self.answers.get(group.number, ())
            if self.config.calibration == "reference" and not calibration:
                unanswered += len(found.pairs)
                continue
            newest += [(*token_sequences(c, {}), *token_sequences(r, {}), *calibration) for c, r in found.pairs]
        scored = self.learner.logprobs(newest, of_reference=True)
        newest = [with_reference(group, known) for group, known in zip(newest, scored, strict=True)]
        self.pool = (self.pool if self.config.pairs == "aggregated" else []) + newest
        self.num_newest = len(newest)
        counts = {"pairs": len(newest), "pairs/ties": ties, "pairs/cut_off": cut_off, "pairs/pool": len(self.pool)}
        counts |= {"pairs/without_calibration": unanswered} if unanswered else {}
        return {name: float(count) for name, count in counts.items()}

    def why_nothing(self, labelled: dict[str, float]) -> str | None:
        """Why a round has brought no pair, as `label` counted, where it is not that all samples are equally good."""
        if labelled.get("pairs/without_calibration"):
            return (
                "the reference gave no calibration answer to any prompt whose samples made a pair (calibration: both "
                "needs none)"
            )
        if labelled["pairs/cut_off"] and not labelled["pairs/ties"]:
            return "no two answers to a prompt ended by themselves within the limits"
        return None

    def improve(self, step: int) -> dict[str, float]:
        """The round's updates; none where it has brought no pair. Means of their metrics."""
        done: list[dict[str, float]] = []
        size = min(self.config.pairs_per_update or self.num_newest, len(self.pool))
        for number in range(self.config.updates_per_step if self.num_newest else 0):
            alpha = self._alpha(step)
            rows = rows_for_step(number, size, len(self.pool), row_seed(self.config.seed, step, 1))
            objective = self._objective(alpha)
            update = self.learner.update([self.pool[row] for row in rows], objective, advance_schedule=False)
            self.log_ratio = update["calibration/log_ratio"]
            done.append(update | {"alpha": alpha})
        self.learner.advance_schedule()
        self.policy_changed()
        return means_of_updates(done, self.learner.learning_rate)

    def _alpha(self, step: int) -> float:
        least = self.config.least_log_ratio
        if least is not None and self.log_ratio < least:
            ends = "for the rest of this round, after which the run ends (below_least: stop"
            goes_on = "until they are likelier again (least_log_ratio; counted in the metric alpha"
            self.run.note(
                f"calibration answers have lost more than {-least:g} nats on average: the optimistic term is left out "
                f"{ends if self.config.below_least == 'stop' else goes_on})"
            )
            return 0.0
        return alpha_of_round(self.config.alpha, step + 1, self.config.alpha_schedule)

    def _objective(self, alpha: float) -> Any:
        config = self.config
        kind: Literal["samples", "pair"] = "samples" if config.calibration == "reference" else "pair"
        return VPO(config.beta, alpha, "optimism", kind, config.calibration_floor).objective()
