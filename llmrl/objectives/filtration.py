r"""Policy filtration: which of the N responses to a prompt a policy update learns from, by the rank of their rewards.

Zhang, Shen et al., "Policy Filtration for RLHF to Mitigate Noise in Reward Models", arXiv 2409.06957. A reward model is
reliable at high and low rewards and noisy between, so train on the ends of the ranking R(y_1) >= .. >= R(y_N) of each
prompt. A strategy is a law w over ranks, from which the paper draws:

    none          1/N each: PPO with several responses (PPO-M)
    best          (1, 0, .., 0)                        BoN
    best_random   (1/2, 1/(2(N-1)), .., 1/(2(N-1)))    BR
    best_worst    (1/2, 0, .., 0, 1/2)                 BW
    power         |R|^k of a response over that of all responses of the step, R in [-1, 1]   (PPO-pow-k)

Invariants
- Ranks are within a prompt's group, by the raw score, not the KL-shaped return. (verl's rank over the whole batch keeps
  two rows of it; `power` alone is the paper's law there.)
- A ranking is strict: best and worst of a group of two or more are two responses, also where rewards are equal.
- The loss does not know of w: filtered samples are treated as the policy's own. What changes is how often a row counts,
  its multiplicity, which becomes the sequence's weight.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["none", "best", "best_random", "best_worst", "power"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Ranking:
    """Ranks within groups: `rank_S` counts from 0, the best; `size_S` is the group's size."""

    rank_S: Tensor
    size_S: Tensor

    @property
    def best_S(self) -> Tensor:
        return self.rank_S == 0

    @property
    def worst_S(self) -> Tensor:
        return self.rank_S == self.size_S - 1


def ranking(rewards_S: Tensor, group_index_S: Tensor, generator: torch.Generator | None = None) -> Ranking:
    """[S] -> strict ranks within groups; equal rewards in random order, or without a generator in that of appearance.

    Raises ValueError where a reward is not finite: what has no score cannot be ranked.
    """
    if not bool(torch.isfinite(rewards_S).all()):
        raise ValueError("a reward is not finite: leave out what has no score before ranking")
    num = len(rewards_S)
    shuffled = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
    by_reward = shuffled[rewards_S[shuffled].argsort(descending=True, stable=True)]
    order = by_reward[group_index_S[by_reward].argsort(stable=True)]
    sizes_G = group_index_S.bincount()
    size_S = sizes_G[group_index_S]
    rank_S = torch.empty_like(group_index_S)
    rank_S[order] = torch.arange(num) - (sizes_G.cumsum(0) - sizes_G)[group_index_S[order]]
    return Ranking(rank_S, size_S)


def rank_weights(
    rewards_S: Tensor,
    group_index_S: Tensor,
    strategy: Strategy,
    generator: torch.Generator | None = None,
    power: float = 2.0,
) -> Tensor:
    """[S] -> [S] float64: the law w. Sums to 1 over each group, for `power` over the whole step.

    A group of one has weight 1. `power` with rewards that are all 0 weighs all alike.
    """
    if strategy == "power":
        raw_S = rewards_S.double().abs() ** power
        return raw_S / raw_S.sum() if bool(raw_S.sum() > 0) else torch.full_like(raw_S, 1 / max(len(raw_S), 1))
    ranks = ranking(rewards_S, group_index_S, generator)
    best_S, worst_S, size_S = ranks.best_S.double(), ranks.worst_S.double(), ranks.size_S.double()
    if strategy == "none":
        return 1 / size_S
    if strategy == "best":
        return best_S
    if strategy == "best_worst":
        return (best_S + worst_S) / 2
    if strategy == "best_random":
        others_S = (1 - best_S) / (size_S - 1).clamp(min=1)
        return torch.where(size_S == 1, 1.0, (best_S + others_S) / 2)
    raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")


def multiplicities(
    rewards_S: Tensor,
    group_index_S: Tensor,
    strategy: Strategy,
    generator: torch.Generator,
    power: float = 2.0,
    rows_per_group: int = 2,
) -> Tensor:
    """[S] -> [S] int64: how often each response counts in the update; 0 is left out of it.

    `best_worst` and `best_random` take a fixed pair of each group, the best and the worst or one of the others: the
    mean composition of w, without the draws' all-best and all-worst groups. `best` takes one row, `none` all of them.
    `power` draws `rows_per_group` rows for each group, with replacement, from the whole step.
    """
    if strategy == "none":
        return torch.ones_like(group_index_S)
    if strategy == "power":
        weights_S = rank_weights(rewards_S, group_index_S, strategy, power=power)
        draws = rows_per_group * len(group_index_S.unique())
        drawn = torch.multinomial(weights_S, draws, replacement=True, generator=generator)
        return drawn.bincount(minlength=len(weights_S))
    ranks = ranking(rewards_S, group_index_S, generator)
    if strategy == "best":
        return ranks.best_S.long()
    if strategy == "best_worst":
        return (ranks.best_S | ranks.worst_S).long()
    if strategy == "best_random":
        # A uniform rank below the best for each group, read by all of its rows.
        draw_G = torch.rand(int(group_index_S.max()) + 1, generator=generator, dtype=torch.float64)
        other_S = 1 + (draw_G[group_index_S] * (ranks.size_S - 1)).long()
        return (ranks.best_S | (ranks.rank_S == other_S)).long()
    raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")


def filtration_metrics(rewards_S: Tensor, group_index_S: Tensor, counts_S: Tensor) -> dict[str, float]:
    """What a filtration did: rows kept a group, groups whose rewards are all equal, mean reward of what is kept. Groups
    of which no response is there count in none of them."""
    present_S = group_index_S.unique(return_inverse=True)[1]
    num_groups = int(present_S.max()) + 1
    low_G, high_G = (
        torch.zeros(num_groups, dtype=rewards_S.dtype).scatter_reduce(0, present_S, rewards_S, how, include_self=False)
        for how in ("amin", "amax")
    )
    return {
        "filtration/rows_mean": float(counts_S.sum()) / num_groups,
        "filtration/distinct_rows_mean": float((counts_S > 0).sum()) / num_groups,
        "filtration/frac_groups_equal": float((low_G == high_G).double().mean()),
        "filtration/reward": float((counts_S * rewards_S.double()).sum() / counts_S.sum()),
    }


@dataclass(frozen=True)
class LineFit:
    """s = intercept + slope R by least squares over `points` points.

    r_squared: 1 - residual / total sum of squares; None where it is not defined: one point, or no spread. It ignores
    the slope's sign and is 1 for two points: read all three.
    """

    r_squared: float | None
    slope: float | None
    intercept: float | None
    points: int


def reward_fit(
    rewards_S: Tensor, correct_S: Tensor, weights_S: Tensor | None = None, edges: Tensor | None = None
) -> LineFit:
    """How well the reward predicts the actual score under a law w: the paper's R^2 for choosing a strategy.

    `edges` [E], ascending, cut the rewards into E + 1 intervals; each interval with weight in it becomes one point, its
    weighted means, and the points count alike, as in the paper. Without edges each response is a point of its weight.
    Use the same responses and the same edges, set on the unfiltered responses (`reward_edges`), for all strategies.
    """
    r, s = rewards_S.double(), correct_S.double()
    w = torch.ones_like(r) if weights_S is None else weights_S.double()
    if edges is None:
        return _line(r, s, w)
    return _line_of_intervals(_sums(torch.bucketize(r, edges.double()), len(edges) + 1, r, s, w))


def reward_edges(rewards_S: Tensor, intervals: int = 20) -> Tensor:
    """[S] -> [intervals - 1]: interior edges of equally wide intervals from the lowest to the highest reward."""
    return torch.linspace(float(rewards_S.min()), float(rewards_S.max()), intervals + 1, dtype=torch.float64)[1:-1]


def bootstrap_r_squared(
    rewards_S: Tensor,
    correct_S: Tensor,
    weights_S: Tensor,
    group_index_S: Tensor,
    edges: Tensor,
    generator: torch.Generator,
    draws: int = 200,
) -> tuple[float, float] | None:
    """95% interval of `reward_fit`'s R^2 over resampled prompts (groups); None where too few resamples define it."""
    num_groups = int(group_index_S.max()) + 1
    cell_S = group_index_S * (len(edges) + 1) + torch.bucketize(rewards_S.double(), edges.double())
    sums_IGE = _sums(cell_S, num_groups * (len(edges) + 1), rewards_S, correct_S, weights_S)
    sums_IGE = sums_IGE.view(3, num_groups, len(edges) + 1)
    found = []
    for _ in range(draws):
        times_G = torch.randint(num_groups, (num_groups,), generator=generator).bincount(minlength=num_groups)
        fit = _line_of_intervals(torch.einsum("g,ige->ie", times_G.double(), sums_IGE))
        found += [] if fit.r_squared is None else [fit.r_squared]
    if len(found) < draws / 2:
        return None
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _sums(cell_S: Tensor, num_cells: int, rewards_S: Tensor, correct_S: Tensor, weights_S: Tensor) -> Tensor:
    """[3, cells]: the sums of weights, of weighted rewards, and of weighted scores in each cell."""
    r, s, w = rewards_S.double(), correct_S.double(), weights_S.double()
    return torch.zeros(3, num_cells, dtype=torch.float64).index_add(1, cell_S, torch.stack([w, w * r, w * s]))


def _line_of_intervals(sums_IE: Tensor) -> LineFit:
    """Through the weighted means of the intervals with weight in them, each one point."""
    occupied = sums_IE[0] > 0
    weights, rewards, scores = sums_IE[:, occupied]
    return _line(rewards / weights, scores / weights, torch.ones_like(weights))


def _line(r: Tensor, s: Tensor, w: Tensor) -> LineFit:
    """Weighted least squares of s on r."""
    r, s, w = r[w > 0], s[w > 0], w[w > 0]
    w = w / w.sum()
    r_mean, s_mean = (w * r).sum(), (w * s).sum()
    spread, total = (w * (r - r_mean) ** 2).sum(), (w * (s - s_mean) ** 2).sum()
    if len(r) < 2 or not bool(spread > 1e-24):
        return LineFit(None, None, None, len(r))
    slope = (w * (r - r_mean) * (s - s_mean)).sum() / spread
    residual = (w * (s - s_mean - slope * (r - r_mean)) ** 2).sum()
    r_squared = float(1 - residual / total) if bool(total > 1e-24) else None
    return LineFit(r_squared, float(slope), float(s_mean - slope * r_mean), len(r))
