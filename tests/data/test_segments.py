"""Segments of behaviour: what is scored of them, how long they may be, and what is refused, by file, row and column."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from support.pairs import GOOD, assistant, keys, prepared, user
from support.refusals import file_refusal
from transformers import PreTrainedTokenizerFast

from llmrl.data.segment_formats import COMPARED_SEGMENTS, PAIRS, READ, SCORED_SEGMENTS
from llmrl.data.segments import CONTEXT, SegmentData, prepare_segments, segments_of
from llmrl.errors import RefusedError

ROOT = Path(__file__).parents[2]
FIRST = {"prompt": "2+2=", "completion": " 4"}
SECOND = {"prompt": "9+8=", "completion": " 18"}
TEXT = {"first": FIRST, "second": SECOND, "label": 0}
HISTORY = [user("2+2?"), assistant("4"), user("And 3+3?")]
TWO_TURNS = [assistant("3+3 is what?"), {"role": "tool", "content": "6"}, assistant("It is 6.")]
DIALOGUE = {
    "first": {"prompt": HISTORY, "completion": TWO_TURNS},
    "second": {"prompt": [user("Hi")], "completion": assistant("What?")},
    "label": 0.5,
}
STRIPPING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def segments(tokenizer: PreTrainedTokenizerFast, rows: Any, **changed: Any) -> SegmentData:
    options = {name: changed.pop(name) for name in ("faulty_rows", "say", "stop_token_ids") if name in changed}
    say = options.pop("say", lambda text: None)
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_segments(keys(**changed), tokenizer, say, dataset=dataset, **options)


def scored_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[list[str]]:
    """Of each segment the text of each piece, the policy's own tokens in brackets."""

    def marked(ids: list[int], turns: list[int]) -> str:
        parts: list[str] = []
        runs: list[tuple[int, list[int]]] = []
        for token, turn in zip(ids, turns, strict=True):
            if not runs or runs[-1][0] != turn:
                runs.append((turn, []))
            runs[-1][1].append(token)
        for turn, run in runs:
            text = tokenizer.decode(run, skip_special_tokens=False)
            parts.append(text if turn == CONTEXT else f"[{turn}:{text}]")
        return "".join(parts)

    return [[marked(*piece) for piece in segment] for segment in segments_of(row)]


def test_texts_may_start_in_different_states(plain: PreTrainedTokenizerFast) -> None:
    data = segments(plain, [{**TEXT, "label": 1}])
    assert scored_text(plain, data.train[0]) == [["2+2=[0: 4</s>]"], ["9+8=[0: 18</s>]"]]
    assert data.train[0]["values"] == [1.0, 1.0]
    assert data.format is COMPARED_SEGMENTS


def test_of_a_dialogue_the_assistants_turns_are_scored_with_the_tokens_that_end_them(
    chat: PreTrainedTokenizerFast,
) -> None:
    first, second = scored_text(chat, segments(chat, [DIALOGUE], max_length=200).train[0])
    before = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in HISTORY) + "<|im_start|>assistant\n"
    )
    between = "\n<|im_start|>tool\n6<|im_end|>\n<|im_start|>assistant\n"
    assert first == [f"{before}[0:3+3 is what?<|im_end|>]{between}[1:It is 6.<|im_end|>]"]
    assert second == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[0:What?<|im_end|>]"]


def test_the_ids_are_those_of_the_whole_dialogue(chat: PreTrainedTokenizerFast) -> None:
    (piece,), _ = segments_of(segments(chat, [DIALOGUE], max_length=200).train[0])
    whole = chat.apply_chat_template([*HISTORY, *TWO_TURNS], tokenize=True, return_dict=False)
    assert piece.token_ids == whole[: len(piece.token_ids)]
    assert chat.decode(whole[len(piece.token_ids) :]) == "\n"  # what the template writes behind the last turn


def test_what_comes_before_the_assistants_first_message_is_context(chat: PreTrainedTokenizerFast) -> None:
    """So that a dialogue can be cut anywhere between turns."""
    moved = {"prompt": HISTORY[:1], "completion": [*HISTORY[1:], *TWO_TURNS]}
    assert segments_of(segments(chat, [{**DIALOGUE, "first": moved}], max_length=200).train[0])[0][0].turns.count(2) > 0
    opening = {"prompt": HISTORY[:2], "completion": [HISTORY[2], *TWO_TURNS]}
    assert segments_of(segments(chat, [{**DIALOGUE, "first": opening}], max_length=200).train[0]) == segments_of(
        segments(chat, [DIALOGUE], max_length=200).train[0]
    )


def test_a_template_that_rewrites_earlier_turns_begins_a_new_piece(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["chat"].backend_tokenizer, eos_token="<|im_end|>", chat_template=STRIPPING
    )
    said = [assistant("hm</think>7"), user("Sure?"), assistant("ha</think>yes")]
    row = {"first": {"prompt": [user("Hi")], "completion": said}, "second": DIALOGUE["second"], "label": 0}
    data = segments(tokenizer, [row])
    first, _ = scored_text(tokenizer, data.train[0])
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert first == [
        f"{opening}[0:hm</think>7<|im_end|>]",
        f"{opening}7<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[1:ha</think>yes<|im_end|>]",
    ]
    assert data.counts["rewritten_histories"] == 1


def test_scored_segments_keep_their_scores(plain: PreTrainedTokenizerFast) -> None:
    group = [{**FIRST, "score": 2}, {**SECOND, "score": -0.5}, {**FIRST, "score": 0}]
    data = segments(plain, [{"segments": group}])
    assert data.format is SCORED_SEGMENTS
    assert data.train[0]["values"] == [2.0, -0.5, 0.0]
    assert [len(segment) for segment in segments_of(data.train[0])] == [1, 1, 1]


@pytest.mark.parametrize(
    "changed", [{"max_length": 200}, {"max_length": 60}, {"max_length": 60, "truncation_mode": "keep_end"}]
)
def test_preference_pairs_become_what_dpo_trains_on(chat: PreTrainedTokenizerFast, changed: dict[str, Any]) -> None:
    lines = (ROOT / "data/arithmetic/pairs/train.jsonl").read_text().splitlines()[:30]
    pairs = [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
    ours, theirs = segments(chat, pairs, **changed), prepared(chat, pairs, **changed)
    assert ours.format is PAIRS
    for row, pair in zip(ours.train, theirs.train, strict=True):
        for (piece,), name in zip(segments_of(row), ("chosen_ids", "rejected_ids"), strict=True):
            assert piece.token_ids == pair["prompt_ids"] + pair[name]
            assert piece.prompt_length == len(pair["prompt_ids"])
        assert row["values"] == [0.0, 0.0]
    shared = [name for name in theirs.counts if name in ours.counts]
    assert {name: ours.counts[name] for name in shared} == {name: theirs.counts[name] for name in shared}
    assert (changed["max_length"] < 200) == (
        ours.counts["truncated_prompts"] + ours.counts["truncated_completions"] > 0
    )


def test_a_segment_that_goes_on_gets_no_stop_token(plain: PreTrainedTokenizerFast) -> None:
    data = segments(plain, [{**TEXT, "first": {**FIRST, "ends": False}}])
    assert scored_text(plain, data.train[0]) == [["2+2=[0: 4]"], ["9+8=[0: 18</s>]"]]
    assert data.counts["open_ends"] == 1
    cut = {**TEXT, "first": {**FIRST, "ends": False}, "second": {**SECOND, "ends": False}}
    assert segments(plain, [cut]).counts["open_ends"] == 2  # and not refused for never learning to stop


def test_the_fingerprint_covers_what_is_preferred(plain: PreTrainedTokenizerFast) -> None:
    prints = {segments(plain, [{**TEXT, "label": label}] * 2).fingerprint for label in (0, 1, 0.5, 0)}
    assert len(prints) == 3


def test_rows_of_the_same_starts_stay_on_one_side_and_what_is_shared_is_said(plain: PreTrainedTokenizerFast) -> None:
    rows = [
        {**TEXT, "first": {"prompt": f"{i // 2}+2=", "completion": f" {i}"}, "second": SECOND} for i in range(40)
    ]  # fmt: skip
    said: list[str] = []
    data = segments(plain, rows, eval_rows=4, say=said.append)
    assert data.heldout is not None
    starts = [
        {tuple(piece.token_ids[: piece.prompt_length]) for row in part for piece in segments_of(row)[0]}
        for part in (data.train, data.heldout)
    ]
    assert len(data.heldout) == 4
    assert starts[0] & starts[1] == set()
    assert "data: segments of 4 of 4 held-out rows start where some that are trained on do" in said  # the second ones


# -- length ------------------------------------------------------------------------------------------------------------

LONG = {"first": {"prompt": "2+2=", "completion": " 4" * 30}, "second": FIRST, "label": 1}


def test_a_long_segment_loses_its_end_and_its_stop_token(plain: PreTrainedTokenizerFast) -> None:
    data = segments(plain, [TEXT, LONG], max_length=20)
    (piece,), _ = segments_of(data.train[1])
    assert len(piece.token_ids) == 20
    assert piece.token_ids[-1] != plain.eos_token_id
    assert data.counts["truncated_completions"] == 1


def test_a_turn_that_is_cut_off_takes_the_context_before_it_along(chat: PreTrainedTokenizerFast) -> None:
    (whole,), _ = segments_of(segments(chat, [DIALOGUE], max_length=200).train[0])
    second_turn = whole.turns.index(1)
    (piece,), _ = segments_of(segments(chat, [DIALOGUE], max_length=second_turn - 1).train[0])
    assert set(piece.turns) == {CONTEXT, 0}
    assert piece.turns[-1] == 0


def test_long_rows_are_dropped_or_refused_as_the_keys_say(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert segments(plain, [TEXT, LONG], max_length=20, truncation_mode="drop").train["row"] == [1]
    message = file_refusal(
        prepare_segments, plain, tmp_path / "rows.jsonl", [TEXT, LONG], max_length=20, truncation_mode="error"
    )
    assert "rows.jsonl, row 2, column `first.prompt`" in message
    assert "truncation_mode: drop" in message
    long_prompt = {**TEXT, "second": {"prompt": "9+8=" * 20, "completion": " 17"}}
    assert "overlong_prompts: drop" in file_refusal(
        prepare_segments, plain, tmp_path / "rows.jsonl", [TEXT, long_prompt], max_length=20
    )
    assert segments(plain, [long_prompt, TEXT], max_length=20, overlong_prompts="drop").train["row"] == [2]


def test_data_in_which_no_segment_keeps_its_end_is_refused(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert "would not learn to stop" in file_refusal(
        prepare_segments,
        plain,
        tmp_path / "rows.jsonl",
        [{**LONG, "second": LONG["first"] | {"prompt": "3"}}],
        max_length=20,
    )


# -- refusals ----------------------------------------------------------------------------------------------------------


TEXT_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "zero length": ({"first": {**FIRST, "completion": ""}}, "first.completion", "an empty segment"),
    "blank": ({"second": {**FIRST, "completion": " \n"}}, "second.completion", "an empty segment"),
    "nothing but the end": ({"first": {**FIRST, "completion": "</s>"}}, "first.completion", "empty"),
    "no completion": ({"first": {"prompt": "2+2="}}, "first", "without `completion` (its keys: `prompt`)"),
    "no prompt": ({"second": {"completion": "4"}}, "second", "without `prompt`"),
    "empty prompt": ({"first": {"prompt": "", "completion": " 4"}}, "first.prompt", "empty"),
    "null": ({"second": None}, "second", "null where a segment is expected"),
    "label above": ({"label": 2}, "label", "2 is outside 0 to 1"),
    "label below": ({"label": -1}, "label", "-1 is outside 0 to 1"),
    "no label": ({"label": None}, "label", "null where a finite number"),
    "equal": ({"second": FIRST}, "second", "equal to `first`"),
    "equal once tokenised": ({"second": {**FIRST, "completion": " 4</s>"}}, "second.completion", "equal to `first"),
    "tools": ({"first": {**FIRST, "tools": '[{"a": 1}]'}}, "tools", "needs messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXT_FAULTS)
def test_a_faulty_row_is_named_by_file_row_and_column(
    plain: PreTrainedTokenizerFast, tmp_path: Path, case: str
) -> None:
    changed, column, words = TEXT_FAULTS[case]
    message = file_refusal(prepare_segments, plain, tmp_path / "rows.jsonl", [TEXT, TEXT, {**TEXT, **changed}, TEXT])
    assert f"rows.jsonl, row 3, column `{column}`" in message
    assert words in message
    data = segments(plain, [TEXT, TEXT, {**TEXT, **changed}, TEXT], faulty_rows="drop")
    assert data.train["row"] == [1, 2, 4]
    assert data.counts["dropped_faulty"] == 1


CHAT_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no message": ({"completion": []}, "first.completion", "an empty segment"),
    "nobody acts": ({"completion": [user("Hi")]}, "first.completion", "no message of the assistant"),
    "says nothing": ({"completion": [assistant("4"), user("No"), assistant("")]}, "first.completion", "an empty"),
    "ends with another's": ({"completion": [assistant("4"), user("No")]}, "first.completion", "leave the messages"),
    "within a turn": ({"prompt": [user("2+2?"), assistant("It")]}, "first.prompt", "is given as text"),
    "nothing before": ({"prompt": []}, "first.prompt", "no message"),
    "unknown role": ({"completion": [{"role": "robot", "content": "4"}]}, "first.completion", "unknown role `robot`"),
    "number": ({"completion": 7}, "first.completion", "the number 7"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT_FAULTS)
def test_a_faulty_dialogue_is_named(chat: PreTrainedTokenizerFast, case: str) -> None:
    changed, column, words = CHAT_FAULTS[case]
    rows = [{**DIALOGUE, "first": {**DIALOGUE["first"], **changed}}]
    with pytest.raises(RefusedError) as refused:
        segments(chat, rows)
    assert f"row 1, column `{column}`" in str(refused.value)
    assert words in str(refused.value)


GROUP_FAULTS: dict[str, tuple[Any, str, str]] = {
    "one": ([{**FIRST, "score": 1}], "segments", "a group of 1, in which nothing can be compared; give two"),
    "none": ([], "segments", "a group of 0"),
    "no score": ([{**FIRST, "score": 1}, SECOND], "segments.2.score", "null where a finite number"),
    "zero length": (
        [{**FIRST, "score": 1}, {**SECOND, "completion": "", "score": 0}], "segments.2.completion", "an empty segment"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUP_FAULTS)
def test_a_faulty_group_is_named(plain: PreTrainedTokenizerFast, tmp_path: Path, case: str) -> None:
    group, column, words = GROUP_FAULTS[case]
    good = {"segments": [{**FIRST, "score": 1}, {**SECOND, "score": 0}]}
    message = file_refusal(prepare_segments, plain, tmp_path / "rows.jsonl", [good, {"segments": group}])
    assert f"rows.jsonl, row 2, column `{column}`" in message
    assert words in message


def test_a_missing_column_is_named(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("first", "second", "label"):
        rows = [{key: value for key, value in TEXT.items() if key != name}] * 2
        assert f"rows.jsonl: no column `{name}`" in file_refusal(prepare_segments, plain, tmp_path / "rows.jsonl", rows)
    problems = [{"prompt": "2", "answer": "3"}] * 2
    message = file_refusal(prepare_segments, plain, tmp_path / "rows.jsonl", problems)
    assert [words for words in ("no column `chosen`", *READ.split("; "), "docs/data.md") if words not in message] == []


def test_two_formats_in_two_splits_are_refused(plain: PreTrainedTokenizerFast) -> None:
    both = DatasetDict(train=Dataset.from_list([TEXT]), test=Dataset.from_list([GOOD]))
    with pytest.raises(RefusedError, match=r"preference pairs, but .* has compared segments; give both in one format"):
        prepare_segments(keys(eval_rows=1), plain, lambda text: None, dataset=both)


def test_dialogues_need_a_chat_template(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RefusedError, match="no chat template"):
        segments(plain, [DIALOGUE])
