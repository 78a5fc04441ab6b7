"""The contract with TRL: every symbol, field and behaviour of it that llmrl leans on."""

import dataclasses

import pytest
from datasets import Dataset
from support.models import make_tiny_model
from support.words import word_tokenizer
from transformers import PrinterCallback, ProgressCallback

from llmrl.rewards.model import load_reward_model
from llmrl.trainers.reward import RewardConfig
from llmrl.trainers.sft import SFTConfig
from llmrl.trainers.with_trl import bridge as trl_bridge

BASE = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


def arguments(tmp_path, config_type=SFTConfig) -> dict:
    config = config_type(**BASE, learning_rate=1e-3, max_steps=3, warmup_ratio=0.25)
    return trl_bridge.training_arguments(config, str(tmp_path / "scratch"), "no", 2, 3)


@pytest.mark.parametrize(("trl_name", "config_type"), [("SFTConfig", SFTConfig), ("RewardConfig", RewardConfig)])
def test_every_argument_is_a_field_of_trl_and_keeps_its_value(tmp_path, trl_name, config_type):
    import trl

    given = arguments(tmp_path, config_type)
    fields = {field.name for field in dataclasses.fields(getattr(trl, trl_name))}
    own = {
        "SFTConfig": {"max_length", "truncation_mode", "assistant_only_loss", "packing"},
        "RewardConfig": {"max_length", "center_rewards_coefficient"},
    }
    assert set(given) | own[trl_name] <= fields
    built = getattr(trl, trl_name)(**given)
    converted = ("lr_scheduler_type", "save_strategy", "eval_strategy", "report_to")
    plain = {name: value for name, value in given.items() if name not in converted}
    assert {name: getattr(built, name) for name in plain} == plain
    assert built.report_to == []
    assert built.get_warmup_steps(4) == 1
    assert built.gradient_checkpointing is False


def test_sft_learns_the_completion_and_its_end_alone(tmp_path):
    tokenizer = word_tokenizer()
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "red cat"}]],
            "completion": [[{"role": "assistant", "content": "blue dog"}]],
        }
    )
    model = make_tiny_model(vocab_size=len(tokenizer))
    trainer = trl_bridge.sft_trainer(model, tokenizer, rows, rows, {**arguments(tmp_path), "max_length": 32})
    (row,) = trainer.train_dataset
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned).split() == ["blue", "dog", "<|end|>"]
    assert {"eval_loss", "eval_mean_token_accuracy"} <= set(trainer.evaluate())
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_sft_puts_the_end_token_behind_plain_text_once(tmp_path):
    tokenizer = word_tokenizer()
    rows = Dataset.from_dict({"prompt": ["red", "one"], "completion": [" cat", " dog <|end|>"]})
    model = make_tiny_model(vocab_size=len(tokenizer))
    trainer = trl_bridge.sft_trainer(model, tokenizer, rows, None, {**arguments(tmp_path), "max_length": 32})
    ends = [row["input_ids"].count(tokenizer.eos_token_id) for row in trainer.train_dataset]
    assert ends == [1, 1]


def test_rows_of_which_truncation_leaves_nothing_are_dropped_by_trl(tmp_path):
    tokenizer = word_tokenizer()
    rows = Dataset.from_dict({"prompt": ["red " * 20, "one"], "completion": [" cat", " dog"]})
    model = make_tiny_model(vocab_size=len(tokenizer))
    trainer = trl_bridge.sft_trainer(model, tokenizer, rows, None, {**arguments(tmp_path), "max_length": 8})
    assert len(trainer.train_dataset) == 1


def test_reward_trainer_takes_tokenised_pairs_as_they_are(tmp_path):
    tokenizer = word_tokenizer()
    make_tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    config = RewardConfig(**BASE, learning_rate=1e-3)
    import torch

    model = load_reward_model(str(tmp_path / "model"), config, torch.float32, lambda text: None)
    pairs = Dataset.from_dict({"chosen_ids": [[5, 6, 2], [7, 2]], "rejected_ids": [[8, 2], [9, 9, 9, 2]]})
    trainer = trl_bridge.reward_trainer(model, tokenizer, pairs, arguments(tmp_path, RewardConfig))
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(map(tuple, batch["input_ids"].tolist())) == [(5, 6, 2, 0), (7, 2, 0, 0), (8, 2, 0, 0), (9, 9, 9, 2)]
    assert batch["attention_mask"].sum() == 11


def test_nothing_is_printed_reported_or_sent(tmp_path):
    from huggingface_hub import constants

    tokenizer = word_tokenizer()
    rows = Dataset.from_dict({"text": ["red cat"]})
    trl_bridge.quieten()
    model = make_tiny_model(vocab_size=len(tokenizer))
    trainer = trl_bridge.sft_trainer(model, tokenizer, rows, None, arguments(tmp_path))
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not kinds & {PrinterCallback, ProgressCallback}
    assert constants.HF_HUB_DISABLE_TELEMETRY


def test_the_fingerprint_is_of_the_tokens_and_their_order():
    def of(lists):
        return trl_bridge.fingerprint(Dataset.from_dict({"input_ids": lists, "labels": lists}), ("input_ids", "labels"))

    assert of([[1, 2], [3]]) == of([[1, 2], [3]])
    assert len({of([[1, 2], [3]]), of([[3], [1, 2]]), of([[1], [2, 3]]), of([[1, 2, 3]])}) == 4


def test_evaluation_metrics_lose_prefix_and_timings():
    given = {"eval_loss": 1.0, "eval_runtime": 3.0, "eval_num_tokens": 7.0, "epoch": 0.5, "eval_entropy": 2.0}
    assert trl_bridge.evaluation_metrics(given) == {"loss": 1.0, "entropy": 2.0}
