"""What to say about a key that does not exist: the nearest that does, or what replaces a name known elsewhere."""

import difflib
from collections.abc import Iterable

from pydantic import BaseModel

from llmrl.config.schema import all_paths

# Names that people bring along from other trainers, where the nearest spelling would mislead.
ELSEWHERE = {
    "env": "environment variables are not set from the file: set them in the shell, before the command",
    "datasets": "mixtures are not supported: write one file, and name it in dataset_name",
    "lr": "use learning_rate",
    "torch_dtype": "use dtype",
    "use_lora": "use use_peft; the lora_ keys say how large the adapter is",
    "bf16": "use mixed_precision: bf16",
    "fp16": "use mixed_precision: fp16",
    "tf32": "choose dtype or mixed_precision",
    "per_device_train_batch_size": "the batch is given per step by the method's own key (see --help); "
    "tokens_per_microbatch bounds the memory",
    "per_device_eval_batch_size": "tokens_per_microbatch bounds the memory of evaluation as well",
    "gradient_accumulation_steps": "tokens_per_microbatch splits a step as memory needs, with the same gradient",
    "warmup_steps": "use warmup_ratio, the share of all steps",
    "eval_strategy": "use eval_steps",
    "save_strategy": "use save_steps",
    "logging_strategy": "use logging_steps",
    "logging_dir": "trackers write below output_dir",
    "overwrite_output_dir": "name another output_dir, or remove the old one by hand",
    "padding_free": "sequences are always packed without padding",
    "packing": "sequences are always packed without padding",
    "max_prompt_length": "use max_length, prompt and completion together",
    "max_completion_length": "use max_length, prompt and completion together",
    "optim": "the optimizer is AdamW; see the adam_ keys",
}
# TRL's names of what the methods that sample have: the key here, which only they have, and what else is to be said.
SAMPLING = {
    "num_generations": ("samples_per_prompt", ""),
    "num_generations_eval": ("eval_samples", ""),
    "num_iterations": ("epochs_per_step", ""),
    "num_ppo_epochs": ("epochs_per_step", ""),
    "num_mini_batches": ("rollouts_per_update", ", the rollouts of one optimizer step"),
    "steps_per_generation": ("rollouts_per_update", ", the rollouts of one optimizer step"),
    "generation_batch_size": ("prompts_per_step", ", which is times samples_per_prompt"),
    "per_device_train_batch_size": (
        "prompts_per_step", ", over all processes, and rollouts_per_update; tokens_per_microbatch bounds the memory"
    ),
    "epsilon": ("clip_low", ""),
    "epsilon_high": ("clip_high", ""),
    "cliprange": ("clip_low", " and clip_high"),
    "cliprange_value": ("value_clip", ""),
    "vf_coef": ("value_coef", ""),
    "kl_coef": ("beta", ""),
    "loss_type": ("algorithm", ": grpo, dr_grpo, gspo, cispo, dapo_clip (TRL's dapo), ..."),
    "importance_sampling_level": ("algorithm", ": gspo has one ratio a sequence, loop_trajectory one a rollout"),
    "scale_rewards": ("algorithm", ": grpo divides by the group's deviation; dr_grpo, rloo and loop do not"),
    "reward_funcs": ("rewards", ""),
    "reward_weights": ("rewards", ": each entry has a weight"),
    "reward_model_path": ("rewards", ": a folder or a hub id is a reward model"),
    "environment_factory": ("environment", ""),
    "max_prompt_length": (
        "max_length", ", prompt and completions together; overlong_prompts says what becomes of a row without room"
    ),
    "response_length": ("max_completion_length", ""),
    "top_p": ("temperature", ": training needs samples of the whole distribution"),
    "top_k": ("temperature", ": training needs samples of the whole distribution"),
    "min_p": ("temperature", ": training needs samples of the whole distribution"),
    "use_vllm": ("engine.kind", ": vllm, or vllm_server"),
    "vllm_mode": ("engine.kind", ": vllm (TRL's colocate), or vllm_server"),
    "vllm_server_base_url": ("engine.urls", ""),
    "vllm_server_host": ("engine.urls", ""),
    "vllm_server_port": ("engine.urls", ""),
    "vllm_gpu_memory_utilization": ("engine.gpu_memory_utilization", ""),
    "vllm_enable_sleep_mode": ("engine.sleep", ""),
    "vllm_importance_sampling_correction": ("correction", ""),
    "vllm_importance_sampling_cap": ("correction_cap", ""),
    "log_completions": ("save_rollouts", "; rollouts/step_N.jsonl has them"),
}  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where there are none at all."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)), None)


def unknown_key(root: type[BaseModel], model: type[BaseModel], path: tuple[str, ...], origin: str) -> str:
    """One sentence for a key that `model`, found on the way down `path` from `root`, does not have."""
    name = ".".join(path)
    where = f" ({origin})" if origin else ""
    if len(path) == 1 and (remedy := _replacement(root, name)):
        return f"unknown key `{name}`{where}: {remedy}"
    return f"unknown key `{name}`{where}; did you mean `{_suggestion(root, model, path)}`?"


def _replacement(root: type[BaseModel], name: str) -> str | None:
    """What stands for another trainer's name in this configuration, if that is known and the configuration has it."""
    key, more = SAMPLING.get(name, ("", ""))
    if tuple(key.split(".")) in all_paths(root):
        return f"use {key}{more}"
    return ELSEWHERE.get(name)


def _suggestion(root: type[BaseModel], model: type[BaseModel], path: tuple[str, ...]) -> str:
    siblings = list(model.model_fields)
    close = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.75)
    if close:
        return ".".join((*path[:-1], close[0]))
    # The right key in the wrong place is likelier than a far spelling in the right place.
    elsewhere = [".".join(p) for p in all_paths(root) if p[-1] == path[-1] and p != path]
    return elsewhere[0] if elsewhere else ".".join((*path[:-1], nearest(path[-1], siblings) or "--help"))
