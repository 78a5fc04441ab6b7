"""Reward models: a transformer with one number on top, read at the last token of a sequence."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llmrl.config import ModelKeys
from llmrl.errors import RefusedError

Say = Callable[[str], None]


def load_reward_model(path: str, keys: ModelKeys, dtype: torch.dtype, say: Say) -> PreTrainedModel | PeftModel:
    """The model with a reward head: its own if it has one, else a new one, drawn from torch's random state.

    With `use_peft` the head is trained whole beside the adapter. Raises `RefusedError` for an adapter, for an
    architecture that cannot carry the head, and for module names that are not in the model.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise RefusedError(
            f"model_name_or_path: {path} is an adapter, on which no reward head can be put. "
            "Remedy: train it again with merge_adapter: true and name the merged model."
        )
    attention = {} if keys.attn_implementation == "auto" else {"attn_implementation": keys.attn_implementation}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is said below
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=dtype, use_safetensors=True, **attention
        )
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RefusedError(f"model_name_or_path: no reward model can be made of {path}: {reason}") from error
    finally:
        logging.set_verbosity(level)
    if "SequenceClassification" not in "".join(model.config.architectures or ()):
        say(f"{path} has no reward head: a new one is put on it")
    return _with_adapter(model, keys) if keys.use_peft else model


def _with_adapter(model: PreTrainedModel, keys: ModelKeys) -> PeftModel:
    config = LoraConfig(
        r=keys.lora_r,
        lora_alpha=keys.lora_alpha,
        lora_dropout=keys.lora_dropout,
        target_modules=keys.lora_target_modules,
        task_type="SEQ_CLS",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RefusedError(
            f"lora_target_modules {keys.lora_target_modules!r} does not fit {type(model).__name__}: {error}"
        ) from None


def separate_padding(tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
    """Give the tokenizer a padding token that is not its end token.

    The reward is read at the last token that is no padding: where the two are one, it would be read before the end,
    and a finished answer would look like one that was cut off.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    spare = [token for token in (tokenizer.unk_token, "<|endoftext|>", "<|end_of_text|>", "<pad>") if token]
    known = [token for token in spare if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
    if known:
        tokenizer.pad_token = known[0]
        say(f"padding is {known[0]}, so that the reward is read at the end token {tokenizer.eos_token}")
    else:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"the end token {tokenizer.eos_token} is the padding too: the reward is read at the token before it")


def score(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    rows: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Rewards [len(sequences)], float32 on the CPU, of whole token sequences, `rows` at a time, those of like length
    together. The model's training mode is afterwards what it was. `progress` hears how many are done, of how many."""
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    rewards = torch.zeros(len(sequences))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            ids, mask = _padded([sequences[i] for i in part], pad_token_id, device)
            with torch.no_grad():
                rewards[part] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()
            progress(start + len(part), len(order))
    finally:
        model.train(training)
    return rewards


def _padded(sequences: list[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [rows, longest], padded on the right."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
