"""The same ids as TRL's DPOTrainer, row by row, and the differences that are meant.

Differences: TRL scores what a chat template writes after the last end of turn (a newline), which the policy never
produces; and where a token spans the boundary it drops that end of the prompt and scores the whole token.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmrl.data.preferences import prepare_preferences

PLAIN = [
    {"prompt": "What is 12 + 30?\n", "chosen": "10 + 30 = 40", "rejected": "The answer is no."},
    {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"},
    {"prompt": "The fox\n\nAnswer:", "chosen": " yes, 12", "rejected": " no"},
    {"prompt": "2+2=", "chosen": " 4</s>", "rejected": " 45"},
]
SPOKEN = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for question, chosen, rejected in (
        ("What is 12 + 30?", "10 + 30 = 40\nAnswer: 42", "no"),
        ("Is it?", "\n\nyes", "The quick brown fox"),
        ("日本", "é", " 12 "),
    )
]
IMPLICIT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in SPOKEN]  # type: ignore[operator]
PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")


def theirs(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], folder: Path) -> list[tuple[list[int], ...]]:
    # Here, for it takes seconds: the quick tests collect this file too.
    from trl import DPOConfig, DPOTrainer

    size = LlamaConfig(
        vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(size).save_pretrained(folder / "model")
    trainer = DPOTrainer(
        str(folder / "model"),
        args=DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=512),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [tuple(row[name] for name in PARTS) for row in trainer.train_dataset]


def ours(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[tuple[list[int], ...]]:
    keys = SimpleNamespace(
        dataset_name="unused", dataset_config=None, dataset_train_split="train", dataset_test_split="test", eval_rows=0,
        max_length=512, truncation_mode="keep_start", overlong_prompts="error",
    )  # fmt: skip
    data = prepare_preferences(keys, tokenizer, lambda text: None, dataset=Dataset.from_list(rows))
    return [tuple(row[name] for name in PARTS) for row in data.train]


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "bos", "sentencepiece"])
def test_plain_rows(tokenizers: dict[str, PreTrainedTokenizerFast], name: str, tmp_path: Path) -> None:
    assert ours(tokenizers[name], PLAIN) == theirs(tokenizers[name], PLAIN, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [SPOKEN, IMPLICIT])
def test_dialogues(tokenizers: dict[str, PreTrainedTokenizerFast], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = tokenizers["chat_without_newline"]
    assert ours(tokenizer, rows) == theirs(tokenizer, rows, tmp_path)


@pytest.mark.slow
def test_what_follows_the_end_of_turn_is_scored_by_them_and_not_by_us(
    chat: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    newline = chat("\n", add_special_tokens=False)["input_ids"]
    expected = [(prompt, chosen + newline, rejected + newline) for prompt, chosen, rejected in ours(chat, SPOKEN)]
    assert expected == theirs(chat, SPOKEN, tmp_path)


@pytest.mark.slow
def test_a_token_across_the_boundary_leaves_the_prompt_whole_here(
    plain: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": "The qui", "chosen": "ck brown", "rejected": "et fox"}]
    ((prompt, chosen, _),) = ours(plain, rows)
    ((their_prompt, their_chosen, _),) = theirs(plain, rows, tmp_path)
    assert prompt == plain("The qui")["input_ids"]
    assert len(their_prompt) < len(prompt)
    assert plain.decode(prompt + chosen) == plain.decode(their_prompt + their_chosen) == "The quick brown</s>"
