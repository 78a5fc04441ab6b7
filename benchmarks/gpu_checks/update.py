"""Whole updates of a model with LoRA: tokens a second and the peak of memory."""

import contextlib
from functools import partial
from typing import Any

import numpy as np
import torch

from gpu_checks.material import MINIATURE, QWEN_1_5B, learner_for, random_group, random_model, without_kernel
from gpu_checks.report import GPU, Report, measured
from llmrl.learner.sequences import Group
from llmrl.objectives.dpo import DPO
from llmrl.objectives.scored import Objective


def update_section(report: Report, small: bool) -> None:
    """Whole updates of a Qwen2.5-1.5B-shaped model with LoRA: DPO on pairs, and groups of 8 answers."""
    from peft import LoraConfig, get_peft_model

    draw, vocabulary = np.random.default_rng(0), (MINIATURE if small else QWEN_1_5B)["vocab_size"]
    prompt, answer, count = (24, 8, 2) if small else (512, 256, 1)
    pairs = [random_group(draw, vocabulary, prompt, [answer] * 2) for _ in range(24 * count)]
    eights = [random_group(draw, vocabulary, prompt, [answer] * 8) for _ in range(6 * count)]
    nll = Objective(lambda logprobs, scored: (-logprobs.sum() / scored.totals.tokens, {}))
    base = random_model("qwen2", torch.bfloat16 if GPU else torch.float32, **(MINIATURE if small else QWEN_1_5B))
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def updates(way: str, groups: list[Group], objective: Objective, spares: bool) -> dict[str, Any]:
        said: list[str] = []
        form = "padded" if way == "padded" else "tree"
        options = {"tokens_per_microbatch": 8192, "gradient_checkpointing": spares, "learning_rate": 1e-5}
        with without_kernel() if way == "dense" else contextlib.nullcontext():
            learner = learner_for(model, said, form=form, total_steps=10, **options)
            if learner.form != form:
                raise RuntimeError(f"got {learner.form}: {said}")
            metrics: dict[str, float] = {}

            def once() -> None:
                metrics.update(learner.update(groups, objective))

            found = measured(once, repeats=2, warm_ups=1)
        tokens = metrics["num_tokens"]
        return {
            "tokens_per_second": tokens / found["ms"] * 1e3,
            "tokens": tokens,
            "computed_tokens": metrics["num_computed_tokens"],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            **found,
        }

    dpo, policy_gradient = (pairs, DPO().objective()), (eights, nll)
    cases: list[tuple[Any, ...]] = [
        *((f"DPO pairs, {way}", way, *dpo, False) for way in ("tree", "dense", "padded")),
        *((f"groups of 8, {way}", way, *policy_gradient, False) for way in ("tree", "dense", "padded")),
        # Checkpointing cannot be switched off again: it comes last.
        *((f"groups of 8, {way}, checkpointed", way, *policy_gradient, True) for way in ("tree", "padded")),
    ]
    for name, *arguments in cases:
        report.case("update", name, partial(updates, *arguments))
