"""A reward model as a reward function: whole dialogues, tokenised as reward models are trained here, scored in batches.

It runs in the trainer's process, on the trainer's device.
"""

import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, validate_call
from transformers import AutoConfig, AutoTokenizer

from llmrl.config import ModelKeys
from llmrl.data.faults import RowFault
from llmrl.data.tokenization import Encoded, Encoder, check_chat_template
from llmrl.errors import RefusedError
from llmrl.rewards.batches import Batches
from llmrl.rewards.functions import RewardFunction, Rewards
from llmrl.rewards.model import load_reward_model, score, separate_padding

Say = Callable[[str], None]
WAIT_SECONDS = 0.02


def reward_model(path: str, options: dict[str, Any], say: Say) -> RewardFunction:
    """The reward of a sequence classifier with one output, a hub id or folder.

    Raises RefusedError for a model without a trained head of one output, and for options that it does not take.
    """
    try:
        return validate_call(_reward_model)(path, say, **options)
    except ValidationError as error:
        mistakes = "; ".join(f"option `{d['loc'][0]}`: {d['msg']}, got {d['input']!r}" for d in error.errors())
        known = "dtype, batch_size, max_length, wait_seconds and sigmoid"
        raise RefusedError(f"rewards: {path}: {mistakes}. It takes {known}") from None


def _reward_model(
    path: str,
    say: Say,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: Annotated[int, Field(ge=1)] = 16,
    max_length: Annotated[int, Field(ge=2)] | None = None,
    wait_seconds: Annotated[float, Field(ge=0, le=10)] | None = None,
    sigmoid: bool = False,
) -> RewardFunction:
    """`max_length`: longer sequences have no score; the model's own limit when not given. `dtype` auto: bfloat16 on a
    GPU, float32 on a CPU. `wait_seconds`: how long calls wait for one another to fill a batch; 0: each has batches of
    its own, so that a run repeats to the last bit. When not given, 0.02 on a GPU and 0 on a CPU. `sigmoid`: a
    score s becomes 1 / (1 + exp(-s)), which lies in [0, 1]."""
    limit = _checked(path)
    gpu = torch.cuda.is_available()
    held = {"auto": torch.bfloat16 if gpu else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    model = load_reward_model(path, ModelKeys(model_name_or_path=path), held[dtype], say)
    model.requires_grad_(False).to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RefusedError(f"rewards: the tokenizer of {path} cannot be loaded: {error}") from error
    separate_padding(tokenizer, say)
    model.config.pad_token_id = tokenizer.pad_token_id
    encoder = Encoder(tokenizer)
    longest = min(length for length in (limit, max_length) if length) if limit or max_length else None

    def sequences(prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[int] | None]:
        found = [sequence_of(encoder, p, c) for p, c in zip(prompts, completions, strict=True)]
        return [ids if ids and (longest is None or len(ids) <= longest) else None for ids in found]

    def scores(sequences: list[list[int]]) -> list[float]:
        found = score(model, sequences, tokenizer.pad_token_id, batch_size)
        return (found.sigmoid() if sigmoid else found).tolist()

    usual = WAIT_SECONDS if gpu else 0.0
    batches = Batches(sequences, scores, batch_size, usual if wait_seconds is None else wait_seconds)

    async def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> Rewards:
        return await batches.scores(prompts, completions)

    return RewardFunction(reward, bounded=True, is_model=True, is_logit=not sigmoid)


def sequence_of(encoder: Encoder, prompt: Any, completion: Any) -> list[int] | None:
    """Token ids of prompt and completion, as a reward model of ours has seen them in training: dialogues by its chat
    template up to the end token of the last turn, plain text with EOS. None where the template refuses the dialogue or
    its last message is not the assistant's. Raises RefusedError for dialogues and a tokenizer without a template."""
    if isinstance(completion, str) and isinstance(prompt, str):
        return _joined(encoder.plain([prompt], [[completion]])[0][0])
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    if not messages or messages[-1].get("role") != "assistant":
        return None
    check_chat_template(encoder.tokenizer, "the reward model's input")
    rendered = encoder.rendered([before + messages[:-1]], [[messages[-1:]]], [{}])[0]
    return None if isinstance(rendered, RowFault) else _joined(rendered[0])


def _joined(encoded: Encoded) -> list[int]:
    return encoded.prompt_ids + encoded.completion_ids


def _checked(path: str) -> int | None:
    """The model's limit of positions, if it names one; refuses what is no reward model."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RefusedError(
            f"rewards: {path} is no built-in function and no model that can be loaded: {reason}"
        ) from error
    if "SequenceClassification" not in "".join(config.architectures or ()) or config.num_labels != 1:
        raise RefusedError(
            f"rewards: {path} is no reward model (a sequence classifier with one output): its architecture is "
            f"{', '.join(config.architectures or ['unknown'])} with {config.num_labels} outputs. Train one with "
            "recipes/reward, or name another"
        )
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
