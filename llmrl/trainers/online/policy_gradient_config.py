"""What every policy-gradient method is configured with, and how keys become an algorithm. Loads without torch."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from llmrl.config.online import PolicyGradientKeys
from llmrl.objectives.algorithm import Algorithm, Place
from llmrl.objectives.presets import preset
from llmrl.objectives.settings import LossSettings
from llmrl.trainers.online.config import SteppedConfig


class PolicyGradientConfig(SteppedConfig, PolicyGradientKeys):
    """Keys of the policy-gradient methods, which learn from their own rollouts."""

    if TYPE_CHECKING:
        method: str  # every method declares its own

    def own_keys(self) -> list[tuple[str, Any, Any]]:
        """Keys beside the algorithm's own that change what is rewarded or trained on: (name, value, as published)."""
        return self.beside_default("minibatches", "mask_truncated_completions", "reward_clip")

    @property
    def length_is_free(self) -> bool:
        """See RunKeys. The last step samples nothing ahead, which a longer run does."""
        return self.lr_scheduler_type == "constant" and not self.max_staleness

    @property
    def algorithm_name(self) -> str:
        """The preset that the method, or its key `algorithm`, names."""
        return self.method

    @property
    def published(self) -> Algorithm:
        """The algorithm without any key of the configuration."""
        return preset(self.algorithm_name)

    @property
    def trained_per_prompt(self) -> int:
        """Rollouts of a prompt that are trained on."""
        return self.samples_per_prompt

    def resolve(self) -> Algorithm:
        """The algorithm in force: the published one, what is configured over it, and the constants of its batches.

        Nowhere else do keys become an algorithm. Raises ValueError for keys that it would ignore.
        """
        algorithm = replace(self.published, **self.algorithm_keys())
        if self.minibatches == "prompts" and algorithm.rollouts_per_update is not None:
            algorithm = replace(algorithm, rollouts_per_update=self._of_whole_prompts(algorithm.rollouts_per_update))
        settings = self.settings_of(algorithm, **self.loss_keys())
        given = [name for name in ("clip_low", "clip_high") if getattr(self, name) is not None]
        if given and settings.clip == "none":
            raise ValueError(f"{given[0]} would be ignored: this algorithm does not clip")
        if self.clip_low is not None and settings.clip == "reciprocal":
            raise ValueError(
                "clip_low would be ignored: the band of LOOP's code is [1 / (1 + clip_high), 1 + clip_high]. Leave it "
                "out, or use algorithm loop, whose band is [1 - clip_low, 1 + clip_high]"
            )
        return replace(algorithm, loss=settings)

    def _of_whole_prompts(self, rollouts: int) -> int:
        """The number of rollouts of whole prompts that is nearest to `rollouts`, of one prompt at least."""
        prompt = self.trained_per_prompt
        return prompt * max((2 * rollouts + prompt) // (2 * prompt), 1)

    def settings_of(self, algorithm: Algorithm, **own: Any) -> LossSettings:
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
