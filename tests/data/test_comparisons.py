"""Which segments are compared with which, on rewards that can be ranked by eye."""

from typing import Any

import pytest
from datasets import Dataset
from support.pairs import GOOD, keys
from transformers import PreTrainedTokenizerFast

from llmrl.data.comparisons import Comparison, ComparisonData, Mode, across, dense, prepare_comparisons, sparse
from llmrl.errors import RefusedError

SAMPLES = {"prompt": "2+2=", "completions": [" 4", " 5", " 6"], "rewards": [1.0, 0.0, 0.5]}
OTHERS = {"prompt": "3+3=", "completions": [" 7", " 6", " 8"], "rewards": [-4.0, 8.0, -4.0]}


def compared(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], mode: Mode, **options: Any) -> Any:
    dataset = Dataset.from_list(rows)
    say = options.pop("say", lambda text: None)
    return prepare_comparisons(keys(), tokenizer, say, mode=mode, dataset=dataset, **options)


def texts(tokenizer: PreTrainedTokenizerFast, data: ComparisonData) -> list[tuple[list[str], list[float]]]:
    return [
        ([tokenizer.decode(piece.token_ids) for segment in row["segments"] for piece in segment], row["values"])
        for row in data.train
    ]


def test_dense_compares_all_of_a_row_by_the_ranks_of_their_scores() -> None:
    """Float32, which the objective compares in, holds neither 1e300 nor the difference of the first two scores."""
    assert dense([[1.0, 1.0 - 1e-12], [1e300, 3.0, 3.0, 1e299]]) == [
        Comparison(((0, 0), (0, 1)), (1.0, 0.0)),
        Comparison(((1, 0), (1, 1), (1, 2), (1, 3)), (2.0, 0.0, 0.0, 1.0)),
    ]


def test_sparse_sets_the_better_half_against_the_worse_each_segment_once() -> None:
    """Ranks of the second row: 9 7 | 5 3 1 without the middle one; equal scores tie."""
    assert sparse([[0.0, 1.0], [3.0, 9.0, 5.0, 1.0, 7.0], [2.0, 2.0]]) == [
        Comparison(((0, 1), (0, 0)), (0.0, 0.0)),
        Comparison(((1, 1), (1, 0)), (0.0, 0.0)),
        Comparison(((1, 4), (1, 3)), (0.0, 0.0)),
        Comparison(((2, 0), (2, 1)), (0.5, 0.5)),
    ]


def test_across_compares_advantages_of_different_prompts_each_sample_once() -> None:
    """Row 0 has the higher rewards everywhere; less their means it is row 1 that is better or worse by more."""
    rewards = [[101.0, 99.0, 100.0, 100.0], [4.0, -4.0, 0.0, 0.0]]
    advantages = [[1.0, -1.0, 0.0, 0.0], [4.0, -4.0, 0.0, 0.0]]
    found = across(rewards)
    assert len({place for comparison in found for place in comparison.places}) == 2 * len(found) == 8
    for (first, second), values in found:
        assert first[0] != second[0]
        difference = advantages[first[0]][first[1]] - advantages[second[0]][second[1]]
        assert values == (0.5 if difference == 0 else float(difference < 0),) * 2
    assert found == across(rewards)


def test_across_ties_what_only_rounding_tells_apart() -> None:
    """Rows alike, whose means are 0.2 and 0.20000000000000004 when summed in their order; thirds; a real difference
    of a thousandth stays one."""
    for rewards in (
        [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]],
        [[1.0, 0.9], [0.1, 0.0]],
        [[1 / 3, 2 / 3, 0.0], [1.0, 2.0, 1.5]],
    ):
        exact = [[round(r - sum(own) / len(own), 9) for r in own] for own in rewards]
        ranks = [(exact[a][i], exact[b][j], label) for ((a, i), (b, j)), (label, _) in across(rewards)]
        assert ranks
        assert all((label == 0.5) == (one == other) for one, other, label in ranks), ranks
    assert {values[0] for _, values in across([[1.0, 0.0], [1.001, 0.0]])} <= {0.0, 1.0}


def test_across_leaves_out_who_finds_nobody_of_another_prompt() -> None:
    found = across([[1.0, 2.0, 3.0, 4.0], [1.0]])
    assert len(found) == 1
    assert across([[1.0, 2.0]]) == []


def test_scored_samples_are_compared_in_each_way(plain: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    whole = compared(plain, [SAMPLES, OTHERS], "dense")
    assert whole.value == "score"
    assert texts(plain, whole)[0] == (["2+2= 4</s>", "2+2= 5</s>", "2+2= 6</s>"], [2.0, 0.0, 1.0])
    pairs = compared(plain, [SAMPLES, OTHERS], "sparse", say=said.append)
    assert pairs.value == "label"
    assert texts(plain, pairs) == [
        (["2+2= 4</s>", "2+2= 5</s>"], [0.0, 0.0]),
        (["3+3= 6</s>", "3+3= 8</s>"], [0.0, 0.0]),
    ]
    assert any("2 of 6 segments find no partner (sparse)" in line for line in said)
    mixed = compared(plain, [SAMPLES, OTHERS], "across")
    assert len(mixed.train) == 3
    for (first, second), _ in texts(plain, mixed):
        assert {first[:3], second[:3]} == {"2+2", "3+3"}


def test_what_has_a_label_is_compared_as_it_stands(plain: PreTrainedTokenizerFast) -> None:
    row = {"first": {"prompt": "2+2=", "completion": " 4"}, "second": {"prompt": "3+3=", "completion": " 7"}}
    data = compared(plain, [{**row, "label": 0.25}], "dense")
    assert texts(plain, data) == [(["2+2= 4</s>", "3+3= 7</s>"], [0.25, 0.25])]
    assert compared(plain, [GOOD], "dense").value == "label"
    for rows, name in (([{**row, "label": 0.25}], "compared segments"), ([GOOD], "preference pairs")):
        with pytest.raises(RefusedError, match=f"comparisons sparse would be ignored: {name} have a label"):
            compared(plain, rows, "sparse")


def test_columns_of_two_formats_are_refused_by_both_names(plain: PreTrainedTokenizerFast) -> None:
    segment = {"prompt": "2+2=", "completion": " 4", "score": 1}
    group = {"segments": [segment, {**segment, "completion": " 5", "score": 0}]}
    label = {"first": segment, "second": {**segment, "completion": " 5"}, "label": 0}
    for row, names in (
        ({**SAMPLES, **group}, "scored segments .*`segments`.* and of scored samples"),
        ({**label, **GOOD}, "compared segments .*`first` and `second`.* and of preference pairs"),
        ({**SAMPLES, **GOOD}, "scored samples .*`completions` and `rewards`.* and of preference pairs"),
    ):
        with pytest.raises(RefusedError, match=f"{names}.*remove the columns of the other"):
            compared(plain, [row], "dense")


def test_a_score_that_no_float32_holds_is_refused_by_row(plain: PreTrainedTokenizerFast) -> None:
    group = [{"prompt": "2+2=", "completion": " 4", "score": score} for score in (1e300, 0.0)]
    with pytest.raises(RefusedError, match=r"row 1, column `segments\.1\.score`: 1e\+300 is beyond"):
        compared(plain, [{"segments": group}], "dense")


def test_groups_without_anything_to_compare_are_refused(plain: PreTrainedTokenizerFast) -> None:
    one = {"prompt": "2+2=", "completions": [" 4"], "rewards": [1.0]}
    with pytest.raises(RefusedError, match=r"row 2, column `rewards`: .*at least 2"):
        compared(plain, [SAMPLES, {**one, "completions": [" 4", " 5"], "rewards": [1.0, None]}], "dense")
    with pytest.raises(RefusedError, match=r"row 2, column `rewards`"):
        compared(plain, [SAMPLES, one], "dense")
    with pytest.raises(RefusedError, match="needs samples of two prompts and more"):
        compared(plain, [SAMPLES], "across")


def test_scored_segments_have_no_mean_of_a_prompt(plain: PreTrainedTokenizerFast) -> None:
    group = [{"prompt": "2+2=", "completion": " 4", "score": 1}, {"prompt": "3+3=", "completion": " 7", "score": 0}]
    assert texts(plain, compared(plain, [{"segments": group}], "dense"))[0][1] == [1.0, 0.0]
    with pytest.raises(RefusedError, match="comparisons across needs samples of a prompt"):
        compared(plain, [{"segments": group}], "across")
