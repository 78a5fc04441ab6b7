"""What is logged of rollouts, under TRL's names where the quantity is the same."""

import numpy as np

from llmrl.evaluation.intervals import mean_interval
from llmrl.rollout.collector import Collected
from llmrl.rollout.trajectory import Rollout, mean_reward


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """TRL's names where the quantity is the same."""
    groups = collected.groups
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    stds = [float(np.std(group.rewards, ddof=1)) for group in groups if len(group.rewards) > 1]
    equal = [float(len(set(group.rewards)) < 2) for group in groups]
    lengths = [rollout.num_sampled for rollout in rollouts]
    metrics: dict[str, float] = {
        "reward": mean_reward(groups),
        "reward_std": sum(stds) / max(len(stds), 1),
        "frac_reward_zero_std": sum(equal) / max(len(equal), 1),
        "rollouts": float(len(rollouts)),
        "rollout_seconds": collected.seconds,
        "sampled_tokens_per_second": collected.num_sampled / max(collected.seconds, 1e-9),
    }
    if rollouts:
        ended = [r.num_sampled for r in rollouts if not r.truncated]
        metrics |= {
            "completions/mean_length": float(np.mean(lengths)),
            "completions/min_length": float(min(lengths)),
            "completions/max_length": float(max(lengths)),
            "completions/mean_terminated_length": float(np.mean(ended)) if ended else 0.0,
            "completions/clipped_ratio": 1 - len(ended) / len(rollouts),
            "rollout/turns": float(np.mean([len(r.turns) for r in rollouts])),
        }
    for name in sorted({name for rollout in rollouts for name in rollout.scores}):
        values = [v for rollout in rollouts if (v := rollout.scores.get(name)) is not None]
        metrics[f"rewards/{name}/mean"] = float(np.mean(values)) if values else float("nan")
        metrics[f"rewards/{name}/std"] = float(np.std(values)) if values else float("nan")
    unusual = {n: c for n, c in collected.counts.items() if n not in ("rollouts", "completed") and c}
    return metrics | {f"rollout/{name}": float(count) for name, count in sorted(unusual.items())}


def heldout_metrics(rollouts: list[Rollout], asked: int) -> dict[str, float]:
    """Mean reward with a 95% interval, means of the scores, shares of the end states that are no completion."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    mean, low, high = mean_interval(rewards)
    metrics = {"reward": mean, "reward_interval_low": low, "reward_interval_high": high, "n": float(len(rewards))}
    for name in sorted({name for rollout in rollouts for name in rollout.scores}):
        values = [v for rollout in rollouts if (v := rollout.scores.get(name)) is not None]
        metrics[name] = float(np.mean(values)) if values else float("nan")
    metrics["truncated"] = sum(r.truncated for r in rollouts) / max(len(rollouts), 1)
    metrics["mean_length"] = float(np.mean([r.num_sampled for r in rollouts])) if rollouts else 0.0
    if asked > len(rewards):
        metrics["without_reward"] = float(asked - len(rewards))
    return metrics
