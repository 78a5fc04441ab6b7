"""Sampling with the Hugging Face engine and with `model.generate`."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gpu_checks.material import MINIATURE, QWEN_0_5B, random_model
from gpu_checks.report import DEVICE, GPU, Report, synchronize
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams


def generate_section(report: Report, small: bool) -> None:
    """Sampling from a Qwen2.5-0.5B-shaped model: the engine twice, and model.generate."""
    draw, shape = np.random.default_rng(0), MINIATURE if small else QWEN_0_5B
    count, new = (4, 8) if small else (64, 128)
    prompts = [draw.integers(3, shape["vocab_size"], draw.integers(new, 2 * new)).tolist() for _ in range(count)]
    model = random_model("qwen2", torch.bfloat16 if GPU else torch.float32, **shape).eval()
    engine = HuggingFaceEngine(model, SimpleNamespace(eos_token_id=2))
    outputs: list[list[list[int]]] = []

    def ours() -> dict[str, Any]:
        synchronize()
        begin = time.perf_counter()
        found = engine.generate(prompts, SamplingParams(max_tokens=new, temperature=1.0, seed=1))
        seconds = time.perf_counter() - begin
        outputs.append([one.token_ids for samples in found for one in samples])
        tokens = sum(map(len, outputs[-1]))
        same = sum(a == b for a, b in zip(outputs[0], outputs[-1], strict=True)) / count
        return {"tokens": tokens, "tokens_per_second": tokens / seconds, "same_as_first": same}

    def theirs() -> dict[str, Any]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        synchronize()
        begin = time.perf_counter()
        found = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new
        )
        synchronize()
        tokens = (found.shape[1] - width) * count
        return {"tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - begin)}

    report.case("generate", "engine", ours)
    report.case("generate", "engine, the same again", ours)
    report.case("generate", "model.generate", theirs)
