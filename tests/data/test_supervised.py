"""Rows for supervised fine-tuning: every format, every fault, and lengths that are counted."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from support.refusals import refusal
from transformers import PreTrainedTokenizerFast

from llmrl.data.supervised import prepare_supervised
from llmrl.errors import RefusedError


def keys(**changed: Any) -> SimpleNamespace:
    values = {
        "dataset_name": "unused", "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test",
        "eval_rows": 0, "max_length": 64, "truncation_mode": "keep_start",
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def prepared(
    rows: list[dict[str, Any]], tokenizer: Any = None, said: list[str] | None = None, **changed: Any
) -> Dataset:
    say = (said if said is not None else []).append
    return prepare_supervised(keys(**changed), say, Dataset.from_list(rows), tokenizer)[0]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SPOKEN = {"prompt": [user("2+2?")], "completion": [assistant("4")]}
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "2+2=4", "id": 1}, {"text": "2+2=4"}),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
    "the same as messages": (SPOKEN, SPOKEN),
    "the same, mixed": ({"prompt": "2+2?", "completion": [assistant("4")]}, SPOKEN),
    "messages": ({"messages": [user("2+2?"), assistant("4")]}, {"messages": [user("2+2?"), assistant("4")]}),
    "conversations": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "id": 3},
        {"messages": [user("2+2?"), assistant("4")]},
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_comes_out_as_the_trainer_takes_it(case: str) -> None:
    given, expected = FORMATS[case]
    assert prepared([given] * 3).to_list() == [expected] * 3


def test_tools_stay_with_their_dialogue() -> None:
    row = {"messages": [user("2+2?"), assistant("4")], "tools": '[{"name": "f"}]'}
    assert prepared([row])[0] == row
    converted = prepared([{**row, "messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])[0]
    assert converted == {"messages": [user("a"), assistant("b")], "tools": '[{"name": "f"}]'}


@pytest.mark.parametrize("written", [{"thoughts": False}, '{"thoughts": false}'])
def test_template_arguments_are_objects_for_the_trainer(written: Any) -> None:
    row = {"messages": [user("2+2?"), assistant("4")], "chat_template_kwargs": written}
    assert prepared([row] * 2)["chat_template_kwargs"] == [{"thoughts": False}] * 2


def test_template_arguments_that_differ_in_kind_between_rows_are_refused() -> None:
    rows = [{"messages": [user("2+2?"), assistant("4")], "chat_template_kwargs": w} for w in ('{"a": 1}', '{"b": 1}')]
    assert "row 2, column `chat_template_kwargs`: other keys than in the first row (`a`)" in refusal(prepared, rows)


def test_no_template_arguments_are_no_column() -> None:
    row = {"messages": [user("2+2?"), assistant("4")], "chat_template_kwargs": ""}
    assert prepared([row]).column_names == ["messages"]


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "empty completion": (SPOKEN, {"completion": [assistant(" ")]}, "`completion`: an empty message"),
    "no answer": (FORMATS["messages"][0], {"messages": [user("2+2?")]}, "`messages`: no message of the assistant"),
    "no prompt": (SPOKEN, {"prompt": []}, "`prompt`: no message"),
    "empty text": (FORMATS["text"][0], {"text": "\n"}, "`text`: empty"),
    "null": (FORMATS["prompt and completion"][0], {"completion": None}, "`completion`: null"),
    "no role": (FORMATS["messages"][0], {"messages": [{"content": "4"}]}, "`messages`: message 1 has no `role`"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_row_is_named(case: str) -> None:
    good, changed, words = FAULTS[case]
    message = refusal(prepared, [good, good, {**good, **changed}, good])
    assert f"row 3, column {words}" in message
    assert "mend or remove the row" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "response": "b"}, ["no column `completion`", "did you mean `response`?"]),
        ({"promt": "a", "completion": "b"}, ["no column `prompt`", "did you mean `promt`?"]),
        ({"body": "a"}, ["no column `messages`, `text`, or `prompt` with `completion`", "`body`"]),
        ({"messages": [user("a"), assistant("b")], "image": "x"}, ["`image`", "only text"]),
    ],
)
def test_missing_and_unusable_columns_are_named(row: dict[str, Any], words: list[str]) -> None:
    message = refusal(prepared, [row])
    assert [word for word in words if word not in message] == []


def test_rows_that_will_be_cut_are_counted_with_the_length_of_the_trainer(chat: PreTrainedTokenizerFast) -> None:
    long = {**SPOKEN, "completion": [assistant("4 " * 40)]}
    lengths = [len(chat.apply_chat_template(r["prompt"] + r["completion"])["input_ids"]) for r in (SPOKEN, long)]
    said: list[str] = []
    assert len(prepared([SPOKEN, long, SPOKEN], chat, said, max_length=lengths[1] - 1)) == 3
    assert f"1 of 3 rows are cut to max_length {lengths[1] - 1}" in said[-1]
    said.clear()
    prepared([SPOKEN, long, SPOKEN], chat, said, max_length=lengths[1])
    assert "cut" not in " ".join(said)


def test_rows_that_are_too_long_are_dropped_or_refused(chat: PreTrainedTokenizerFast) -> None:
    long = {**SPOKEN, "completion": [assistant("4 " * 40)]}
    said: list[str] = []
    kept = prepared([SPOKEN, long, SPOKEN], chat, said, max_length=40, truncation_mode="drop")
    assert kept.to_list() == [SPOKEN, SPOKEN]
    assert "1 of 3 rows dropped" in said[-1]
    assert "row 2, column `completion`" in refusal(
        prepared, [SPOKEN, long], chat, max_length=40, truncation_mode="error"
    )
    assert "all 2 rows" in refusal(prepared, [long, long], chat, max_length=40, truncation_mode="drop")


def test_plain_text_counts_its_end(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["bos"]
    row = {"prompt": "2+2=", "completion": " 4"}
    length = len(tokenizer("2+2= 4</s>")["input_ids"])
    said: list[str] = []
    prepared([row], tokenizer, said, max_length=length)
    assert "cut" not in said[-1]
    prepared([row], tokenizer, said, max_length=length - 1)
    assert "1 of 1 rows are cut" in said[-1]


def test_dialogues_need_a_chat_template(plain: PreTrainedTokenizerFast) -> None:
    assert "no chat template" in refusal(prepared, [SPOKEN], plain)


def test_the_sources_own_test_split_is_checked_and_returned() -> None:
    both = DatasetDict(train=Dataset.from_list([SPOKEN] * 3), test=Dataset.from_list([SPOKEN] * 2))
    train, heldout = prepare_supervised(keys(eval_rows=8), lambda text: None, both)
    assert heldout is not None
    assert (len(train), len(heldout)) == (3, 2)
    broken = DatasetDict(train=both["train"], test=Dataset.from_list([{**SPOKEN, "completion": [assistant("")]}]))
    with pytest.raises(RefusedError, match="split test, row 1, column `completion`"):
        prepare_supervised(keys(eval_rows=8), lambda text: None, broken)
