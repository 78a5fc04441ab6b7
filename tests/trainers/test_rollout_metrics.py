"""What is logged of rollouts: TRL's names for TRL's quantities."""

from dataclasses import replace

import numpy as np
import pytest
from support.rollouts import rollout, turn

from llmrl.rollout.collector import Collected
from llmrl.rollout.trajectory import EndState, Rollout, RolloutGroup
from llmrl.trainers.online.metrics import heldout_metrics, rollout_metrics


def played(reward: float, lengths: list[int], end: EndState = "completed", last: str = "stop") -> Rollout:
    """A prompt of three tokens, turns of these lengths with two tokens of the environment between them."""
    turns, at = [], 3
    for length in lengths:
        turns.append(turn(at, at + length))
        at += length + 2
    turns[-1] = replace(turns[-1], finish_reason=last)
    return rollout([list(range(at))], turns, reward, end_state=end)


def metrics(*groups: list[Rollout]) -> dict[str, float]:
    return rollout_metrics(Collected([RolloutGroup(i, {}, each) for i, each in enumerate(groups, 1)], seconds=2.0))


def test_lengths_tokens_and_clipping_are_trls() -> None:
    """Clipped is what does not end in a stop token; tokens are those of the prompt and sampled ones, once a rollout."""
    found = metrics(
        [played(1.0, [4, 1]), played(0.0, [8], "truncated-length", "length")],
        [played(1.0, [2, 2, 2], "truncated-turns"), played(1.0, [2, 3], last="length")],
    )
    assert found["num_tokens"] == 4 * 3 + 5 + 8 + 6 + 5
    lengths = {"mean_length": 6.0, "min_length": 5, "max_length": 8}
    ended = {"mean_terminated_length": 5.5, "min_terminated_length": 5, "max_terminated_length": 6}
    expected = {**lengths, **ended, "clipped_ratio": 0.5}
    assert {name: found[f"completions/{name}"] for name in expected} == expected
    none = metrics([played(1.0, [8], "truncated-length", "length"), played(1.0, [8], "truncated-length", "length")])
    assert (none["completions/clipped_ratio"], none["completions/mean_terminated_length"]) == (1, 0)


def test_the_spread_of_rewards_is_that_of_prompts_or_of_the_step_where_each_has_one_rollout() -> None:
    several = metrics([played(r, [1]) for r in (1.0, 2.0, 6.0)], [played(5.0, [1])] * 2)
    assert several["reward_std"] == pytest.approx(np.std([1, 2, 6], ddof=1) / 2)
    assert several["frac_reward_zero_std"] == 0.5
    alone = metrics(*([played(r, [1])] for r in (1.0, 2.0, 6.0)))
    assert alone["reward_std"] == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert "frac_reward_zero_std" not in alone
    nothing = metrics()
    assert (nothing["reward_std"], nothing["num_tokens"], "frac_reward_zero_std" in nothing) == (0, 0, False)


def test_what_dynamic_sampling_discarded_is_counted_and_the_rest_is_of_what_stays() -> None:
    """A mixed prompt stays; of the discarded, all of one are right and all of two are wrong."""
    kept, *discarded = (
        RolloutGroup(i, {}, [played(reward, [2]) for reward in rewards])
        for i, rewards in enumerate([(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)], 1)
    )
    found = rollout_metrics(Collected([kept], seconds=2.0, discarded=discarded))
    assert (found["reward"], found["frac_reward_zero_std"], found["rollouts"]) == (0.5, 0, 2)
    assert found["num_tokens"] == 8 * (3 + 2)
    before = {"prompts_discarded": 3, "reward": 3 / 8, "frac_reward_zero_std": 0.75}
    assert {n: v for n, v in found.items() if n.startswith("dynamic")} == {
        f"dynamic_sampling/{name}": value for name, value in before.items()
    }
    none = rollout_metrics(Collected([kept], discarded=[]))
    assert none["dynamic_sampling/prompts_discarded"] == 0
    assert none["dynamic_sampling/reward"] == none["reward"]
    assert not any(name.startswith("dynamic") for name in metrics([played(1.0, [2])]))


def test_a_held_out_score_that_not_all_rollouts_have_says_how_many_do() -> None:
    """One of four episodes came so far that it was told whether it is right; the others were cut off, worth 0."""
    finished, *cut = (played(reward, [2]) for reward in (1.0, 0.0, 0.0, 0.0))
    finished.scores = {"right": 1.0, "tries": 2.0}
    for one in cut:
        one.end_state, one.scores = "truncated-turns", {"tries": 4.0}
    found = heldout_metrics([RolloutGroup(i, {}, [one]) for i, one in enumerate([finished, *cut], 1)], asked=4)
    assert (found["reward"], found["n"], found["truncated"]) == (0.25, 4, 0.75)
    assert (found["right"], found["right_n"]) == (1, 1)
    assert found["tries"] == 3.5
    assert "tries_n" not in found
