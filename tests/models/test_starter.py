"""The starter: its tokenizer, where its data is found, and what it can do (slow: it is trained if it is not cached)."""

import json
from pathlib import Path

import pytest

from llmrl.errors import RefusedError
from llmrl.models import starter as build_starter
from llmrl.models.cache import SOURCE_FILE, is_whole
from llmrl.models.starter import CHAT_TEMPLATE, TEXT, VOCABULARY, _data_folder, _fingerprint, build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is 55 + 99? End with the answer."}]
ANSWER = [{"role": "assistant", "content": "50 + 90 = 140\n5 + 9 = 14\n140 + 14 = 154\nAnswer: 154"}]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(ROOT / "data" / "arithmetic" / TEXT)


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "text", ["1234567890", "a  12", "Grüße, 日本 🎉\n\t", "<|im_start|>", " leading and trailing "]
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("140 + 14 = 154\nAnswer: 154")["input_ids"])
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("14014154154")
    assert len(tokens) == 14


def test_a_prompt_is_the_beginning_of_the_dialogue(tokenizer):
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(QUESTION + ANSWER, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :].index(tokenizer.eos_token_id) == len(whole) - len(prompt) - 2
    assert len(whole) < 60


def test_the_data_is_found_from_anywhere_and_its_absence_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert _data_folder() == ROOT / "data" / "arithmetic"
    monkeypatch.setattr("llmrl.__file__", str(tmp_path / "site-packages" / "llmrl" / "__init__.py"))
    with pytest.raises(RefusedError, match=r"data/arithmetic.*checkout"):
        _data_folder()
    (tmp_path / "data" / "arithmetic" / TEXT.parent).mkdir(parents=True)
    (tmp_path / "data" / "arithmetic" / TEXT).write_text("{}")
    assert _data_folder() == tmp_path / "data" / "arithmetic"


def test_other_data_makes_another_starter(tmp_path):
    (tmp_path / TEXT).parent.mkdir()
    file = tmp_path / TEXT
    names = set()
    for text in ("a", "b"):
        file.write_text(text)
        names.add(_fingerprint(tmp_path))
    assert len(names) == 2


@pytest.mark.slow
def test_the_starter_is_half_right():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrl.rollout.huggingface import HuggingFaceEngine
    from llmrl.rollout.protocol import SamplingParams

    folder = build_starter(print)
    assert is_whole(folder)
    # Every method must have room to improve it, and something to start from.
    assert 0.3 <= json.loads((folder / SOURCE_FILE).read_text())["accuracy"] <= 0.8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 3_000_000
    engine = HuggingFaceEngine(model, tokenizer)
    assert engine.stop_token_ids(SamplingParams(1)) == {tokenizer.eos_token_id}
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    ((completion,),) = engine.generate([prompt], SamplingParams(64, temperature=0))
    assert completion.finish_reason == "stop"
    assert "\nAnswer: " in tokenizer.decode(completion.token_ids)
