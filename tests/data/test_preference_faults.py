"""What is no preference pair is refused before anything is tokenised: by file, row and column, with the remedy."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from support.pairs import GOOD, assistant, prepared, user
from support.refusals import file_refusal, refusal
from transformers import PreTrainedTokenizerFast

from llmrl.data.preferences import prepare_preferences
from llmrl.data.tokenization import Encoder

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"
DIALOGUE = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
LONG = {"prompt": "2+2=", "chosen": " 4" * 30, "rejected": " 5"}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty chosen": ({**GOOD, "chosen": ""}, "`chosen`: an empty completion"),
    "blank rejected": ({**GOOD, "rejected": " \n"}, "`rejected`: an empty completion"),
    "null": ({**GOOD, "rejected": None}, "`rejected`: null"),
    "null prompt": ({**GOOD, "prompt": None}, "`prompt`: null"),
    "empty prompt": ({**GOOD, "prompt": ""}, "`prompt`: empty"),
    "same": ({**GOOD, "rejected": " 4"}, "`rejected`: equal to `chosen`"),
    "same but for the end": ({**GOOD, "rejected": " 4</s>"}, "`rejected`: equal to `chosen` once tokenised"),
    "nothing but the end": ({**GOOD, "rejected": "</s>"}, "`rejected`: an empty completion"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_row_is_named_by_file_row_and_column(
    plain: PreTrainedTokenizerFast, tmp_path: Path, case: str
) -> None:
    row, words = FAULTS[case]
    message = file_refusal(prepare_preferences, plain, tmp_path / "named.jsonl", [GOOD] * 5 + [row] + [GOOD] * 2)
    assert f"named.jsonl, row 6, column {words}" in message
    assert "give a prompt" in message or "mend or remove the row" in message
    data = prepared(plain, [GOOD] * 5 + [row] + [GOOD] * 2, faulty_rows="drop")
    assert data.train["row"] == [1, 2, 3, 4, 5, 7, 8]
    assert data.counts["dropped_faulty"] == 1


def test_a_faulty_row_is_found_wherever_it_would_have_gone(plain: PreTrainedTokenizerFast) -> None:
    rows = [{**GOOD, "prompt": f"{i}+2="} for i in range(40)]
    for index in range(40):
        broken = [*rows[:index], {**rows[index], "chosen": ""}, *rows[index + 1 :]]
        assert f"row {index + 1}, column `chosen`" in refusal(prepared, plain, broken, eval_rows=4)


def test_held_out_rows_are_read_before_any_is_tokenised(
    plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = DatasetDict(train=Dataset.from_list([GOOD] * 3), test=Dataset.from_list([GOOD, {**GOOD, "chosen": ""}]))
    monkeypatch.setattr(Encoder, "plain", None)
    assert "split test, row 2, column `chosen`" in refusal(prepared, plain, both, eval_rows=2)


def test_all_faulty_rows_are_named_at_once(plain: PreTrainedTokenizerFast) -> None:
    bad = {**GOOD, "chosen": ""}
    assert "row 2" in (message := refusal(prepared, plain, [GOOD, bad, GOOD, bad, bad]))
    assert "2 more rows have faults: 4, 5" in message


CHAT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"chosen": [assistant("")]}, "`chosen`: an empty completion"),
    "no message": ({"rejected": []}, "`rejected`: its messages after the shared prompt are: none"),
    "a user's turn": ({"chosen": [assistant("4"), user("No"), assistant("5")]}, "`chosen`: its messages"),
    "no prompt": ({"prompt": []}, "`prompt`: no message"),
    "no role": ({"chosen": [{"content": "4"}]}, "`chosen`: message 1 has no `role`"),
    "unknown role": (
        {"chosen": [{"role": "robot", "content": "4"}]},
        "`chosen`: message 1 has the unknown role `robot`",
    ),
    "no content": ({"chosen": [{"role": "assistant"}]}, "`chosen`: message 1 has no `content`"),
    "same": ({"rejected": [assistant("4")]}, "`rejected`: equal to `chosen`"),
    "tools are no list": ({"tools": '{"a": 1}'}, "`tools`: an object where a list"),
    "tools are broken": ({"tools": "["}, "`tools`: text that is not valid JSON"),
}


@pytest.mark.parametrize("case", CHAT_FAULTS)
def test_a_faulty_dialogue_is_named(chat: PreTrainedTokenizerFast, tmp_path: Path, case: str) -> None:
    good = DIALOGUE
    changed, words = CHAT_FAULTS[case]
    message = file_refusal(prepare_preferences, chat, tmp_path / "named.jsonl", [good, {**good, **changed}])
    assert f"named.jsonl, row 2, column {words}" in message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("prompt", "chosen"), ["no column `rejected`", "`prompt`, `chosen`"]),
        (("prompt", "chosen", "rejectd"), ["no column `rejected`", "did you mean `rejectd`?"]),
        (("prompt", "accepted", "rejected"), ["no column `chosen`", "did you mean `accepted`?"]),
        (("prompt", "chosen", "answer_rejected"), ["no column `rejected`", "did you mean `answer_rejected`?"]),
        (("promt", "chosen", "rejected"), ["no column `prompt`", "did you mean `promt`?"]),
        (("question", "chosen", "rejected"), ["no column `prompt`", "did you mean `question`?"]),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(
    plain: PreTrainedTokenizerFast, tmp_path: Path, columns: tuple[str, ...], words: list[str]
) -> None:
    row = dict(zip(columns, ("2+2=", "4", "5"), strict=False))
    message = file_refusal(prepare_preferences, plain, tmp_path / "named.jsonl", [row] * 8)
    assert [word for word in ["named.jsonl", *words] if word not in message] == []


def test_a_number_is_not_text(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    message = file_refusal(
        prepare_preferences, plain, tmp_path / "named.jsonl", [GOOD] * 2 + [{**GOOD, "chosen": 7}] + [GOOD]
    )
    assert [word for word in ("named.jsonl", "row 3", "`chosen`", "number") if word not in message] == []
    message = file_refusal(prepare_preferences, plain, tmp_path / "named.jsonl", [{**GOOD, "chosen": 7}] * 2)
    assert "row 1, column `chosen`: the number 7" in message


def test_answers_without_a_prompt_in_common_are_refused(plain: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, plain, [{"chosen": "Yes, of course", "rejected": "No"}])
    assert "row 1" in message
    assert "add a column `prompt`" in message


def test_dialogues_that_part_before_the_last_question_are_refused(plain: PreTrainedTokenizerFast) -> None:
    rest = "\n\nHuman: And 3+3?\n\nAssistant: 6"
    message = refusal(prepared, plain, [{"chosen": HH + " 4" + rest, "rejected": HH + " 5" + rest}])
    assert "row 1, column `chosen`" in message
    assert "Human" in message


def test_tools_beside_plain_text_are_refused(plain: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, plain, [{**GOOD, "tools": '[{"a": 1}]'}])
    assert "row 1, column `tools`: needs the conversational format" in message
    assert len(prepared(plain, [{**GOOD, "tools": "[]"}]).train) == 1


def test_pictures_are_refused(chat: PreTrainedTokenizerFast) -> None:
    assert "`images`" in refusal(prepared, chat, [{**DIALOGUE, "images": [""]}])


def test_dialogues_need_a_chat_template(plain: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, plain, [DIALOGUE])
    assert "no chat template" in message
    assert "tokenizer_config.json" in message


def test_answers_that_become_equal_by_cutting_are_refused_with_the_remedy(plain: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "2+2=", "chosen": " 4" * 30, "rejected": " 4" * 29 + " 5"}
    message = refusal(prepared, plain, [GOOD, row], max_length=20)
    assert "row 2" in message
    assert "cut to max_length" in message


def test_a_template_that_never_writes_the_stop_token_is_refused(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """The silent failure: the policy is never taught to stop, which shows only in its first long generation."""
    chat = tokenizers["chat"]
    wrong = PreTrainedTokenizerFast(
        tokenizer_object=chat.backend_tokenizer, eos_token="</s>", chat_template=chat.chat_template
    )
    row = DIALOGUE
    message = refusal(prepared, wrong, [row] * 3)
    assert "stop token (</s>)" in message
    assert "<|im_end|>" in message
    data = prepared(wrong, [row] * 3, stop_token_ids=[wrong.convert_tokens_to_ids("<|im_end|>")])
    assert wrong.decode(data.train[0]["chosen_ids"]) == "4<|im_end|>"


def test_a_limit_that_cuts_every_end_off_is_refused(plain: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "2+2=", "chosen": " 4 4 4 4 4 4", "rejected": " 5 5 5 5 5 5"}
    assert "would not learn to stop" in refusal(prepared, plain, [row] * 3, max_length=8)


def test_some_answers_without_an_end_are_counted(plain: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.content != 'open' %}<|im_end|>{% endif %}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    good = DIALOGUE
    said: list[str] = []
    data = prepared(tokenizer, [good, {**good, "rejected": [assistant("open")]}], say=said.append)
    assert data.counts["without_stop_token"] == 1
    assert "1 completions in which the chat template writes no stop token" in said[-1]
