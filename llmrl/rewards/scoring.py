"""Scores completions by several weighted reward functions at once.

    total = sum over functions with a score of weight * score

Invariants: no score is None, never 0 and never NaN; a completion that no weighted function scored has no total; the
event loop is never blocked; a function's failure costs its own scores only, until it fails again and again.

    scorer = Scorer(config, run.console.say)
    scorer.check(columns, "data.jsonl")          # before anything expensive
    scores = await scorer.score(prompts, completions, completion_ids, columns)
    logged, tallies = scorer.noted()             # of all calls since the last time
    scorer.close()
"""

import asyncio
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rewards.calls import Caller, Say, Tally, columns_named
from llmrl.rewards.functions import Rewards
from llmrl.rewards.keys import RewardKeys
from llmrl.rewards.loading import load
from llmrl.rewards.verifiers import Verifiers


@dataclass(frozen=True)
class Scores:
    """Of S completions, in their order.

    `totals_S`: the weighted sums. `by_function`: each function's own scores, unweighted. `extra`: further columns that
    functions logged (`log_extra`), for the file of rollouts.
    """

    totals_S: Rewards
    by_function: dict[str, Rewards]
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Scorer:
    """The reward functions of a configuration, ready to be called from any event loop."""

    def __init__(self, keys: RewardKeys, say: Say) -> None:
        """Loads reward models. Raises RefusedError for functions that are not there and for options that they do not
        take."""
        self.pool = Verifiers(keys.verifier_processes, keys.verifier_timeout_seconds)
        self.weights = {entry.label: entry.weight for entry in keys.rewards}
        self._clip, self._leave_out = keys.reward_clip, keys.reward_missing == "leave_out"
        self._callers = {
            entry.label: Caller(
                entry.label,
                load(entry, self.pool, say),
                keys.reward_timeout_seconds,
                keys.reward_max_failures,
                say,
                keys.score_ranges.get(entry.label),
            )
            for entry in keys.rewards
        }
        for label, caller in self._callers.items():
            if caller.within is not None and caller.function.is_logit:
                raise RefusedError(
                    f"{label}: a reward model's scores are of any size, and here they must lie from "
                    f"{caller.within[0]:g} to {caller.within[1]:g}. Remedy: its option sigmoid, true"
                )
        self._recent: dict[str, list[float]] = {}  # what functions logged
        self._told: dict[str, float] = {}

    def check(self, columns: Collection[str], where: str) -> None:
        """Refuse data (`where` it is from) that lacks a column which a function needs."""
        for label, caller in self._callers.items():
            for names in caller.function.needs:
                if not any(name in columns for name in names):
                    raise RefusedError(
                        f"{where}: the reward function {label} needs {columns_named(names)}; there are "
                        f"{', '.join(sorted(columns))}. {caller.function.remedy(names, columns)}"
                    )

    async def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Any = None,
        dialogues: Sequence[tuple[Any, Any]] | None = None,
    ) -> Scores:
        """Scores of S completions; `columns` have an entry for each. All functions run at the same time.

        Prompts and completions are texts or lists of messages. `dialogues`: (prompt, completion) of each as a reward
        model is to read them, where that is something else.

        Raises RunFailedError as `Caller` does, and for columns of `log_extra` without an entry for each completion.
        """
        given = self._given(prompts, completions, completion_ids, columns, trainer_state, dialogues)
        extra: dict[str, list[Any]] = {}
        wrong: list[str] = []

        def log_extra(of: str, name: str, values: Sequence[Any]) -> None:
            extra[name] = list(values)
            if len(extra[name]) != len(completions):
                wrong.append(f"reward function {of} logged {len(extra[name])} values of {name} with log_extra")

        by_function = await self._all(given, len(completions), log_extra)
        if wrong:
            expected = f"expected {len(completions)}, one a completion"
            raise RunFailedError(f"{wrong[0]}; {expected}. Mend the function, and resume the run")
        totals = [self._total(values) for values in zip(*by_function.values(), strict=True)]
        return Scores(totals, by_function, extra)

    async def try_out(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Any = None,
        dialogues: Sequence[tuple[Any, Any]] | None = None,
    ) -> None:
        """Call the user's own functions once, as `score` would; what they log is forgotten.

        Raises RefusedError for one that raises, gives no answer in time, or returns something else than a list of as
        many scores.
        """
        given = self._given(prompts, completions, completion_ids, columns, trainer_state, dialogues)
        nowhere = {name: lambda *logged, **named: None for name in ("log_extra", "log_metric")}
        for caller in self._callers.values():
            if caller.function.own:
                await caller.try_out({**given(caller), **nowhere}, len(completions))

    def _given(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Any,
        dialogues: Sequence[tuple[Any, Any]] | None,
    ) -> Callable[[Caller], dict[str, Any]]:
        """What each function is called with, but for `log_extra`."""
        for name, values in {"prompts": prompts, "completion_ids": completion_ids, **columns}.items():
            if len(values) != len(completions):
                raise ValueError(f"{len(completions)} completions, but {len(values)} {name}")
        arguments = {
            **columns,
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            "log_metric": lambda name, value: self._recent.setdefault(name, []).append(float(value)),
        }
        if trainer_state is not None:
            arguments["trainer_state"] = trainer_state
        for_models = dict(arguments)
        if dialogues is not None:
            for_models |= {"prompts": [p for p, _ in dialogues], "completions": [c for _, c in dialogues]}
        return lambda caller: for_models if caller.function.is_model else arguments

    async def _all(
        self, given: Callable[[Caller], dict[str, Any]], count: int, log_extra: Callable[..., None]
    ) -> dict[str, Rewards]:
        tasks = [
            asyncio.ensure_future(caller({**given(caller), "log_extra": functools.partial(log_extra, label)}, count))
            for label, caller in self._callers.items()
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return dict(zip(self._callers, found, strict=True))

    def _total(self, scores: Sequence[float | None]) -> float | None:
        """The weighted sum of one completion's scores; functions of weight 0 are only for show."""
        parts = [(weight, score) for weight, score in zip(self.weights.values(), scores, strict=True) if weight]
        there = [weight * score for weight, score in parts if score is not None]
        if not there or (len(there) < len(parts) and not self._leave_out):
            return None
        total = sum(there)
        return total if self._clip is None else max(-self._clip, min(self._clip, total))

    @property
    def tallies(self) -> dict[str, Tally]:
        """What has happened so far, by function."""
        return {label: caller.tally for label, caller in self._callers.items()}

    def noted(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Since the last time this was asked: the values that functions logged, by name, and by name of the metric the
        completions without a score, the calls that failed, the seconds, the verifications killed and crashed.

        To be asked between calls of `score`, by whoever made them.
        """
        recent, self._recent = self._recent, {}
        totals = self._totals()
        before, self._told = self._told, totals
        return recent, {name: value - before.get(name, 0.0) for name, value in totals.items()}

    def _totals(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for label, tally in self.tallies.items():
            totals[f"rewards/{label}/no_score"] = float(tally.no_score)
            totals[f"rewards/{label}/failures"] = float(tally.failures)
            totals[f"rewards/{label}/seconds"] = tally.seconds
        return {
            **totals,
            "verifier/killed": float(self.pool.counts.killed),
            "verifier/crashed": float(self.pool.counts.crashed),
        }

    def close(self) -> None:
        """End the verifier processes."""
        self.pool.close()
