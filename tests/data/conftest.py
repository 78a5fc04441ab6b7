"""Tokenizers of the kinds that people bring, trained on the spot: byte-level BPE, SentencePiece-like, with merges over
blanks, with and without BOS and a chat template."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WITH_NEWLINE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_NEWLINE = WITH_NEWLINE.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")


def corpus() -> list[str]:
    rows = (ROOT / "data/arithmetic/sft/train.jsonl").read_text().splitlines()[:400]
    texts = [m["content"] for row in map(json.loads, rows) for m in row["prompt"] + row["completion"]]
    return [
        *texts,
        "The quick brown fox jumps over the lazy dog. " * 20,
        "What is the answer? The answer is yes, or no.\n" * 20,
    ]


def byte_level(use_regex: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As in Llama 2: a blank is put before every text, blanks are U+2581, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n|\u2581?[^\u2581\n]+|\u2581"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def with_bos_and_eos(tokenizer: Tokenizer) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


def dressed(tokenizer: Tokenizer, eos: str, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "chat": dressed(byte_level(), "<|im_end|>", WITH_NEWLINE),
        "chat_without_newline": dressed(byte_level(), "<|im_end|>", WITHOUT_NEWLINE),
        "plain": dressed(byte_level(), "</s>", None),
        "bos": dressed(with_bos(byte_level()), "</s>", None),
        "bos_and_eos": dressed(with_bos_and_eos(byte_level()), "</s>", None),
        "sentencepiece": dressed(with_bos(sentencepiece_like()), "</s>", None),
        "sentencepiece_chat": dressed(sentencepiece_like(), "<|im_end|>", WITH_NEWLINE),
        "merging": dressed(byte_level(use_regex=False), "</s>", None),
        "merging_chat": dressed(byte_level(use_regex=False), "<|im_end|>", WITH_NEWLINE),
    }


@pytest.fixture(scope="session")
def chat(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["chat"]


@pytest.fixture(scope="session")
def plain(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["plain"]
