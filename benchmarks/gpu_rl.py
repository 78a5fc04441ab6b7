"""One step of LOOP on a GPU, by phase: rollout with the Hugging Face engine, scoring, update.

    python benchmarks/gpu_rl.py [--out FOLDER] [--small]

The model has Qwen2.5-1.5B's shape and random weights in bfloat16 with a LoRA adapter; 16 prompts of 512 tokens, 8
samples each of at most 256. Prints one JSON object a step, with the seconds of its phases. `--small` tries it on
a CPU.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sharding import build_accelerator
from llmrl.objectives.presets import preset
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import Completion, SamplingParams
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn
from llmrl.trainers.online.experience import Experience

SHAPE: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **SHAPE, "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


class Tokenizer:
    """What the engine asks of a tokenizer; a random model never says this token for long."""

    eos_token_id = 0


def groups_of(prompts: list[list[int]], found: list[list[Completion]]) -> list[RolloutGroup]:
    """Samples as rollouts, every other one rewarded."""
    groups = []
    for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True)):
        rollouts = []
        for s, sample in enumerate(samples):
            end = len(prompt) + len(sample.token_ids)
            turn = Turn(0, len(prompt), end, sample.logprobs, sample.finish_reason, 0)
            row = Rollout(
                row=number + 1, sample=s, seed=0, pieces=[prompt + sample.token_ids], turns=[turn], messages=[],
                opening=0, end_state="completed", reward=s % 2,
            )  # fmt: skip
            rollouts.append(row)
        groups.append(RolloutGroup(number + 1, {}, rollouts))
    return groups


@dataclass
class Setting:
    """What a step needs."""

    learner: Learner
    engine: HuggingFaceEngine
    prompts: list[list[int]]
    longest: int
    """Tokens of a sample."""


class Phases:
    """Seconds of the phases of a step, one after the other; a GPU has done its work when a phase ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def ended(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self._began = now - self._began, now


def setting(small: bool) -> Setting:
    shape, device = (SMALL, "cpu") if small else (SHAPE, "cuda")
    count, prompt_length, longest = (4, 40, 12) if small else (16, 512, 256)
    torch.manual_seed(0)
    with torch.device(device):
        base = Qwen2ForCausalLM(Qwen2Config(**shape, dtype=torch.bfloat16)).to(torch.bfloat16)
    lm = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    options = LearnerOptions(learning_rate=1e-5, tokens_per_microbatch=16_384, gradient_checkpointing=True)
    learner = Learner(lm, options, build_accelerator("no" if small else "bf16"))
    engine = HuggingFaceEngine(learner.causal_lm, Tokenizer(), max_rows=128, max_cache_tokens=131_072)  # type: ignore[arg-type]
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, shape["vocab_size"], prompt_length).tolist() for _ in range(count)]
    return Setting(learner, engine, prompts, longest)


def step(given: Setting, number: int) -> dict[str, Any]:
    """One step of GRPO without a reference, and what is worth telling of it."""
    phases, algorithm = Phases(), preset("grpo")
    with given.learner.accelerator.autocast():
        found = given.engine.generate(given.prompts, SamplingParams(given.longest, n=8, seed=number))
    phases.ended("rollout")
    experience = Experience(groups_of(given.prompts, found))
    experience.score(given.learner, old=True, reference=False, values=False)
    phases.ended("score")
    experience.assign_advantages(algorithm)
    objective = algorithm.policy_gradient(beta=0.0).objective()
    metrics = experience.train(
        given.learner, objective, epochs=1, rollouts_per_update=None, seed=number, skip_idle=True
    )
    phases.ended("update")
    sampled = sum(len(c.token_ids) for samples in found for c in samples)
    return {
        "sampled_tokens": sampled,
        "sampled_tokens_per_second": sampled / phases.seconds["rollout"],
        "update_tokens_per_second": metrics["num_trained_tokens"] / phases.seconds["update"],
        "computed_share": metrics["num_computed_tokens"] / metrics["num_trained_tokens"],
        "logp_difference_mean": metrics["sampling/sampling_logp_difference/mean"],
        "logp_difference_max": metrics["sampling/sampling_logp_difference/max"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        **{f"{phase}_seconds": seconds for phase, seconds in phases.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.small else torch.cuda.get_device_name()
    given = setting(arguments.small)
    for number in range(1 if arguments.small else 3):
        facts = {"step": number + 1, "device": device, **step(given, number)}
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()})
        print(line, flush=True)
        if arguments.out:
            with open(arguments.out / "gpu_rl.jsonl", "a", encoding="utf-8") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
