"""What is logged of rollouts, under TRL's names where the quantity is the same."""

from collections.abc import Sequence

import numpy as np

from llmrl.evaluation.intervals import mean_interval
from llmrl.objectives.scored import extreme
from llmrl.rollout.collector import Collected
from llmrl.rollout.trajectory import RolloutGroup, mean_reward


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """TRL's names where the quantity is the same: `num_tokens` are those of the first prompts and of what was sampled,
    each rollout once; lengths are sampled tokens of a rollout; clipped is one whose last turn has no stop token.

    All are of the rollouts that stay, but for `num_tokens` and `dynamic_sampling/...`, which are also of those that
    dynamic sampling discarded."""
    groups = collected.groups
    sampled = [*groups, *(collected.discarded or [])]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics: dict[str, float] = {
        "reward": mean_reward(groups),
        **_spread(groups),
        "rollouts": float(len(rollouts)),
        "num_tokens": float(sum(r.turns[0].start + r.num_sampled for g in sampled for r in g.rollouts if r.turns)),
        "rollout_seconds": collected.seconds,
        "sampled_tokens_per_second": collected.num_sampled / max(collected.seconds, 1e-9),
    }
    if rollouts:
        terminated = [r.num_sampled for r in rollouts if r.ends_in_stop]
        metrics |= {
            **_lengths([r.num_sampled for r in rollouts], "length"),
            **_lengths(terminated or [0], "terminated_length"),
            "completions/clipped_ratio": 1 - len(terminated) / len(rollouts),
            "rollout/turns": float(np.mean([len(r.turns) for r in rollouts])),
        }
    for name in sorted({name for rollout in rollouts for name in rollout.scores}):
        values = [v for rollout in rollouts if (v := rollout.scores.get(name)) is not None]
        metrics[f"rewards/{name}/mean"] = float(np.mean(values)) if values else float("nan")
        metrics[f"rewards/{name}/std"] = float(np.std(values)) if values else float("nan")
    if collected.discarded is not None:
        metrics["dynamic_sampling/prompts_discarded"] = float(len(collected.discarded))
        before = {"reward": mean_reward(sampled), **_spread(sampled)}
        metrics |= {f"dynamic_sampling/{name}": value for name, value in before.items() if name != "reward_std"}
    unusual = {n: c for n, c in collected.counts.items() if n not in ("rollouts", "completed") and c}
    return metrics | {f"rollout/{name}": float(count) for name, count in sorted(unusual.items())}


def _spread(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Mean standard deviation of a prompt's rewards, and the share of prompts whose rewards are all equal. Where each
    prompt has one rollout only, the deviation is that of the step's rewards and there is no share."""
    several = [group.rewards for group in groups if len(group.rewards) > 1]
    if several:
        stds = [float(np.std(rewards, ddof=1)) for rewards in several]
        equal = [len(set(rewards)) == 1 for rewards in several]
        return {"reward_std": float(np.mean(stds)), "frac_reward_zero_std": float(np.mean(equal))}
    rewards = [reward for group in groups for reward in group.rewards]
    return {"reward_std": float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0}


def _lengths(lengths: Sequence[int], name: str) -> dict[str, float]:
    return {
        f"completions/mean_{name}": float(np.mean(lengths)),
        f"completions/min_{name}": float(min(lengths)),
        f"completions/max_{name}": float(max(lengths)),
    }


def heldout_metrics(groups: Sequence[RolloutGroup], asked: int) -> dict[str, float]:
    """Mean reward over `n` rows with a 95% interval, means of the scores, shares of the end states that are no
    completion. `asked`: how many rollouts there should be. Of several rollouts of a row the mean counts, as one
    observation: they are not independent of one another. A score that not all rollouts have is the mean of those that
    have it, and how many these are is `NAME_n`: an environment may give it to those alone that came far enough."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = _row_means([[rollout.reward for rollout in group.rollouts] for group in groups])
    mean, low, high = mean_interval(rewards)
    metrics = {"reward": mean, "reward_interval_low": low, "reward_interval_high": high, "n": float(len(rewards))}
    for name in sorted({name for rollout in rollouts for name in rollout.scores}):
        values = _row_means([[rollout.scores.get(name) for rollout in group.rollouts] for group in groups])
        metrics[name] = float(np.mean(values)) if values else float("nan")
        having = sum(rollout.scores.get(name) is not None for rollout in rollouts)
        if having < len(rollouts):
            metrics[f"{name}_n"] = float(having)
    metrics["truncated"] = sum(r.truncated for r in rollouts) / max(len(rollouts), 1)
    metrics["mean_length"] = float(np.mean([r.num_sampled for r in rollouts])) if rollouts else 0.0
    rewarded = sum(rollout.reward is not None for rollout in rollouts)
    if asked > rewarded:
        metrics["without_reward"] = float(asked - rewarded)
    return metrics


def _row_means(rows: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean of each row's values; rows without any are left out."""
    found = [[value for value in row if value is not None] for row in rows]
    return [sum(values) / len(values) for values in found if values]


def means_of_updates(updates: Sequence[dict[str, float]], learning_rate: float) -> dict[str, float]:
    """Over a step's updates, and how many they are; tokens are added up, of extremes one is taken."""
    if not updates:
        nothing = dict.fromkeys(("loss", "grad_norm", "num_trained_tokens", "num_computed_tokens", "updates"), 0.0)
        return {**nothing, "learning_rate": learning_rate}
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        numbers = [update[name] for update in updates if name in update]
        if name == "num_tokens":  # of the updates' sequences; a run's are those of its rollouts
            merged["num_trained_tokens"] = sum(numbers)
        elif name in ("num_computed_tokens", "skipped_updates"):
            merged[name] = sum(numbers)
        else:
            merged[name] = float((extreme(name) or np.mean)(numbers))
    return {**merged, "updates": float(len(updates))}
