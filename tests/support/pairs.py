"""Preference pairs handed to `prepare_preferences`."""

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from llmrl.data.preferences import PreferenceData, prepare_preferences

GOOD = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}


def keys(**changed: Any) -> SimpleNamespace:
    values = {
        "dataset_name": "unused", "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test",
        "eval_rows": 0, "max_length": 64, "truncation_mode": "keep_start", "overlong_prompts": "error",
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def prepared(tokenizer: PreTrainedTokenizerFast, rows: Any, **changed: Any) -> PreferenceData:
    options = {
        name: changed.pop(name) for name in ("stop_token_ids", "faulty_rows", "calibration", "say") if name in changed
    }
    say = options.pop("say", lambda text: None)
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_preferences(keys(**changed), tokenizer, say, dataset=dataset, **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
