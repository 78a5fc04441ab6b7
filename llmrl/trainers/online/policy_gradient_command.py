"""What `--dry-run` and `llmrl check` say of a policy-gradient method, from its configuration. Loads without torch."""

import math
from collections.abc import Iterator
from dataclasses import asdict, fields

from llmrl.objectives.algorithm import Algorithm
from llmrl.trainers.online.command import check, describe_sampling, reward_in_words
from llmrl.trainers.online.policy_gradient_config import PolicyGradientConfig

__all__ = ["check", "describe"]
RATIOS = {"none": "no ratio", "geometric": "geometric mean of a sequence's ratios"}


def describe(config: PolicyGradientConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic and the algorithm in force, from the configuration alone."""
    trained = config.prompts_per_step * config.trained_per_prompt
    algorithm = config.resolve()
    size = algorithm.rollouts_in_update(trained)
    updates = math.ceil(trained / size)
    about = "about " if config.minibatches == "prompts" else ""
    update = f"{algorithm.epochs} epochs x {updates} updates of {about}{size} rollouts"
    return {
        **describe_sampling(config, world_size, algorithm.epochs * updates),
        "optimizer steps per step": update,
        **dict(_in_words(config, algorithm, algorithm.epochs * updates)),
    }


def _in_words(config: PolicyGradientConfig, algorithm: Algorithm, num_updates: int) -> Iterator[tuple[str, str]]:
    """The algorithm, line by line: how far it is the published one, advantages, loss, KL, the sampler's correction.
    `num_updates`: optimizer steps on the same rollouts."""
    loss = algorithm.loss
    own = ", ".join(_differences(config, algorithm))
    yield "algorithm", f"{config.algorithm_name}, {f'but for {own}' if own else 'as published'}"
    yield "reward", reward_in_words(config)
    advantage: str = algorithm.advantage
    if algorithm.needs_critic:
        advantage += f", gamma {algorithm.gamma:g}, lambda {algorithm.lam:g}"
        advantage += f", {algorithm.critic_warmup} steps for the critic alone" if algorithm.critic_warmup else ""
    if algorithm.whitening != "none":
        advantage += f", whitened ({algorithm.whitening} variance)"
    if algorithm.score_clip is not None:
        advantage += f"; rewards are cut to +-{algorithm.score_clip:g}"
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


def _differences(config: PolicyGradientConfig, algorithm: Algorithm) -> list[str]:
    """What is not as published, each with its published value."""
    published = config.published
    trained = config.prompts_per_step * config.trained_per_prompt
    same_size = algorithm.rollouts_in_update(trained) == published.rollouts_in_update(trained)
    left_out = ("loss", "rollouts_per_update") if same_size else ("loss",)
    names = [field.name for field in fields(Algorithm) if field.name not in left_out]
    pairs = [(name, getattr(algorithm, name), getattr(published, name)) for name in names]
    ours, theirs = asdict(algorithm.loss), asdict(config.settings_of(published))
    derived = ["beta", "sequences_divisor", "length_divisor"]
    if algorithm.loss.correction == "none":
        derived += ["correction_level", "correction_cap"]
    pairs += [(name, ours[name], theirs[name]) for name in ours if name not in derived]
    pairs += config.own_keys()
    said = [f"{name} {own} (published: {its})" for name, own, its in pairs if own != its]
    by_updates = f"(published: {published.updates} updates an epoch)"
    return [line.replace("(published: None)", by_updates) if "rollouts_per_update" in line else line for line in said]
