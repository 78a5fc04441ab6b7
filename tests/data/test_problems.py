"""Problems with answers: asked as the chat template asks, every fault named."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from support.refusals import refusal
from transformers import PreTrainedTokenizerFast

from llmrl.data.problems import prepare_problems

BUNDLED = Path(__file__).parents[2] / "data/arithmetic/problems"


def keys(**changed: Any) -> SimpleNamespace:
    values = {
        "dataset_name": "unused", "dataset_config": None, "dataset_test_split": "train", "prompt_column": "prompt",
        "answer_column": "answer", "limit": None,
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def prepared(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **changed: Any) -> Dataset:
    return prepare_problems(keys(**changed), tokenizer, lambda text: None, dataset=Dataset.from_list(rows))


def test_the_bundled_problems_are_asked_with_the_generation_prompt(chat: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    problems = prepare_problems(keys(dataset_name=str(BUNDLED), dataset_test_split="test", limit=7), chat, said.append)
    assert said == [f"data: {BUNDLED / 'test.jsonl'}: 7 of 400 problems to answer"]
    assert problems["row"] == [1, 2, 3, 4, 5, 6, 7]
    for problem in problems:
        assert chat.decode(problem["prompt_ids"]) == (
            f"<|im_start|>user\n{problem['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert int(problem["answer"]) >= 0


def test_text_is_a_user_turn_where_there_is_a_template_and_itself_where_there_is_none(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    row = {"question": "2+2?", "solution": 4}
    columns = {"prompt_column": "question", "answer_column": "solution"}
    spoken = prepared(tokenizers["chat"], [row], **columns)[0]
    plain = prepared(tokenizers["bos"], [row], **columns)[0]
    assert tokenizers["chat"].decode(spoken["prompt_ids"]) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizers["bos"].decode(plain["prompt_ids"]) == "<s>2+2?"
    assert spoken["prompt"] == plain["prompt"] == "2+2?"
    assert spoken["answer"] == "4"


def test_a_dialogue_is_shown_by_its_last_message(chat: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}]
    problem = prepared(chat, [{"prompt": turns, "answer": "4"}])[0]
    assert problem["prompt"] == "2+2?"
    assert chat.decode(problem["prompt_ids"]).startswith("<|im_start|>system\nAdd.<|im_end|>")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": " "}, "row 2, column `prompt`: empty"),
        ({"answer": ""}, "row 2, column `answer`: empty"),
        ({"answer": None}, "row 2, column `answer`: null"),
        ({"prompt": None}, "row 2, column `prompt`: null"),
    ],
)
def test_a_faulty_problem_is_named(chat: PreTrainedTokenizerFast, changed: dict[str, Any], words: str) -> None:
    good = {"prompt": "2+2?", "answer": "4"}
    assert words in refusal(prepared, chat, [good, {**good, **changed}, good])


def test_a_number_is_written_out_in_digits(chat: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "p", "answer": answer} for answer in (1e-05, 1e20, 2.5)]
    assert prepared(chat, rows)["answer"] == ["0.00001", "100000000000000000000", "2.5"]


def test_a_missing_column_is_named_with_the_nearest(chat: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, chat, [{"prompt": "2+2?", "anwser": "4"}])
    assert "no column `answer`" in message
    assert "did you mean `anwser`?" in message


def test_a_missing_split_names_the_key(chat: PreTrainedTokenizerFast) -> None:
    message = refusal(prepared, chat, [{"prompt": "2+2?", "answer": "4"}], dataset_test_split="test")
    assert "task_evaluation.dataset_test_split" in message


def test_dialogues_need_a_chat_template(plain: PreTrainedTokenizerFast) -> None:
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}
    assert "no chat template" in refusal(prepared, plain, [row])
