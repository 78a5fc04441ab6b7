"""Packing into prefix trees: what is shared, where tokens go, and what the mask lets them see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.learner.prefix_tree import MIN_SHARED, num_unique_tokens, pack
from llmrl.learner.sequences import Group, TokenSequence, completion, split_into_microbatches, split_over_ranks

# Few distinct tokens, so that beginnings coincide often.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=6)


def whole(ids: list[int]) -> TokenSequence:
    return TokenSequence(np.array(ids), np.arange(len(ids)) > 0)


@given(st.lists(SEQUENCES, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_every_token_sees_exactly_its_own_sequence(group_ids: list[list[list[int]]]) -> None:
    groups: list[Group] = [tuple(whole(ids) for ids in group) for group in group_ids]
    packed = pack(groups)
    mask, positions = packed.layout.mask().numpy(), packed.layout.positions.numpy()
    sequences = [s for group in groups for s in group]
    for sequence, place in zip(sequences, packed.places, strict=True):
        assert packed.token_ids[place].tolist() == sequence.token_ids.tolist()
        assert positions[place].tolist() == list(range(len(place)))
        for depth, slot in enumerate(place):
            assert np.flatnonzero(mask[slot]).tolist() == sorted(place[: depth + 1].tolist())
    assert sum(num_unique_tokens(g) for g in groups) == len(packed.token_ids)


def test_a_shared_prompt_stands_once() -> None:
    prompt = list(range(30))
    group = (completion(prompt, [50, 51]), completion(prompt, [60]), completion(prompt, [70, 71, 72]))
    assert num_unique_tokens(group) == 30 + 2 + 1 + 3


def test_short_coincidences_are_not_shared() -> None:
    run = list(range(MIN_SHARED - 1))
    assert num_unique_tokens((completion(run, [50]), completion(run, [60]))) == 2 * MIN_SHARED
    run = list(range(MIN_SHARED))
    assert num_unique_tokens((completion(run, [50]), completion(run, [60]))) == MIN_SHARED + 2


def test_a_window_counts_positions_in_the_sequence() -> None:
    prompt = list(range(10))
    packed = pack([(completion(prompt, [50, 51]), completion(prompt, [60, 61]))])
    mask = packed.layout.mask(window=3).numpy()
    last = packed.places[1][-1]
    assert np.flatnonzero(mask[last]).tolist() == packed.places[1][-3:].tolist()


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(50, 200))
def test_microbatches_hold_every_group_once_within_the_budget(sizes: list[int], budget: int) -> None:
    batches = split_into_microbatches(sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in batch) <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 4))
def test_ranks_hold_every_group_once_and_evenly(sizes: list[int], ranks: int) -> None:
    shares = split_over_ranks(sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_a_scored_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="first token"):
        TokenSequence(np.array([1, 2]), np.array([True, True]))
