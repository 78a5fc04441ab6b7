"""Tokenizer and model from a hub id or a folder, in the right precision, with or without a LoRA adapter.

No code that comes with a model is ever run (`trust_remote_code` stays off) and weights are read from safetensors only.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from llmrl.config import ModelKeys
from llmrl.errors import RefusedError

Say = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_FILE = "adapter_config.json"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises RefusedError if it cannot be loaded or has no end-of-sequence token."""
    tokenizer = _loaded(path, "tokenizer", lambda: AutoTokenizer.from_pretrained(path))
    if tokenizer.eos_token_id is None:
        raise RefusedError(
            f"the tokenizer of {path} has no end-of-sequence token, so a completion could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_config(path: str) -> Any:
    """The model's transformers configuration, without its weights (of its base, where `path` is an adapter)."""
    return _loaded(path, "model configuration", lambda: AutoConfig.from_pretrained(base_of(path)))


def max_positions(path: str) -> int | None:
    """The longest sequence that the model can take, in tokens; None where its configuration names no limit."""
    return getattr(load_config(path).get_text_config(), "max_position_embeddings", None)


def stop_token_ids(path: str) -> set[int]:
    """Where generation stops beside the tokenizer's end-of-sequence token: at the end of Gemma's turns, say."""
    try:
        configured = GenerationConfig.from_pretrained(base_of(path)).eos_token_id
    except OSError:  # a model need not have one
        return set()
    return set(configured if isinstance(configured, list) else [configured]) - {None}


def precision(keys: ModelKeys, mixed_precision: str, say: Say) -> tuple[torch.dtype, str]:
    """(dtype of the weights, accelerate's mixed_precision) after resolving `auto`.

    CPU: float32, no mixing. GPU: bfloat16 base under a LoRA adapter; float32 weights with bf16 products otherwise.
    """
    on_gpu = torch.cuda.is_available()
    dtype = DTYPES.get(keys.dtype) or (torch.bfloat16 if on_gpu and keys.use_peft else torch.float32)
    if mixed_precision == "auto":
        mixed_precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() and dtype != torch.float16 else "no"
    if not on_gpu and mixed_precision == "fp16":
        raise RefusedError("mixed_precision fp16 needs a GPU, and none is here; use no (or bf16)")
    if not on_gpu and (dtype != torch.float32 or mixed_precision != "no"):
        say("Half precision on a CPU is many times slower than float32; use dtype: float32 and mixed_precision: no.")
    return dtype, mixed_precision


def load_model(path: str, keys: ModelKeys, dtype: torch.dtype, say: Say) -> PreTrainedModel | PeftModel:
    """The causal language model, ready to be trained: all of it, or a new LoRA adapter on it (`use_peft`).

    Where `path` is an adapter it is merged into its base first, so that the reference is the adapted model. A new
    adapter on it is refused: what PEFT saves of the new one names the base alone.
    """
    _refuse_second_adapter(path, keys)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = _loaded(
        path,
        "model",
        lambda: AutoModelForCausalLM.from_pretrained(
            base_of(path), dtype=dtype, use_safetensors=True, **_attention(keys)
        ),
    )
    if not keys.use_peft and (unused := _lora_keys_given(keys)):
        say(f"use_peft is false: all weights are trained, and {', '.join(unused)} has no effect.")
    if is_adapter(path):
        say(f"{path} is an adapter: it is merged into its base before training.")
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return add_lora(model, keys) if keys.use_peft else model


def load_adapted(path: str, keys: ModelKeys, dtype: torch.dtype, say: Say) -> PeftModel:
    """The adapter in `path` on its base, not merged into it: with the adapter off it is its own reference."""
    base = load_model(base_of(path), keys, dtype, say)
    adapted: PeftModel = _loaded(path, "adapter", lambda: PeftModel.from_pretrained(base, path))
    return adapted


def model_without_storage(path: str, keys: ModelKeys) -> PreTrainedModel | PeftModel:
    """As `load_model`, but on the meta device: its parameters can be counted, and no weights are read."""
    _refuse_second_adapter(path, keys)
    description = load_config(path)
    with torch.device("meta"):
        model = _loaded(path, "model", lambda: AutoModelForCausalLM.from_config(description, **_attention(keys)))
        return add_lora(model, keys) if keys.use_peft else model


def _attention(keys: ModelKeys) -> dict[str, str]:
    return {} if keys.attn_implementation == "auto" else {"attn_implementation": keys.attn_implementation}


def add_lora(model: PreTrainedModel, keys: ModelKeys) -> PeftModel:
    """A fresh LoRA adapter (float32, initially without effect). Refuses module names that are not in the model."""
    modules = keys.lora_target_modules
    output = _output_name(model)
    if not isinstance(modules, str) and output in modules:
        raise RefusedError(
            f"lora_target_modules names the output layer {output}, which is computed in chunks "
            "and takes no adapter; leave it out"
        )
    config = LoraConfig(
        r=keys.lora_r,
        lora_alpha=keys.lora_alpha,
        lora_dropout=keys.lora_dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RefusedError(f"lora_target_modules {modules!r} does not fit {type(model).__name__}: {error}") from None


def _refuse_second_adapter(path: str, keys: ModelKeys) -> None:
    if keys.use_peft and is_adapter(path):
        raise RefusedError(
            f"model_name_or_path: {path} is an adapter, and with use_peft a new one would be trained on top of it. "
            f"What is saved of that names {base_of(path)} as its model, without the first. Remedy: merge the first "
            "into it and name that folder (README.md, Train longer), or train all weights with use_peft false"
        )


def _lora_keys_given(keys: ModelKeys) -> list[str]:
    fields = ModelKeys.model_fields
    return [name for name in fields if name.startswith("lora_") and getattr(keys, name) != fields[name].default]


def _output_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next((name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head), "lm_head")


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return (Path(path) / ADAPTER_FILE).exists()


def base_of(path: str) -> str:
    """The model to load: `path` itself, or the base that an adapter in `path` names."""
    if not is_adapter(path):
        return path
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(path).base_model_name_or_path)


def _loaded(path: str, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        missing = "" if Path(path).exists() else "; there is no such folder here, so it was taken for a hub id"
        raise RefusedError(f"model_name_or_path: the {what} of {path} cannot be loaded: {reason}{missing}") from error
