"""Reward models: the head, where it is read, padding, pairs."""

import math

import pytest
import torch
from peft import PeftModel
from support.models import make_tiny_model
from support.words import word_tokenizer
from transformers import AutoModelForSequenceClassification

from llmrl.errors import RefusedError
from llmrl.evaluation.reward_models import pair_metrics
from llmrl.rewards.model import load_reward_model, score, separate_padding
from llmrl.trainers.reward import RewardConfig

PAD = 0
SEQUENCES = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 2], [5, 2]]


def config(**settings) -> RewardConfig:
    return RewardConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **settings)


@pytest.fixture
def folder(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def load(folder: str, said: list[str] | None = None, **settings):
    torch.manual_seed(3)
    model = load_reward_model(folder, config(**settings), torch.float32, (said if said is not None else []).append)
    model.config.pad_token_id = PAD
    return model


def test_rewards_do_not_depend_on_padding_or_company(folder):
    model = load(folder).train()
    together = score(model, SEQUENCES, PAD, rows=3)
    assert model.training
    alone = torch.cat([score(model, [sequence], PAD) for sequence in SEQUENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert len(set(together.tolist())) == 4


def test_the_reward_is_read_at_the_end_token(folder):
    model = load(folder).eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([SEQUENCES[0]])).last_hidden_state[0, -1]
        expected = model.score(hidden)
    assert score(model, SEQUENCES[:1], PAD).item() == pytest.approx(expected.item(), abs=1e-5)


def test_pair_metrics(folder):
    model = load(folder)
    rewards = score(model, SEQUENCES, PAD).tolist()
    pairs = [
        {"chosen_ids": SEQUENCES[0], "rejected_ids": SEQUENCES[1]},
        {"chosen_ids": SEQUENCES[2], "rejected_ids": SEQUENCES[3]},
        {"chosen_ids": SEQUENCES[3], "rejected_ids": SEQUENCES[3]},
    ]
    found = pair_metrics(model, pairs, PAD)
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3], 0.0]
    assert found["margin"] == pytest.approx(sum(margins) / 3, abs=1e-5)
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, abs=1e-5)
    assert found["accuracy"] == pytest.approx((sum(m > 0 for m in margins) + 0.5) / 3)
    assert found["accuracy_interval_low"] < found["accuracy"] < found["accuracy_interval_high"]


def test_a_new_head_is_said_and_an_old_one_kept(folder, tmp_path):
    said: list[str] = []
    model = load(folder, said)
    assert said == [f"{folder} has no reward head: a new one is put on it"]
    model.save_pretrained(tmp_path / "trained")
    said.clear()
    again = load(str(tmp_path / "trained"), said)
    assert said == []
    assert torch.equal(again.score.weight, model.score.weight)


def test_with_an_adapter_the_head_is_trained_whole(folder):
    model = load(folder, use_peft=True, lora_r=4)
    assert isinstance(model, PeftModel)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name and "lora" not in name for name in trained)
    assert all("lora" in name or "score" in name for name in trained)
    with pytest.raises(RefusedError, match="lora_target_modules"):
        load(folder, use_peft=True, lora_target_modules=["no_such_module"])


def test_what_cannot_carry_a_head_is_refused(folder, tmp_path):
    with pytest.raises(RefusedError, match="no reward model can be made of"):
        load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedError, match="merge_adapter"):
        load(str(tmp_path))


def test_padding_is_kept_apart_from_the_end_token():
    said: list[str] = []
    tokenizer = word_tokenizer()
    separate_padding(tokenizer, said.append)
    assert tokenizer.pad_token == "<pad>"
    assert said == []
    tokenizer.pad_token = tokenizer.eos_token
    separate_padding(tokenizer, said.append)
    assert tokenizer.pad_token == "<unk>"
    assert len(said) == 1
    tokenizer.pad_token, tokenizer.unk_token = None, None
    separate_padding(tokenizer, said.append)
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)


def test_the_saved_model_loads_with_its_head(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(score(again, SEQUENCES, PAD), score(model, SEQUENCES, PAD))
