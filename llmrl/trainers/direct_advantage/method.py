"""Direct Advantage Policy Optimization: every step of an answer is pushed by what it does to the chance of success.

Liu et al., arXiv 2412.18279, Algorithm 1. The paper abbreviates it DAPO; decoupled-clip DAPO (arXiv 2503.14476), a
clipped policy gradient without a critic, is another method, here `method: loop` with `algorithm: dapo_clip`. The losses
are `llmrl.objectives.direct_advantage`, the stages of a round `rounds`; this file is the loop.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrl.trainers.direct_advantage.config import DirectAdvantageConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run

__all__ = ["Config", "DirectAdvantageConfig", "check", "describe", "train"]


Config = DirectAdvantageConfig


def describe(config: DirectAdvantageConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    from llmrl.errors import RefusedError
    from llmrl.trainers.online.command import reward_in_words

    for key in ("prompts_per_round", "states_per_step"):
        if getattr(config, key) < world_size:
            raise RefusedError(
                f"{key} {getattr(config, key)} over {world_size} processes leaves some without any; set it to at "
                f"least {world_size}"
            )
    prompts, kept, completions = config.prompts_per_round, config.kept_per_prompt, config.completions_per_state
    states = "x its steps" if config.max_states_per_response is None else f"x up to {config.max_states_per_response}"
    steps = config.step_function or f"end with {config.step_delimiter!r}"
    return {
        "method": "Direct Advantage, arXiv 2412.18279 (not decoupled-clip DAPO, arXiv 2503.14476)",
        "processes": world_size,
        "optimizer steps": f"{config.max_steps} of the actor: {config.rounds} rounds x {config.steps_per_round}",
        "answers per round": f"{prompts} prompts x {config.samples_per_prompt}; {prompts} x {kept} are divided",
        "steps of an answer": steps,
        "states per round": f"at most {prompts * kept} answers {states}, equal ones once",
        "completions per round": f"states x {completions}, each of up to {config.max_completion_length} tokens "
        "less those of the state's own steps",
        "critic": f"{config.critic_epochs} epochs of {config.critic_states_per_step} states a step, judged on "
        f"{config.critic_validation:.0%} of the prompts",
        "actions": f"kept where advantages are {config.min_spread:g} apart; targets advantage / {config.beta:g} nats",
        "states per step": f"{config.states_per_step}, about {config.states_per_step / world_size:g} a process",
        "reward": reward_in_words(config),
        "right": "reward 1" if config.success_threshold is None else f"reward of at least {config.success_threshold:g}",
        "micro-batches": f"of {config.tokens_per_microbatch} tokens; they never change the gradient",
    }


def check(config: DirectAdvantageConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.data.steps import segmenter
    from llmrl.trainers.online.run import check_sampling

    segmenter(config)
    return check_sampling(config)


def train(
    config: DirectAdvantageConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()
) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.objectives.direct_advantage import DirectAdvantage
    from llmrl.trainers.direct_advantage.critic import refuse_split
    from llmrl.trainers.direct_advantage.rounds import Rounds
    from llmrl.trainers.online.run import SampledRun

    refuse_split()
    objective = DirectAdvantage(config.beta, config.average).objective()
    with SampledRun(
        config, run, needs_reference=False, total_steps=config.max_steps, dataset=dataset, callbacks=callbacks
    ) as sampled:
        rounds = Rounds(config, sampled)
        for step in sampled.session.steps():
            states = rounds.states_of(step)  # at a round's first step all of A.1 to B.1
            metrics = sampled.learner.update(states, objective)
            sampled.policy_changed()
            sampled.session.record({**rounds.metrics, **metrics})
        sampled.session.finish()
