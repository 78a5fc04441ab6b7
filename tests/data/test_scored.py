"""Scored samples: tokenised with the care of preference pairs, refused by file, row and column, converted to others."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.pairs import assistant, keys, user
from support.refusals import file_refusal, refusal
from transformers import PreTrainedTokenizerFast

from llmrl.data.scored import ScoredData, prepare_scored
from llmrl.data.scored_rows import best_and_worst, best_of_n, right_and_wrong

GOOD: dict[str, Any] = {"prompt": "2+2=", "completions": [" 4", " 5", " 4"], "rewards": [1, 0, 1]}
CHAT: dict[str, Any] = {
    "prompt": [user("2+2?")],
    "completions": [[assistant("4")], [assistant("5")]],
    "rewards": [1.0, 0.0],
}
OPTIONS = ("stop_token_ids", "faulty_rows", "say", "least_samples", "needs_logprobs", "cut_off")


def prepared(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **changed: Any) -> ScoredData:
    options = {name: changed.pop(name) for name in OPTIONS if name in changed}
    say = options.pop("say", lambda text: None)
    return prepare_scored(keys(**changed), tokenizer, say, dataset=Dataset.from_list(rows), **options)


def texts(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[str]:
    return [tokenizer.decode(ids) for ids in (row["prompt_ids"], *row["completion_ids"])]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_texts_get_an_end_and_equal_samples_stay(plain: PreTrainedTokenizerFast) -> None:
    data = prepared(plain, [GOOD])
    row = data.train[0]
    assert texts(plain, row) == ["2+2=", " 4</s>", " 5</s>", " 4</s>"]
    assert (row["rewards"], row["logprobs"], row["row"]) == ([1.0, 0.0, 1.0], None, 1)
    assert data.counts["samples"] == 3


@pytest.mark.parametrize(
    "completions",
    [
        [[assistant("4")], [assistant("5")]],
        [assistant("4"), assistant("5")],
        ["4", "5"],
        [[user("2+2?"), assistant("4")], [user("2+2?"), assistant("5")]],
    ],
)
def test_dialogues_are_written_by_the_template(chat: PreTrainedTokenizerFast, completions: list[Any]) -> None:
    row = prepared(chat, [{**CHAT, "completions": completions}]).train[0]
    asked = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(chat, row) == [asked, "4<|im_end|>", "5<|im_end|>"]


def test_sampled_ids_are_never_tokenised_again(chat: PreTrainedTokenizerFast) -> None:
    """The same text as the policy divided it, which is not how the tokenizer would."""
    end = chat.eos_token_id
    letters = [i for letter in "12345" for i in chat(letter, add_special_tokens=False)["input_ids"]]
    row = {
        **CHAT,
        "completions": [[assistant("12345")], [assistant("1")]],
        "completion_ids": [[*letters, end], letters[:1]],
        "logprobs": [[-0.5] * 5 + [-0.25], [-3.0]],
        "ended": [True, False],
    }
    data = prepared(chat, [row])
    found = data.train[0]
    assert found["completion_ids"] == row["completion_ids"]
    assert found["logprobs"] == row["logprobs"]
    assert (data.counts["cut_off_samples"], data.counts["other_text"]) == (1, 0)


def test_sums_become_equal_shares(plain: PreTrainedTokenizerFast) -> None:
    row = prepared(plain, [{**GOOD, "logprobs": [-3.0, -2.0, -1.0]}]).train[0]
    assert [len(part) for part in row["logprobs"]] == [len(ids) for ids in row["completion_ids"]]
    assert [sum(part) for part in row["logprobs"]] == pytest.approx([-3.0, -2.0, -1.0])


def test_a_sample_that_did_not_end_gets_no_end(plain: PreTrainedTokenizerFast) -> None:
    row = prepared(plain, [{**GOOD, "ended": [True, False, True]}]).train[0]
    assert texts(plain, row) == ["2+2=", " 4</s>", " 5", " 4</s>"]


def test_samples_without_a_reward_are_left_out_and_counted(plain: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    data = prepared(plain, [{**GOOD, "rewards": [1, None, 0]}], say=said.append)
    assert texts(plain, data.train[0])[1:] == [" 4</s>", " 4</s>"]
    assert data.counts["without_reward"] == 1
    assert "1 samples left out because they have no reward" in said[-1]


def test_what_max_length_cuts_loses_its_end_and_its_logprobs(plain: PreTrainedTokenizerFast) -> None:
    long = {**GOOD, "completions": [" 4" * 30, " 5", " 4"]}
    whole = prepared(plain, [long]).train[0]["completion_ids"]
    logprobs = [[-1.0] * len(ids) for ids in whole]
    none = {**GOOD, "logprobs": None}
    row = prepared(plain, [none, {**long, "logprobs": logprobs}], max_length=20).train[1]
    assert len(row["prompt_ids"]) + len(row["completion_ids"][0]) == 20
    assert len(row["logprobs"][0]) == len(row["completion_ids"][0])
    assert "truncation_mode: drop" in refusal(
        prepared, plain, [none, {**long, "logprobs": [-9.0, -1.0, -1.0]}], max_length=20
    )
    data = prepared(plain, [GOOD, long], max_length=20, truncation_mode="drop")
    assert data.counts["dropped_overlong_completions"] == 1


def test_what_was_cut_off_is_left_out_where_that_is_wanted(plain: PreTrainedTokenizerFast) -> None:
    """By a limit when it was sampled, which the flag or the last token id tells, or by max_length now."""
    end, four = plain.eos_token_id, plain(" 4", add_special_tokens=False)["input_ids"]
    rows = [
        {**GOOD, "ended": [True, False, True]},
        {**GOOD, "completion_ids": [[*four, end], four, [*four, end]], "completions": [" 4"] * 3},
        {**GOOD, "completions": [" 4", " 5" * 30, " 6"]},
    ]
    for row in rows:
        data = prepared(plain, [row], cut_off="leave_out", max_length=20)
        assert [len(part) for part in data.train["completion_ids"]] == [2]
        assert (data.counts["samples"], data.counts["left_out"], data.counts["cut_off_samples"]) == (2, 1, 0)
    message = refusal(prepared, plain, [{**GOOD, "ended": [True, False, False]}], cut_off="leave_out")
    assert "1 of 3 completions have a reward and ended by themselves" in message
    long = {**GOOD, "completions": [" 4", " 5" * 30, " 6" * 30]}
    assert prepared(plain, [GOOD, long], cut_off="leave_out", max_length=20, truncation_mode="drop").train["row"] == [1]
    assert "row 2" in (message := refusal(prepared, plain, [GOOD, long], cut_off="leave_out", max_length=20))
    assert "only 1 samples fit into max_length 20; raise max_length" in message


def test_the_fingerprint_tells_rewards_and_logprobs_apart(plain: PreTrainedTokenizerFast) -> None:
    rows = [GOOD, {**GOOD, "rewards": [0, 1, 1]}, {**GOOD, "logprobs": [-1.0, -2.0, -3.0]}]
    found = [prepared(plain, [row]).fingerprint for row in (*rows, GOOD)]
    assert len(set(found)) == 3
    assert found[0] == found[3]


# -- refusals ----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "one sample": ({"completions": [" 4"], "rewards": [1]}, "`rewards`: 1 of 1 completions have a reward"),
    "one reward": ({"rewards": [None, None, 1]}, "`rewards`: 1 of 3 completions have a reward"),
    "lengths": ({"rewards": [1, 0]}, "`rewards`: 2 entries for 3 completions"),
    "not finite": ({"rewards": [1, math.nan, 0]}, "`rewards`: completion 2 has nan, which is not finite"),
    "infinite": ({"rewards": [1, 0, math.inf]}, "`rewards`: completion 3 has inf"),
    "no completion": ({"completions": [], "rewards": []}, "`completions`: no completion in it"),
    "empty prompt": ({"prompt": " "}, "`prompt`: empty"),
    "ids": ({"completion_ids": [[5], [], [5]]}, "`completion_ids`: completion 2 has no token"),
    "unknown id": ({"completion_ids": [[5], [99_999], [5]]}, "`completion_ids`: completion 2 has the id 99999"),
    "logprobs and ids": (
        {"completion_ids": [[5], [6], [5]], "logprobs": [[-1.0], [-1.0, -2.0], [-1.0]]},
        "`logprobs`: completion 2 has 2 of them for 1 token ids",
    ),
    "logprobs of another tokenization": ({"logprobs": [[-1.0] * 9] * 3}, "`logprobs`: completion 1 has 9 of them"),
    "probabilities": ({"logprobs": [[0.5, 0.5]] * 3}, "`logprobs`: completion 1 has 0.5, above 0"),
    "infinite logprobs": ({"logprobs": [-1.0, -math.inf, -1.0]}, "`logprobs`: those of completion 2"),
    "ended": ({"ended": [True, False]}, "`ended`: 2 entries for 3 completions"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_row_is_named_with_the_remedy(plain: PreTrainedTokenizerFast, tmp_path: Path, case: str) -> None:
    changed, words = FAULTS[case]
    beside = {name: None for name in changed if name not in GOOD}
    file = tmp_path / "named.jsonl"
    message = file_refusal(prepare_scored, plain, file, [{**GOOD, **beside}] * 3 + [{**GOOD, **changed}])
    assert f"named.jsonl, row 4, column {words}" in message
    assert any(remedy in message for remedy in ("remove the row", "give "))
    data = prepare_scored(keys(dataset_name=str(file)), plain, lambda text: None, faulty_rows="drop")
    assert (data.train["row"], data.counts["dropped_faulty"]) == ([1, 2, 3], 1)


def test_missing_logprobs_are_refused_where_they_are_needed(plain: PreTrainedTokenizerFast) -> None:
    assert "no column `logprobs`" in refusal(prepared, plain, [GOOD], needs_logprobs=True)
    rows = [{**GOOD, "logprobs": [-1.0] * 3}, {**GOOD, "logprobs": None}]
    message = refusal(prepared, plain, rows, needs_logprobs=True)
    assert "row 2, column `logprobs`: null" in message
    assert "set proposal: prior" in message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("prompt", "completions", "scores"), ["no column `rewards`", "did you mean `scores`?"]),
        (("prompt", "responses", "rewards"), ["no column `completions`", "did you mean `responses`?"]),
        (("question", "completions", "rewards"), ["no column `prompt`", "did you mean `question`?"]),
        (("prompt", "chosen", "rejected"), ["no column `completions`", "Read here: scored samples", "docs/data.md"]),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(
    plain: PreTrainedTokenizerFast, columns: tuple[str, ...], words: list[str]
) -> None:
    message = refusal(prepared, plain, [dict(zip(columns, GOOD.values(), strict=True))])
    assert [word for word in words if word not in message] == []


def test_ids_of_another_tokenizer_are_refused(plain: PreTrainedTokenizerFast) -> None:
    end = plain.eos_token_id
    row = {**GOOD, "completion_ids": [[40, end], [41, end], [42, end]]}
    assert "another tokenizer's than the model's" in refusal(prepared, plain, [row])


def test_samples_that_never_ended_are_refused(plain: PreTrainedTokenizerFast) -> None:
    assert "no sample has a stop token" in refusal(prepared, plain, [{**GOOD, "ended": [False] * 3}])


def test_dialogues_need_a_chat_template_and_one_message(
    plain: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast
) -> None:
    assert "no chat template" in refusal(prepared, plain, [CHAT])
    two = {**CHAT, "completions": [[assistant("4")], [assistant("5"), user("No")]]}
    message = refusal(prepared, chat, [two])
    assert "row 1, column `completions`: the messages of completion 2 are: assistant, user" in message


# -- converters --------------------------------------------------------------------------------------------------------

MIXED: dict[str, Any] = {
    "prompt": "2+2=",
    "completions": ["4", "5", "6", "four", "4", " "],
    "rewards": [1.0, 0.0, -1.0, 2.0, 1.0, -5.0],
    "completion_ids": [[1]] * 6,
    "answer": "4",
}


def test_best_and_worst() -> None:
    assert best_and_worst(MIXED) == [
        {
            "prompt": "2+2=", "chosen": "four", "rejected": "6", "chosen_reward": 2.0, "rejected_reward": -1.0,
            "answer": "4",
        }
    ]  # fmt: skip
    assert best_and_worst({**MIXED, "rewards": [1.0] * 6}) == []
    cut_off = {**MIXED, "ended": [True, True, False, False, True, True]}
    assert [(p["chosen"], p["rejected"]) for p in best_and_worst(cut_off)] == [("4", "5")]


def test_right_and_wrong() -> None:
    def pairs(count: int, **changed: Any) -> list[tuple[str, str]]:
        return [(p["chosen"], p["rejected"]) for p in right_and_wrong({**MIXED, **changed}, count)]

    assert pairs(1) == [("4", "5")]
    assert pairs(9) == [("4", "5"), ("four", "6")]
    assert pairs(9, rewards=[1.0, 0.0, -1.0, 0.0, 1.0, 0.0]) == [("4", "5"), ("4", "6"), ("4", "four")]
    assert pairs(9, rewards=[1.0] * 6) == []


def test_best_of_n() -> None:
    assert best_of_n(MIXED) == [{"prompt": "2+2=", "completion": "four", "reward": 2.0, "answer": "4"}]
    assert best_of_n({**MIXED, "rewards": [None, 1.0, None, 1.0, 0.0, None]})[0]["completion"] == "5"
    assert best_of_n(MIXED, 2.0) == []
    assert best_of_n({**MIXED, "rewards": [None] * 6}) == []


def test_converters_keep_the_form_of_messages() -> None:
    assert best_of_n({**CHAT, "level": 3}) == [
        {"prompt": [user("2+2?")], "completion": [assistant("4")], "reward": 1.0, "level": 3}
    ]
    assert best_and_worst(CHAT)[0]["rejected"] == [assistant("5")]
