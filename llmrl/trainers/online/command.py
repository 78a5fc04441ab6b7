"""What `--dry-run` and `llmrl check` say of a method that samples, from its configuration. Loads without torch."""

from llmrl.errors import RefusedError
from llmrl.trainers.online.config import SamplingConfig, SteppedConfig


def check(config: SamplingConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.online.run import check_sampling

    return check_sampling(config)


def describe_sampling(config: SteppedConfig, world_size: int, updates: int) -> dict[str, str | int | float]:
    """The batch arithmetic of a step's rollouts. `updates`: optimizer steps of a step, at most."""
    if config.prompts_per_step < world_size:
        raise RefusedError(
            f"prompts_per_step {config.prompts_per_step} over {world_size} processes leaves some without a prompt; "
            f"set it to at least {world_size}"
        )
    rollouts = config.prompts_per_step * config.samples_per_prompt
    steps = (
        str(config.max_steps)
        if config.max_steps > 0
        else f"{config.num_train_epochs:g} x prompts / {config.prompts_per_step}, rounded up"
    )
    return {
        "processes": world_size,
        "steps": f"{steps}, each of a rollout phase and up to {updates} optimizer steps",
        "prompts per step": f"{config.prompts_per_step}, about {config.prompts_per_step / world_size:g} a process",
        "rollouts per step": f"{config.prompts_per_step} prompts x {config.samples_per_prompt} samples = {rollouts}",
        "sampled tokens per step": f"at most {rollouts * config.rollout.max_turns * config.max_completion_length:,}",
        "micro-batches": f"of {config.tokens_per_microbatch} tokens; they never change the gradient",
    }


def reward_in_words(config: SamplingConfig) -> str:
    """The sum that is asked of the policy, before a method makes anything else of it."""
    parts = []
    if config.environment != "question_answer":
        parts.append(f"{config.environment_weight:g} the environment's own")
    for entry in config.reward_keys().rewards:
        options = [f"{name} {value}" for name, value in entry.options.items()]
        more = ", ".join([*([entry.function] if entry.label != entry.function else []), *options])
        parts.append(f"{entry.weight:g} {entry.label}{f' ({more})' if more else ''}")
    return " + ".join(parts) + ("" if config.reward_clip is None else f", held within +-{config.reward_clip:g}")
