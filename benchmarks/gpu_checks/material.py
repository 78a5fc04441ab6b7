"""What the checks work on: random prompts and answers, models from a seed, learners."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_checks.report import DEVICE, GPU, patched
from llmrl.learner import block_attention
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import Group, completion

QWEN_1_5B = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
QWEN_0_5B = QWEN_1_5B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
MINIATURE = {
    "vocab_size": 503,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_group(draw: np.random.Generator, vocabulary: int, prompt: int, answers: list[int]) -> Group:
    """`answers`: how many tokens each completion has."""
    ids = draw.integers(3, vocabulary, prompt)
    return tuple(completion(ids, draw.integers(3, vocabulary, n)) for n in answers)


def branching_groups(draw: np.random.Generator, vocabulary: int, scale: int) -> list[Group]:
    """Two prompts whose completions branch once more; about 12 x scale tokens."""
    groups = []
    for _ in range(2):
        prompt, middle = draw.integers(3, vocabulary, 3 * scale), draw.integers(3, vocabulary, scale)
        tails = [draw.integers(3, vocabulary, n) for n in (scale // 2, scale // 3, scale, scale // 4)]
        groups.append(
            tuple(
                completion(prompt, np.concatenate([m, t]))
                for m, t in zip((middle, middle, middle[:0], middle[:0]), tails, strict=True)
            )
        )
    return groups


def random_model(kind: str, dtype: torch.dtype, scale: float = 1.0, **shape: Any) -> Any:
    """On the device, from a seed; weights times `scale`, so that a wrong mask shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def learner_for(model: Any, said: list[str], **options: Any) -> Learner:
    return Learner(model, LearnerOptions(**options), Accelerator(cpu=not GPU), said.append)


def without_kernel() -> Any:
    """Trees get the dense mask."""
    return patched(block_attention, _works=lambda kind: False)
