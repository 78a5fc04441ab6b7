"""What is shared by objectives: ragged sums, where things begin, and how a metric becomes one number."""

import pytest
import torch
from support.scoring import scored_of

from llmrl.objectives.scored import num_indexed, reduced, starts


def test_groups_sequences_and_turns_of_a_ragged_batch() -> None:
    scored = scored_of([[2, 1], [1], [1, 1, 1]], turns=[0, 1, 0, 0, 0, 1, 1])
    assert scored.group_sizes == (2, 1, 3)
    assert scored.sum_per_sequence(torch.tensor([1, 2, 4, 8, 16, 32, 64])).tolist() == [3, 4, 8, 16, 32, 64]
    found_G = scored.sum_per_group(torch.tensor([1, 2, 4, 8, 16, 32], dtype=torch.float64))
    assert (found_G.dtype, found_G.tolist()) == (torch.float64, [3, 4, 56])
    assert starts(scored.sequence_index_N).tolist() == [True, False, True, True, True, True, True]
    assert starts(scored.sequence_index_N[:2], scored.turn_index_N[:2]).tolist() == [True, True]
    nothing = torch.tensor([], dtype=torch.long)
    assert (starts(nothing).tolist(), num_indexed(nothing), num_indexed(scored.group_index_S)) == ([], 0, 3)


def test_the_first_group_of_another_size_is_named() -> None:
    scored = scored_of([[1, 1], [1, 1, 1], [1]])
    scored.check_groups("it takes some", 1, 3)
    with pytest.raises(ValueError, match=r"^it takes two in each group; group 1 has 3 sequences$"):
        scored.check_groups("it takes two", 2, 2)
    with pytest.raises(ValueError, match="group 2 has 1"):
        scored.check_groups("it takes two or more", 2)


def test_a_name_says_whether_the_mean_or_an_extreme_is_reported() -> None:
    values = torch.tensor([-3.0, -9.0])
    names = ("ratio", "ratio_min", "ratio_max", "ratio/max")
    assert [reduced(name, values) for name in names] == [-6.0, -9.0, -3.0, -3.0]
    assert reduced("share", torch.tensor(0.5)) == 0.5
