"""How well a reward predicts the actual score under each filtration: the paper's measure for choosing one.

Zhang et al., arXiv 2409.06957, Table 1. A step has too few responses for it, so it is taken over those of the latest
steps; they are kept in the checkpoints, so that a resumed run goes on with the same numbers.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from llmrl.objectives.filtration import Strategy, bootstrap_r_squared, rank_weights, reward_edges, reward_fit
from llmrl.rollout.trajectory import RolloutGroup

RECENT_STEPS = 10
STRATEGIES: tuple[Strategy, ...] = ("none", "best", "best_random", "best_worst", "power")


class RewardFits:
    """The rewards of the latest steps beside the scores named `truth`."""

    def __init__(self, truth: str, power: float) -> None:
        self.truth, self.power = truth, power
        self.steps: deque[list[tuple[float, float, int]]] = deque(maxlen=RECENT_STEPS)

    def add(self, groups: Sequence[RolloutGroup]) -> None:
        """A step's responses; those without a reward or without the score say nothing."""
        self.steps.append([
            (rollout.reward, truth, number)
            for number, group in enumerate(groups)
            for rollout in group.rollouts
            if rollout.reward is not None and (truth := rollout.scores.get(self.truth)) is not None
        ])  # fmt: skip

    def metrics(self, draws: torch.Generator) -> dict[str, float]:
        """R^2, slope, points, and the 95% interval of R^2 over resampled prompts, by strategy, where they are defined.

        All strategies are judged on the same responses, in the same twenty intervals of the reward.
        """
        rewards_S, truth_S, group_S = self._together()
        if not len(rewards_S):
            return {}
        edges = reward_edges(rewards_S)
        found: dict[str, float | None] = {}
        for strategy in STRATEGIES:
            weights_S = rank_weights(rewards_S, group_S, strategy, draws, self.power)
            fit = reward_fit(rewards_S, truth_S, weights_S, edges)
            interval = bootstrap_r_squared(rewards_S, truth_S, weights_S, group_S, edges, draws)
            low, high = interval or (None, None)
            found |= {
                f"filtration/r_squared/{strategy}": fit.r_squared,
                f"filtration/r_squared_low/{strategy}": low,
                f"filtration/r_squared_high/{strategy}": high,
                f"filtration/slope/{strategy}": fit.slope,
                f"filtration/points/{strategy}": float(fit.points),
            }
        return {name: value for name, value in found.items() if value is not None}

    def _together(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rewards, scores and prompts [S] of the steps; every step's prompts are prompts of their own."""
        known = [
            (reward, truth, (step, number)) for step, rows in enumerate(self.steps) for reward, truth, number in rows
        ]
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for _, _, prompt in known))}
        return (
            torch.tensor([reward for reward, _, _ in known], dtype=torch.float64),
            torch.tensor([truth for _, truth, _ in known], dtype=torch.float64),
            torch.tensor([numbers[prompt] for _, _, prompt in known], dtype=torch.int64),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = deque(state["steps"], maxlen=RECENT_STEPS)
