"""Rows cut to max_length: never longer, never more cut than needed, and what cannot be cut is said."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.data.lengths import OverlongError, TruncationMode, fit

lengths = st.integers(1, 12)
modes = st.sampled_from(["keep_start", "keep_end", "drop", "error"])


def ids(length: int, first: int) -> list[int]:
    return list(range(first, first + length))


@settings(deadline=None)
@given(lengths, lengths, lengths, st.integers(2, 24), modes)
def test_what_fits_is_kept_whole_and_the_rest_is_cut_to_the_limit(
    prompt: int, chosen: int, rejected: int, max_length: int, mode: TruncationMode
) -> None:
    prompt_ids, completions = ids(prompt, 0), [ids(chosen, 100), ids(rejected, 200)]
    longest = prompt + max(chosen, rejected)
    no_room = max(chosen, rejected) >= max_length if mode == "keep_end" else prompt >= max_length
    if longest > max_length and (no_room or mode in ("drop", "error")):
        with pytest.raises(OverlongError) as error:
            fit(prompt_ids, completions, max_length, mode)
        assert error.value.no_room == no_room
        return
    fitting = fit(prompt_ids, completions, max_length, mode)
    assert len(fitting.prompt_ids) + max(map(len, fitting.completions)) == min(longest, max_length)
    assert fitting.prompt_ids == prompt_ids[prompt - len(fitting.prompt_ids) :]
    assert [
        whole[: len(cut)] for whole, cut in zip(completions, fitting.completions, strict=True)
    ] == fitting.completions
    assert all(fitting.completions)
    assert fitting.prompt_ids
    assert fitting.cut_prompts == (fitting.prompt_ids != prompt_ids)
    assert fitting.cut_completions == sum(a != b for a, b in zip(completions, fitting.completions, strict=True))


@pytest.mark.parametrize("mode", ["keep_start", "drop", "error"])
def test_a_prompt_as_long_as_the_limit_leaves_no_room(mode: TruncationMode) -> None:
    with pytest.raises(OverlongError, match="prompt's 5 tokens leave no room") as error:
        fit(ids(5, 0), [[1], [2]], 5, mode)
    assert error.value.no_room


def test_a_completion_as_long_as_the_limit_leaves_no_room_for_the_prompt() -> None:
    with pytest.raises(OverlongError, match="completion of 5 tokens leaves no room") as error:
        fit(ids(3, 0), [ids(5, 9), [2]], 5, "keep_end")
    assert error.value.no_room
