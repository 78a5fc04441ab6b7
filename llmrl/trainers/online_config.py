"""What every online method is configured with, and the arithmetic of its batches. Loads without torch."""

import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llmrl.config import Housekeeping, ModelKeys, OptimizationKeys, RunKeys, TaskEvaluationKeys
from llmrl.config.online import OnlineKeys, PolicyGradientKeys
from llmrl.errors import RefusedError
from llmrl.objectives.presets import Place, Preset, preset
from llmrl.objectives.settings import LossSettings
from llmrl.rewards.keys import RewardFunctionKeys, RewardKeys


class OnlineConfig(ModelKeys, OnlineKeys, RewardKeys, OptimizationKeys, PolicyGradientKeys, RunKeys):
    """Keys of the methods that learn from their own rollouts."""

    rewards: list[RewardFunctionKeys] = Field(default_factory=list)
    """Reward functions, each a name or a section (function, weight, name, options); the reward is their weighted sum
    and that of the environment's own rewards. Empty: the environment's own alone."""
    task_evaluation: Annotated[TaskEvaluationKeys | None, Housekeeping()] = None
    """Greedy accuracy on further problems with known answers, beside the held-out rows."""

    @model_validator(mode="after")
    def _rewarded(self) -> Self:
        if self.environment == "question_answer" and not self.reward_keys().rewards:
            raise ValueError(
                "environment question_answer has no rewards of its own: name reward functions in `rewards`"
            )
        return self

    def num_steps(self, num_prompts: int) -> int:
        """Steps of the method: max_steps, or as many as the epochs need."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * num_prompts / self.prompts_per_step)

    def reward_keys(self) -> RewardKeys:
        """What the reward functions are built from."""
        return self

    @property
    def algorithm_name(self) -> str:
        """The preset that the method, or its key `algorithm`, names."""
        raise NotImplementedError

    @property
    def published(self) -> Preset:
        """The algorithm without any key of the configuration."""
        return preset(self.algorithm_name)

    @property
    def trained_per_prompt(self) -> int:
        """Rollouts of a prompt that are trained on."""
        return self.samples_per_prompt

    def resolve(self) -> Preset:
        """The algorithm in force: the published one, what is configured over it, and the constants of its batches.

        Nowhere else do keys become an algorithm. Raises ValueError for keys that it would ignore.
        """
        algorithm = replace(self.published, **self.algorithm_keys())
        settings = self.settings_of(algorithm, **self.loss_keys())
        given = [name for name in ("clip_low", "clip_high") if getattr(self, name) is not None]
        if given and settings.clip == "none":
            raise ValueError(f"{given[0]} would be ignored: this algorithm does not clip")
        if self.clip_low is not None and settings.clip == "reciprocal":
            raise ValueError(
                "clip_low would be ignored: the band of LOOP's code is [1 / (1 + clip_high), 1 + clip_high]. Leave it "
                "out, or use algorithm loop, whose band is [1 - clip_low, 1 + clip_high]"
            )
        return replace(algorithm, loss=asdict(settings))

    def settings_of(self, algorithm: Preset, **own: Any) -> LossSettings:
        """The settings of the algorithm's loss in batches of this configuration, with `own` over them."""
        rollouts = algorithm.rollouts_in_update(self.prompts_per_step * self.samples_per_prompt)
        return algorithm.settings(self.max_completion_length, rollouts, **own)

    def algorithm_keys(self) -> dict[str, Any]:
        """Fields of the algorithm that are configured."""
        given: dict[str, Any] = {}
        if self.beta is not None:
            published = self.published.kl
            place: Place = "none" if self.beta == 0 else published if published != "none" else "loss"
            given = {"kl": place, "beta": self.beta}
        keys = {
            "epochs": self.epochs_per_step,
            "rollouts_per_update": self.rollouts_per_update,
            "dynamic_sampling": self.dynamic_sampling,
            "overlong_buffer": self.overlong_buffer,
        }
        return given | _present(keys)

    def loss_keys(self) -> dict[str, Any]:
        """Settings of the algorithm's loss that are configured."""
        correction = self.correction
        if correction == "auto":
            correction = "none" if self.engine.kind == "huggingface" else "truncate"
        return {
            **_present({"clip_low": self.clip_low, "clip_high": self.clip_high}),
            "entropy_coef": self.entropy_coef,
            "correction": correction,
            "correction_level": self.correction_level,
            "correction_cap": self.correction_cap,
        }

    @model_validator(mode="after")
    def _an_algorithm(self) -> Self:
        algorithm = self.resolve()
        if algorithm.dynamic_sampling and self.samples_per_prompt < 2:
            raise ValueError(
                f"dynamic_sampling replaces prompts whose rollouts are equally good, and with samples_per_prompt "
                f"{self.samples_per_prompt} that is every one; raise it, or set dynamic_sampling to false"
            )
        return self


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Without those that are null, which are the algorithm's own."""
    return {name: value for name, value in values.items() if value is not None}


def check(config: OnlineConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.online import check_online

    return check_online(config)


def describe(config: OnlineConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic and the algorithm in force, from the configuration alone."""
    if config.prompts_per_step < world_size:
        raise RefusedError(
            f"prompts_per_step {config.prompts_per_step} over {world_size} processes leaves some without a prompt; "
            f"set it to at least {world_size}"
        )
    rollouts = config.prompts_per_step * config.samples_per_prompt
    trained = config.prompts_per_step * config.trained_per_prompt
    algorithm = config.resolve()
    size = algorithm.rollouts_in_update(trained)
    updates = math.ceil(trained / size)
    about = "about " if config.minibatches == "prompts" else ""
    steps = (
        str(config.max_steps)
        if config.max_steps > 0
        else f"{config.num_train_epochs:g} x prompts / {config.prompts_per_step}, rounded up"
    )
    return {
        "processes": world_size,
        "steps": f"{steps}, each of a rollout phase and up to {algorithm.epochs * updates} optimizer steps",
        "prompts per step": f"{config.prompts_per_step}, about {config.prompts_per_step / world_size:g} a process",
        "rollouts per step": f"{config.prompts_per_step} prompts x {config.samples_per_prompt} samples = {rollouts}",
        "optimizer steps per step": f"{algorithm.epochs} epochs x {updates} updates of {about}{size} rollouts",
        "sampled tokens per step": f"at most {rollouts * config.rollout.max_turns * config.max_completion_length:,}",
        "micro-batches": f"of {config.tokens_per_microbatch} tokens; they never change the gradient",
        **dict(_in_words(config, algorithm, algorithm.epochs * updates)),
    }


RATIOS = {"none": "no ratio", "geometric": "geometric mean of a sequence's ratios"}


def _in_words(config: OnlineConfig, algorithm: Preset, num_updates: int) -> Iterator[tuple[str, str]]:
    """The algorithm, line by line: how far it is the published one, advantages, loss, KL, the sampler's correction.
    `num_updates`: optimizer steps on the same rollouts."""
    loss = LossSettings(**algorithm.loss)
    own = ", ".join(_differences(config, algorithm))
    yield "algorithm", f"{config.algorithm_name}, {f'but for {own}' if own else 'as published'}"
    advantage: str = algorithm.advantage
    if algorithm.needs_critic:
        advantage += f", gamma {algorithm.gamma:g}, lambda {algorithm.lam:g}"
        advantage += f", {algorithm.critic_warmup} steps for the critic alone" if algorithm.critic_warmup else ""
    if algorithm.whitening != "none":
        advantage += f", whitened ({algorithm.whitening} variance)"
    if algorithm.dynamic_sampling:
        advantage += "; prompts of equal rewards are replaced"
    if algorithm.overlong_buffer:
        advantage += f"; length is punished in the last {algorithm.overlong_buffer:.0%} before its limit"
    yield "advantages", advantage
    low, high = loss.band
    ratio = RATIOS.get(loss.ratio, f"ratio of a {loss.ratio}")
    clipping = "not clipped" if loss.clip == "none" else f"clipped ({loss.clip}) to [{low:.6g}, {high:.6g}]"
    if loss.clip != "none" and num_updates == 1:
        clipping += ", which one update a step never reaches"
    divisor = f", divided by {loss.sequences_divisor:g} rollouts" if loss.sequences_divisor else ""
    terms = f"; entropy x {loss.entropy_coef:g}" if loss.entropy_coef else ""
    terms += f"; values x {loss.value_coef:g}" if algorithm.needs_critic else ""
    yield "loss", f"{ratio}, {clipping}; {loss.aggregation}{divisor}{terms}"
    estimator = "k1" if algorithm.kl == "reward" else loss.kl
    pull = f"{estimator} in the {algorithm.kl}, beta {algorithm.beta:g}" if algorithm.needs_reference else "none"
    yield "KL to the reference", pull
    weights = f"{loss.correction}, a {loss.correction_level}, up to {loss.correction_cap:g}"
    yield "sampler's correction", "none" if loss.correction == "none" else weights


def _differences(config: OnlineConfig, algorithm: Preset) -> list[str]:
    """What is not as published, each with its published value."""
    published = config.published
    names = [field.name for field in fields(Preset) if field.name != "loss"]
    pairs = [(name, getattr(algorithm, name), getattr(published, name)) for name in names]
    theirs = asdict(config.settings_of(published))
    derived = ["beta", "sequences_divisor", "length_divisor"]
    if algorithm.loss["correction"] == "none":
        derived += ["correction_level", "correction_cap"]
    pairs += [(name, own, theirs[name]) for name, own in algorithm.loss.items() if name not in derived]
    for name in ("minibatches", "mask_truncated_completions"):
        pairs.append((name, getattr(config, name), type(config).model_fields[name].default))
    pairs.append(("minibatches", config.minibatches, "rollouts"))
    pairs.append(("mask_truncated_completions", config.mask_truncated_completions, False))
    said = [f"{name} {own} (published: {its})" for name, own, its in pairs if own != its]
    by_updates = f"(published: {published.updates} updates an epoch)"
    return [line.replace("(published: None)", by_updates) if "rollouts_per_update" in line else line for line in said]
