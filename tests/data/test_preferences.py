"""Preference pairs from every format; every fault named by file, row and column; every dropped or cut row counted."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from support.pairs import GOOD, assistant, keys, prepared, user
from support.refusals import refusal
from transformers import PreTrainedTokenizerFast

from llmrl.data.preferences import PreferenceData, prepare_preferences
from llmrl.data.preparing import COUNTED
from llmrl.data.sources import load_rows
from llmrl.errors import RefusedError


def texts(tokenizer: PreTrainedTokenizerFast, data: PreferenceData, index: int = 0) -> tuple[str, str, str]:
    row = data.train[index]
    return tuple(tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))  # type: ignore[return-value]


TOOL = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"
ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
TWO_TURNS = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n" + ASKED
DIALOGUES: dict[str, tuple[dict[str, Any], str]] = {
    "three lists of messages": (
        {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        ASKED,
    ),
    "answers as single messages": (
        {"prompt": [user("2+2?")], "chosen": assistant("4"), "rejected": assistant("5")},
        ASKED,
    ),
    "answers as text": ({"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"}, ASKED),
    "a question as text": ({"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]}, ASKED),
    "implicit prompt": (
        {
            "chosen": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")],
            "rejected": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("5")],
        },
        TWO_TURNS,
    ),
    "a question beside whole dialogues": (
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        ASKED,
    ),
    "messages beside whole dialogues": (
        {
            "prompt": [user("2+2?")],
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
        },
        ASKED,
    ),
    "conversations with from and value": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "2+2?"},
            ],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        TWO_TURNS,
    ),
    "content in parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}],
        },
        ASKED,
    ),
}
PLAIN: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "three texts": (GOOD, "2+2=", " 4", " 5"),
    "implicit prompt, Human and Assistant": (
        {"chosen": HH + " 4, yes", "rejected": HH + " 4, no"},
        HH,
        " 4, yes",
        " 4, no",
    ),
    "implicit prompt, other text": (
        {"chosen": "Sum: 2+2 is 4", "rejected": "Sum: 2+2 is 45"},
        "Sum: 2+2 is",
        " 4",
        " 45",
    ),
    "implicit prompt beside a label": (
        {"question": "q1", "chosen": "Sum: 2+2 is 4", "rejected": "Sum: 2+2 is 5"},
        "Sum: 2+2 is",
        " 4",
        " 5",
    ),
    "an answer with its end written out": ({**GOOD, "chosen": " 4</s>"}, "2+2=", " 4", " 5"),
}


@pytest.mark.parametrize("case", DIALOGUES)
def test_every_conversational_format_gives_the_same_pair(chat: PreTrainedTokenizerFast, case: str) -> None:
    row, seen = DIALOGUES[case]
    data = prepared(chat, [row])
    assert texts(chat, data) == (seen, "4<|im_end|>", "5<|im_end|>")
    assert data.train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]


@pytest.mark.parametrize("case", PLAIN)
def test_every_plain_format_gives_its_pair(plain: PreTrainedTokenizerFast, case: str) -> None:
    row, prompt, chosen, rejected = PLAIN[case]
    assert texts(plain, prepared(plain, [row])) == (prompt, chosen + "</s>", rejected + "</s>")


@pytest.mark.parametrize("column", [TOOL, json.dumps(TOOL)])
def test_tools_and_template_arguments_are_shown_to_the_model(plain: PreTrainedTokenizerFast, column: Any) -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% if thoughts is false %}quick;{% endif %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    row = {**DIALOGUES["three lists of messages"][0], "tools": column, "chat_template_kwargs": {"thoughts": False}}
    assert texts(tokenizer, prepared(tokenizer, [row]))[0] == "f;quick;2+2?<|im_end|>"


def test_rows_keep_their_number_through_dropping_and_holding_out(plain: PreTrainedTokenizerFast) -> None:
    rows = [{**GOOD, "prompt": f"{i}+2=" * (1 + 50 * (i % 7 == 0))} for i in range(1, 101)]
    data = prepared(plain, rows, eval_rows=10, overlong_prompts="drop")
    assert data.heldout is not None
    assert not set(data.train["row"]) & set(data.heldout["row"])
    for row in itertools.chain(data.train, data.heldout):
        assert plain.decode(row["prompt_ids"]) == f"{row['row']}+2="
    assert data.counts["rows"] == 100
    assert data.counts["dropped_overlong_prompts"] == 14
    assert data.counts["train_rows"] + data.counts["heldout_rows"] == 86 == len(data.train) + len(data.heldout)


LONG = {"prompt": "2+2=", "chosen": " 4" * 30, "rejected": " 5"}


def lengths(data: PreferenceData) -> list[tuple[int, int, int]]:
    return [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in data.train]


def test_completions_are_cut_at_their_end_and_counted(plain: PreTrainedTokenizerFast) -> None:
    whole = prepared(plain, [GOOD, LONG, GOOD], max_length=256)
    said: list[str] = []
    cut = prepared(plain, [GOOD, LONG, GOOD], max_length=20, say=said.append)
    assert [max(p + c, p + r) for p, c, r in lengths(cut)][1] == 20
    assert cut.train[1]["chosen_ids"] == whole.train[1]["chosen_ids"][: 20 - len(whole.train[1]["prompt_ids"])]
    assert cut.train[1]["rejected_ids"] == whole.train[1]["rejected_ids"]
    assert (whole.counts["truncated_completions"], cut.counts["truncated_completions"]) == (0, 1)
    assert "1 completions cut" in said[-1]


def test_keep_end_cuts_the_start_of_the_prompt_alike_for_both(plain: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "1 2 3 4 5 6 7 8 9 10 11 12=", "chosen": " 4 5 6", "rejected": " 5"}
    whole, cut = prepared(plain, [row]), prepared(plain, [row], max_length=12, truncation_mode="keep_end")
    prompt, chosen, rejected = (whole.train[0][n] for n in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert cut.train[0]["prompt_ids"] == prompt[-(12 - len(chosen)) :]
    assert (cut.train[0]["chosen_ids"], cut.train[0]["rejected_ids"]) == (chosen, rejected)
    assert cut.counts["truncated_prompts"] == 1


def test_rows_that_do_not_fit_are_dropped_and_counted(plain: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    data = prepared(plain, [GOOD, LONG, GOOD], max_length=20, truncation_mode="drop", say=said.append)
    assert data.train["row"] == [1, 3]
    assert data.counts["dropped_overlong_completions"] == 1
    assert "1 rows dropped" in said[-1]


def test_rows_that_do_not_fit_are_refused(plain: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, plain, [GOOD, LONG, GOOD], max_length=20, truncation_mode="error")
    assert "row 2" in message
    assert "max_length 20" in message


@pytest.mark.parametrize("mode", ["keep_start", "drop", "error"])
def test_a_prompt_longer_than_the_limit_is_refused_or_dropped(plain: PreTrainedTokenizerFast, mode: str) -> None:
    rows = [GOOD, {**GOOD, "prompt": "2+" * 40}, GOOD]
    message = refusal(prepared, plain, rows, max_length=20, truncation_mode=mode)
    assert "row 2, column `prompt`" in message
    assert "max_length 20" in message
    data = prepared(plain, rows, max_length=20, truncation_mode=mode, overlong_prompts="drop")
    assert data.train["row"] == [1, 3]
    assert data.counts["dropped_overlong_prompts"] == 1


def test_the_limit_is_exact(plain: PreTrainedTokenizerFast) -> None:
    """A prompt may leave room for one token of each completion, and not for none."""
    short, row = {"prompt": "2", "chosen": "4", "rejected": "5"}, {"prompt": "2+2=", "chosen": "4 4", "rejected": "5 5"}
    length = len(prepared(plain, [row]).train[0]["prompt_ids"])
    assert "row 2, column `prompt`" in refusal(prepared, plain, [short, row], max_length=length)
    assert lengths(prepared(plain, [short, row], max_length=length + 1))[1] == (length, 1, 1)


def test_no_row_left_is_refused(plain: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, plain, [LONG] * 3, max_length=20, truncation_mode="drop")
    assert "empty" in message
    assert "3 rows dropped" in message


def test_everything_counted_is_said_in_words(plain: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    rows = [
        GOOD,
        LONG,
        {**GOOD, "prompt": "2+" * 40},
        {**GOOD, "chosen": ""},
        {**GOOD, "prompt": "The qui", "chosen": "ck"},
    ]
    data = prepared(plain, rows, max_length=20, overlong_prompts="drop", faulty_rows="drop", say=said.append)
    changed = {name: count for name, count in data.counts.items() if name in COUNTED and count}
    assert changed == {
        "dropped_faulty": 1, "dropped_overlong_prompts": 1, "truncated_completions": 1, "retokenised_boundaries": 1
    }  # fmt: skip
    assert [
        f"{count} {COUNTED[name]}" for name, count in changed.items() if f"{count} {COUNTED[name]}" not in said[-1]
    ] == []
    assert set(data.counts) == {"rows", "train_rows", "heldout_rows", *COUNTED}


def test_nothing_dropped_is_said_too(plain: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    prepared(plain, [GOOD], say=said.append)
    assert said[-1] == "data: 1 of 1 pairs kept, 1 to train on: none dropped, none cut"


def test_the_fingerprint_covers_content_and_tokenisation_and_nothing_else(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**GOOD, "prompt": f"{i}+2="} for i in range(30)]
    plain = tokenizers["plain"]
    first = prepared(plain, rows, eval_rows=3).fingerprint
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        again = prepare_preferences(keys(dataset_name=str(file), eval_rows=3), plain, lambda text: None)
        assert again.fingerprint == first
    monkeypatch.setattr("llmrl.data.mapping.ROWS_PER_BATCH", 7)
    assert prepared(plain, rows, eval_rows=3).fingerprint == first
    others = {
        "a changed answer": prepared(plain, [*rows[:-1], {**rows[-1], "chosen": " 40"}], eval_rows=3),
        "another order": prepared(plain, rows[::-1], eval_rows=3),
        "another limit": prepared(plain, rows, eval_rows=3, max_length=6),
        "another division": prepared(plain, rows, eval_rows=2),
        "another tokenizer": prepared(tokenizers["bos"], rows, eval_rows=3),
    }
    assert len({first, *(data.fingerprint for data in others.values())}) == 6


def test_large_data_goes_through_a_scratch_file_and_comes_out_the_same(
    plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**GOOD, "prompt": f"{i}+2="} for i in range(50)]
    small = prepared(plain, rows)
    monkeypatch.setattr("llmrl.data.mapping.ROWS_IN_MEMORY", 10)
    monkeypatch.setattr("llmrl.data.mapping.ROWS_PER_BATCH", 7)
    large = prepared(plain, rows)
    assert large.train.cache_files
    assert not small.train.cache_files
    assert large.train.to_list() == small.train.to_list()
    assert large.fingerprint == small.fingerprint


RANK_SCRIPT = """
import sys
from types import SimpleNamespace
from transformers import AutoTokenizer
from llmrl.data.preferences import prepare_preferences
keys = SimpleNamespace(dataset_name=sys.argv[1], dataset_config=None, dataset_train_split="train",
    dataset_test_split="test", eval_rows=5, max_length=64, truncation_mode="keep_start", overlong_prompts="error")
data = prepare_preferences(keys, AutoTokenizer.from_pretrained(sys.argv[2]), lambda text: None)
print(data.fingerprint, data.train["row"][:3])
"""


@pytest.mark.slow
def test_ranks_that_prepare_at_once_agree_and_say_nothing(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "tokenizer")
    Dataset.from_list([{**GOOD, "prompt": f"{i}+2="} for i in range(60)]).save_to_disk(tmp_path / "data")
    command = [sys.executable, "-c", RANK_SCRIPT, str(tmp_path / "data"), str(tmp_path / "tokenizer")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}, **pipes) for rank in range(2)]  # type: ignore[call-overload]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert "Tokenising" not in outputs[1][1]


def test_datasets_objects_with_a_test_split(plain: PreTrainedTokenizerFast) -> None:
    both = DatasetDict(train=Dataset.from_list([GOOD] * 3), test=Dataset.from_list([GOOD] * 2))
    data = prepared(plain, both, eval_rows=64)
    assert data.heldout is not None
    assert (len(data.train), len(data.heldout)) == (3, 2)


def test_text_for_a_model_that_chats_is_said(plain: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast) -> None:
    messages = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
    for tokenizer, rows, expected in ((chat, [GOOD, GOOD], ["data: 2"]), (chat, [messages], []), (plain, [GOOD], [])):
        said: list[str] = []
        prepared(tokenizer, rows, say=said.append)
        assert [line.split(" pairs are text and no messages")[0] for line in said if "are text" in line] == expected


def test_heldout_prompts_that_are_trained_on_are_said(plain: PreTrainedTokenizerFast) -> None:
    other = GOOD | {"prompt": "3+3="}
    for heldout, shared in (([GOOD, other, other], 1), ([other], 0)):
        said: list[str] = []
        both = DatasetDict(train=Dataset.from_list([GOOD]), test=Dataset.from_list(heldout))
        prepared(plain, both, eval_rows=64, say=said.append)
        assert [f"prompts of {shared} of {len(heldout)} held-out pairs" in said[-1]] == [bool(shared)]


def test_real_dialogues_with_from_and_value(chat: PreTrainedTokenizerFast, shared_data: Path) -> None:
    said: list[str] = []
    name = str(shared_data / "helpful_pairs/pairs_a.jsonl")
    config = keys(dataset_name=name, max_length=4096, eval_rows=64, overlong_prompts="drop")
    data = prepare_preferences(config, chat, said.append)
    assert data.heldout is not None
    assert "180 rows to train on, 20 held out" in said[0]
    assert len(data.train) + len(data.heldout) + data.counts["dropped_overlong_prompts"] == 200
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    for row in itertools.chain(data.train, data.heldout):
        source = rows[row["row"] - 1]
        assert source["conversations"][-1]["value"] in chat.decode(row["prompt_ids"])
        for column in ("chosen", "rejected"):
            answer = chat.decode(row[f"{column}_ids"])
            assert (source[column]["value"] + "<|im_end|>").startswith(answer)


def test_real_dialogues_as_text_with_an_implicit_prompt(plain: PreTrainedTokenizerFast, shared_data: Path) -> None:
    name = str(shared_data / "hh_rlhf_harmless/train.jsonl")
    config = keys(dataset_name=name, max_length=4096, eval_rows=64)
    with pytest.raises(RefusedError, match=r"train\.jsonl, row 87, column `chosen`: an empty completion") as refused:
        prepare_preferences(config, plain, lambda text: None)
    assert "3 more rows" in str(refused.value)
    rows = load_rows(name).select(range(200))
    data = prepared(plain, rows, max_length=4096, faulty_rows="drop")
    assert data.counts["dropped_faulty"] == 1
    assert len(data.train) == 199
    for row in data.train:
        prompt = plain.decode(row["prompt_ids"])
        assert prompt.endswith("\n\nAssistant:")
        for column in ("chosen", "rejected"):
            assert prompt + plain.decode(row[f"{column}_ids"]) == rows[row["row"] - 1][column] + "</s>"


def calibration_of(tokenizer: PreTrainedTokenizerFast, data: PreferenceData) -> list[str]:
    ids = iter(data.train[0]["calibration_ids"])
    return [tokenizer.decode(list(itertools.islice(ids, length))) for length in data.train[0]["calibration_lengths"]]


@pytest.mark.parametrize(
    ("pair", "written", "expected"),
    [
        (GOOD, [" 4 or so", " 7"], [" 4 or so<|im_end|>", " 7<|im_end|>"]),
        (GOOD, " 7", [" 7<|im_end|>"]),
        (
            {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
            ["7", "8"],
            ["7<|im_end|>", "8<|im_end|>"],
        ),
        (
            {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
            [[assistant("7")], [assistant("8")]],
            ["7<|im_end|>", "8<|im_end|>"],
        ),
        (
            {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
            [user("2+2?"), assistant("7")],
            ["7<|im_end|>"],
        ),
    ],
)
def test_calibration_answers_follow_the_prompt_like_the_pair(
    chat: PreTrainedTokenizerFast, pair: dict[str, Any], written: Any, expected: list[str]
) -> None:
    data = prepared(chat, [{**pair, "calibration": written}] * 2, calibration=True)
    assert calibration_of(chat, data) == expected
    said: list[str] = []
    without = prepared(chat, [{**pair, "calibration": written}] * 2, say=said.append)
    assert "calibration_ids" not in without.train.column_names
    assert any("the column `calibration` is not read" in line for line in said)
    assert data.fingerprint != without.fingerprint
    assert without.fingerprint == prepared(chat, [pair] * 2).fingerprint


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD], ["no column `calibration`"]),
        ([{**GOOD, "calibration": ["", " 7"]}], ["row 1", "`calibration`", "empty completion"]),
        ([{**GOOD, "calibration": []}], ["row 1", "`calibration`", "no answer in it"]),
        ([{**GOOD, "calibration": [[assistant("7")]]}], ["row 1", "`calibration`", "the pair is text"]),
    ],
)
def test_calibration_answers_that_cannot_be_used_are_refused(
    chat: PreTrainedTokenizerFast, rows: list[dict[str, Any]], words: list[str]
) -> None:
    message = refusal(prepared, chat, rows, calibration=True)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("mode", "column"), [("error", "calibration"), ("keep_end", "calibration"), ("error", "prompt")]
)
def test_what_is_too_long_is_named_by_its_column(chat: PreTrainedTokenizerFast, mode: str, column: str) -> None:
    row = (
        {**GOOD, "calibration": " 7" * 99}
        if column == "calibration"
        else {**GOOD, "calibration": " 7", "prompt": "2+" * 99}
    )
    message = refusal(prepared, chat, [row], calibration=True, max_length=30, truncation_mode=mode)
    assert f"row 1, column `{column}`: " in message
