"""What Direct Advantage is configured with. Loads without torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import Positive, SchedulerType
from llmrl.config.steps import AnswerStepKeys
from llmrl.trainers.online.config import SamplingConfig


class DirectAdvantageConfig(SamplingConfig, AnswerStepKeys):
    """Direct Advantage (not decoupled-clip DAPO): rounds of sampling, critic and actor."""

    method: Literal["direct_advantage"] = "direct_advantage"
    """The method that this file configures."""
    rounds: Positive = 1
    """Rounds of all stages, each from the actor that the one before has trained (the paper made 1 or 2)."""
    prompts_per_round: Annotated[int, Field(ge=2)] = 256
    """Prompts of a round, over all processes together."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 32
    """Answers to each prompt, of which kept_per_prompt are divided into steps (TRL: num_generations)."""
    kept_per_prompt: Positive = 6
    """Answers of a prompt whose states are looked at, as evenly right and wrong as they come, equal ones once."""
    max_states_per_response: Positive | None = None
    """States of one answer, evenly spread over its steps; null = the prompt and every step but the last."""
    completions_per_state: Annotated[int, Field(ge=2)] = 16
    """Completions from each state: the share of right ones is its success rate, their first steps are its actions."""
    success_threshold: float | None = None
    """An answer is right if its reward is at least this; null: rewards must be 0 or 1."""
    critic_epochs: Positive = 1
    """Passes over a round's states in which the critic is trained."""
    critic_states_per_step: Positive = 512
    """States in one optimizer step of the critic, over all processes together."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """AdamW's learning rate for the critic, a copy of the actor with a value head that begins at 0."""
    critic_value_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The value head's own; null = critic_learning_rate."""
    critic_validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of a round's prompts on whose states the critic is judged instead of trained."""
    min_spread: Annotated[float, Field(ge=0)] = 0.1
    """States whose largest and smallest advantage are nearer than this do not train the actor."""
    beta: Annotated[float, Field(gt=0)] = 0.02
    """A step's log-ratio to the round's first actor is to become advantage / beta (paper: 0.01 or 0.02)."""
    average: Literal["state", "action"] = "state"
    """What weighs alike in the actor's loss: states, whatever the number of their actions, or actions."""
    states_per_step: Positive = 128
    """States, each with all of its actions, in one optimizer step of the actor, over all processes together."""
    max_steps: Positive = 100
    """Optimizer steps of the actor, over all rounds together and as many in each."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate of AdamW for the actor (the paper's, for all weights of 7B)."""
    lr_scheduler_type: SchedulerType = "constant"
    """Shape of the learning rate over the steps of all rounds."""

    @property
    def prompts_at_once(self) -> int:
        """Those of a round."""
        return self.prompts_per_round

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of the actor in each round."""
        return self.max_steps // self.rounds

    @model_validator(mode="after")
    def _whole_rounds(self) -> Self:
        if self.max_steps % self.rounds:
            fewer = max(self.steps_per_round, 1) * self.rounds
            raise ValueError(
                f"max_steps {self.max_steps} cannot be shared evenly by {self.rounds} rounds: set it to {fewer} or "
                f"{(self.steps_per_round + 1) * self.rounds}"
            )
        if self.kept_per_prompt > self.samples_per_prompt:
            raise ValueError(
                f"kept_per_prompt {self.kept_per_prompt} of samples_per_prompt {self.samples_per_prompt} answers: keep "
                "fewer, or sample more"
            )
        return self

    @model_validator(mode="after")
    def _keys_without_meaning(self) -> Self:
        for key, meant, why in (
            ("num_train_epochs", 1.0, "how many states there are is only known when they were sampled; set max_steps"),
            ("max_staleness", 0, "a round's answers are all sampled before it trains"),
            ("max_empty_steps", 20, "a round that teaches nothing ends the run"),
            ("reference", "auto", "the reference's log-probabilities are written down at the start of each round"),
        ):
            if getattr(self, key) != meant:
                raise ValueError(f"{key} {getattr(self, key)} has no meaning with direct_advantage: {why}")
        if self.rollout.max_turns > 1:
            raise ValueError(
                f"rollout.max_turns {self.rollout.max_turns}: steps are those of one answer, so it must be 1"
            )
        return self
