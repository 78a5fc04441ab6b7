"""From rollouts to what the learner is given: masks, advantages, weights, mini-batches, and how metrics are merged."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.rollouts import rollout

from llmrl.learner.options import LearnerOptions
from llmrl.learner.prefix_tree import num_unique_tokens
from llmrl.learner.sequences import Group, totals
from llmrl.objectives.presets import preset
from llmrl.objectives.scored import Objective, Totals
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn
from llmrl.trainers.online.experience import Experience
from llmrl.trainers.online.sequences import token_sequences

PLAIN = Objective(lambda logprobs_N, scored: (logprobs_N.sum(), {}))


def turn(piece: int, start: int, end: int) -> Turn:
    return Turn(piece, start, end, [-0.5 - position for position in range(start, end)], "stop", 0)


def simple(reward: float | None, prompt: int = 5, length: int = 3, cut: bool = False) -> Rollout:
    ids = [prompt, prompt, *range(10, 10 + length)]
    only = replace(turn(0, 2, 2 + length), finish_reason="length" if cut else "stop")
    return rollout([ids], [only], reward)


def groups(*rewards: list[float | None]) -> list[RolloutGroup]:
    """One group for each list; the lengths of a group's rollouts are 1, 2, 3, ..."""
    return [
        RolloutGroup(number, {}, [simple(reward, 5 + number, 1 + i) for i, reward in enumerate(given)])
        for number, given in enumerate(rewards, 1)
    ]


class Spy:
    """In a learner's place: keeps what it is given, and answers with what it is told to."""

    def __init__(self, answers: list[dict[str, float]] | None = None) -> None:
        self.updates: list[tuple[list[Group], Totals]] = []
        self.answers, self.learning_rate, self.advanced = answers, 0.25, 0
        self.options = LearnerOptions(tokens_per_microbatch=10**6)

    def update(
        self, given: list[Group], objective: Objective, counts: Totals, *, advance_schedule: bool, language: bool
    ) -> dict[str, float]:
        assert not advance_schedule
        assert language
        self.updates.append((given, counts))
        return self.answers[len(self.updates) - 1] if self.answers else {"loss": 1.0, "num_tokens": 1.0}

    def advance_schedule(self) -> None:
        self.advanced += 1


def train(experience: Experience, learner: Spy, **settings: Any) -> dict[str, float]:
    given = {"epochs": 1, "rollouts_per_update": None, "seed": 0, "skip_idle": True, **settings}
    return experience.train(learner, PLAIN, **given)  # type: ignore[arg-type]


# -- token sequences ---------------------------------------------------------------------------------------------------


def test_only_what_was_sampled_is_scored_and_what_comes_after_it_is_cut() -> None:
    """Prompt 1 2, sampled 3 4, the environment's 5 6, sampled 7, closing 8."""
    (sequence,) = token_sequences(rollout([[1, 2, 3, 4, 5, 6, 7, 8]], [turn(0, 2, 4), turn(0, 6, 7)]), {"reward": 2.0})
    assert sequence.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sequence.scored.tolist() == [False, False, True, True, False, False, True]
    assert sequence.turn_index is not None
    assert sequence.turn_index[sequence.scored].tolist() == [0, 0, 1]
    assert sequence.behaviour_logprobs is not None
    assert sequence.behaviour_logprobs.tolist() == [-2.5, -3.5, -6.5]
    assert sequence.values == {"reward": 2.0}
    assert not sequence.continues


def test_a_rollout_in_pieces_is_one_sequence_whose_turns_are_counted_on() -> None:
    pieces = [[1, 2, 3, 4], [1, 9, 9], [1, 2, 8, 6, 7]]
    turns = [turn(0, 2, 3), turn(1, 3, 3), turn(2, 3, 4), turn(2, 4, 5)]
    first, second = token_sequences(rollout(pieces, turns), {})
    assert first.token_ids.tolist() == [1, 2, 3]
    assert second.token_ids.tolist() == [1, 2, 8, 6, 7]  # the piece in which nothing was sampled is left out
    assert (first.continues, second.continues) == (False, True)
    assert second.turn_index is not None
    assert second.turn_index[second.scored].tolist() == [2, 3]


def test_a_first_piece_without_a_sampled_token_leaves_the_second_as_the_beginning() -> None:
    (only,) = token_sequences(rollout([[1, 2], [1, 2, 3]], [turn(0, 2, 2), turn(1, 2, 3)]), {})
    assert not only.continues


def test_rollouts_without_a_reward_or_without_a_token_are_no_experience() -> None:
    silent = rollout([[1, 2]], [turn(0, 2, 2)])
    experience = Experience([*groups([1.0, None, 3.0], [None]), RolloutGroup(3, {}, [silent, simple(4.0)])])
    assert experience.rewards_S.tolist() == [1.0, 3.0, 4.0]
    assert experience.group_index_S.tolist() == [0, 0, 2]
    assert experience.sequence_index_N.tolist() == [0, 1, 1, 1, 2, 2, 2]


def test_the_reward_of_a_sequence_is_less_the_punishment_of_length() -> None:
    experience = Experience([RolloutGroup(1, {}, [replace(simple(1.0), penalty=-0.25)])])
    ((piece,),) = [sample.pieces for sample in experience.samples]
    assert piece.values == {"reward": 0.75}
    assert experience.rewards_S.tolist() == [0.75]


# -- advantages and weights --------------------------------------------------------------------------------------------


def test_advantages_stand_on_every_token_of_their_rollout() -> None:
    """Leave-one-out of 1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5."""
    experience = Experience(groups([1.0, 2.0, 6.0], [5.0, 5.0]))
    assert experience.assign_advantages(preset("loop")).tolist() == [3.0, 1.5, 4.5, 0.0, 0.0]
    found = experience.token_values("advantages")
    assert found is not None
    assert found.tolist() == [-3.0, -1.5, -1.5, 4.5, 4.5, 4.5, 0.0, 0.0, 0.0]
    experience.keep([2, 0])
    assert experience.rewards_S.tolist() == [1.0, 6.0]
    assert Experience([]).assign_advantages(preset("loop")).tolist() == []


def test_rollouts_that_were_cut_off_count_in_their_group_and_in_no_update() -> None:
    """By the number of tokens, in whatever turn was the last, or by the number of turns."""
    whole, cut = simple(1.0, length=2), simple(2.0, length=4, cut=True)
    too_many = replace(simple(6.0, length=3), end_state="truncated-turns")
    experience, learner = Experience([RolloutGroup(1, {}, [whole, cut, too_many])]), Spy()
    assert experience.assign_advantages(preset("loop")).tolist() == [3.0, 1.5, 4.5]  # 1 - 4, 2 - 3.5, 6 - 1.5
    experience.leave_out_cut()
    assert experience.num_masked == 2
    train(experience, learner)
    (((group,), counts),) = learner.updates
    assert [piece.token_values["advantages"].tolist() for piece in group] == [[-3.0, -3.0]]
    assert counts == Totals(2, 1, 1)


def test_token_values_are_cut_at_pieces_and_come_back_whole() -> None:
    in_pieces = rollout([[1, 2, 3, 4], [1, 5, 6]], [turn(0, 2, 4), turn(1, 2, 3)])
    experience = Experience([RolloutGroup(1, {}, [simple(1.0), in_pieces])])
    assert experience.token_values("kl") is None
    experience.set_token_values("kl", torch.arange(6.0))
    assert [piece.token_values["kl"].tolist() for sample in experience.samples for piece in sample.pieces] == [
        [0, 1, 2], [3, 4], [5],
    ]  # fmt: skip
    found = experience.token_values("kl")
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3, 4, 5]


def test_rollouts_that_count_nothing_leave_and_the_others_count_as_often_as_they_should() -> None:
    experience, learner = Experience(groups([1.0, 2.0, 3.0])), Spy()
    experience.set_weights([0.0, 3.0, 1.0])
    assert experience.rewards_S.tolist() == [2.0, 3.0]
    experience.assign_advantages(preset("loop"))
    train(experience, learner)
    (((group,), counts),) = learner.updates
    assert [piece.weight for piece in group] == [3.0, 1.0]
    assert counts == Totals(3 * 2 + 3, 4, 1)


# -- optimizer steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 8, 100, None])
@pytest.mark.parametrize("epochs", [1, 2])
def test_every_epoch_goes_through_every_rollout_once(size: int | None, epochs: int) -> None:
    experience = Experience(groups([1.0, 2.0, 4.0], [3.0, 6.0], [7.0, 9.0, 9.5]))
    experience.assign_advantages(preset("loop"))
    learner = Spy()
    made = train(experience, learner, epochs=epochs, rollouts_per_update=size, seed=3)
    per_epoch = -(-8 // min(size or 8, 8))
    assert made["updates"] == len(learner.updates) == epochs * per_epoch
    assert learner.advanced == 1
    for epoch in range(epochs):
        updates = learner.updates[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = Counter(piece.values["reward"] for given, _ in updates for group in given for piece in group)
        assert seen == Counter([1.0, 2.0, 4.0, 3.0, 6.0, 7.0, 9.0, 9.5])
        assert all(1 <= sum(map(len, given)) <= (size or 8) for given, _ in updates)
    for given, _ in learner.updates:  # rollouts of one prompt stand together, so that it is computed once
        prompts = [group[0].token_ids[0] for group in given]
        assert len(set(prompts)) == len(prompts)
        assert all({piece.token_ids[0] for piece in group} == {group[0].token_ids[0]} for group in given)


def test_the_order_follows_from_the_seed() -> None:
    def order(seed: int) -> list[float]:
        experience, learner = Experience(groups([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])), Spy()
        experience.assign_advantages(preset("loop"))
        train(experience, learner, rollouts_per_update=1, seed=seed)
        return [given[0][0].values["reward"] for given, _ in learner.updates]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(8)}) > 4


@pytest.mark.parametrize("size", [1, 4, 5, 6, 9])
def test_updates_of_whole_prompts(size: int) -> None:
    """Every prompt's rollouts are in one update of each epoch, and updates are as near to the size as that allows."""
    rewards = [[1.0, 2.0, 4.0], [3.0, 6.0], [7.0, 9.0, 9.5], [5.0, 8.0, 5.5, 8.5], [0.0, 0.5]]
    experience, learner = Experience(groups(*rewards)), Spy()
    experience.assign_advantages(preset("loop"))
    train(experience, learner, epochs=2, rollouts_per_update=size, whole_prompts=True, seed=3)
    seen = Counter(piece.values["reward"] for given, _ in learner.updates for group in given for piece in group)
    assert seen == Counter({reward: 2 for group in rewards for reward in group})
    for given, counts in learner.updates:
        assert all([piece.values["reward"] for piece in group] in rewards for group in given)
        count = sum(map(len, given))
        assert counts.sequences == count
        assert count <= max(size + 2, 4)  # half of the largest prompt beyond it, or one prompt alone


def test_idle_rollouts_are_counted_and_not_computed_unless_something_else_teaches() -> None:
    for skip, sizes in ((True, [2]), (False, [2, 3])):
        experience, learner = Experience(groups([1.0, 2.0], [5.0, 5.0, 5.0])), Spy()
        experience.assign_advantages(preset("loop"))
        train(experience, learner, skip_idle=skip)
        ((given, counts),) = learner.updates
        assert [len(group) for group in given] == sizes
        assert counts == Totals(1 + 2 + 1 + 2 + 3, 5, 2)


def test_an_update_without_anything_to_teach_is_none() -> None:
    experience, learner = Experience(groups([5.0, 5.0])), Spy()
    experience.assign_advantages(preset("loop"))
    nothing = ("loss", "grad_norm", "num_trained_tokens", "num_computed_tokens", "updates")
    expected = {**dict.fromkeys(nothing, 0.0), "learning_rate": 0.25}
    assert train(experience, learner) == expected
    assert train(Experience([]), learner) == expected
    assert not learner.updates
    assert learner.advanced == 2


def test_metrics_of_several_updates_are_means_sums_and_extremes() -> None:
    learner = Spy([
        {"loss": 1.0, "num_tokens": 10.0, "skipped_updates": 1.0, "kl/max": 3.0, "kl/min": 3.0, "rare": 5.0},
        {"loss": 3.0, "num_tokens": 20.0, "skipped_updates": 0.0, "kl/max": 2.0, "kl/min": 2.0},
    ])  # fmt: skip
    experience = Experience(groups([1.0, 2.0]))
    experience.assign_advantages(preset("loop"))
    assert train(experience, learner, epochs=2) == {
        "loss": 2.0, "num_trained_tokens": 30.0, "skipped_updates": 1.0, "kl/max": 3.0, "kl/min": 2.0, "rare": 5.0,
        "updates": 2.0,
    }  # fmt: skip
    assert np.isfinite(list(train(Experience([]), Spy()).values())).all()


def test_a_prompts_rollouts_are_divided_where_one_forward_pass_would_be_too_large() -> None:
    experience = Experience(groups([1.0, 2.0, 4.0, 8.0], [3.0, 6.0]))
    experience.assign_advantages(preset("loop"))
    whole = experience._groups(range(6))
    sizes = [num_unique_tokens(group) for group in whole]
    learner = Spy()
    learner.options = LearnerOptions(tokens_per_microbatch=max(sizes) - 1)
    train(experience, learner)
    ((given, counts),) = learner.updates
    assert all(num_unique_tokens(group) <= max(sizes) - 1 for group in given)
    assert len(given) > len(whole)
    assert [p.values["reward"] for g in given for p in g] == [p.values["reward"] for g in whole for p in g]
    assert (counts.tokens, counts.sequences) == (totals(whole).tokens, totals(whole).sequences)
