"""A run of a policy-gradient method: what its loop is made of. The loops stand in loop, ppo, rlsp and pf_ppo."""

from typing import TYPE_CHECKING, Any

from llmrl.objectives.algorithm import Algorithm
from llmrl.objectives.value import ValueRegression
from llmrl.rollout.collector import Collected
from llmrl.rollout.protocol import row_seed
from llmrl.runs import Run
from llmrl.trainers.online.experience import Experience
from llmrl.trainers.online.policy_gradient_config import PolicyGradientConfig
from llmrl.trainers.online.run import SampledRun, tells_apart

if TYPE_CHECKING:
    from torch import Tensor


class PolicyGradientRun(SampledRun):
    """A run of a policy-gradient method: every step is `collect`, `experience`, `advantages`, `improve` and
    `record`.

    `further`: what else `SampledRun` takes.
    """

    config: PolicyGradientConfig

    def __init__(self, config: PolicyGradientConfig, run: Run, algorithm: Algorithm, **further: Any) -> None:
        super().__init__(
            config,
            run,
            needs_reference=algorithm.needs_reference,
            dynamic_sampling=algorithm.dynamic_sampling,
            overlong_buffer=algorithm.overlong_buffer,
            value_head=algorithm.needs_critic,
            **further,
        )
        self.algorithm = algorithm
        policy_gradient = algorithm.policy_gradient()
        self.objective = policy_gradient.objective()
        self.critic_alone = ValueRegression(policy_gradient.value_clip).objective()

    def experience(self, collected: Collected) -> Experience:
        """The rollouts as the learner takes them; with what it says of them, where advantages are made of that: values
        of a critic, KL in the reward."""
        experience = Experience(collected.groups)
        if self.algorithm.needs_critic or self.algorithm.kl == "reward":
            self._score(experience)
        return experience

    def _score(self, experience: Experience) -> None:
        """What the algorithm compares with: the policy's own log-probabilities where it is updated more than once, the
        reference's, the critic's values."""
        algorithm, count = self.algorithm, len(experience)
        several = algorithm.epochs > 1 or algorithm.rollouts_in_update(count) < count
        experience.score(
            self.learner,
            old=several or algorithm.kl == "reward",
            reference=algorithm.needs_reference,
            values=algorithm.needs_critic,
            idle=self._idle_teach or algorithm.kl == "reward",
        )

    @property
    def _idle_teach(self) -> bool:
        """Whether rollouts without an advantage change the gradient: by KL or entropy in the loss, or a critic."""
        kl_in_loss = self.algorithm.kl == "loss" and self.algorithm.needs_reference
        return kl_in_loss or self.config.entropy_coef > 0 or self.algorithm.needs_critic

    def advantages(self, experience: Experience) -> "Tensor":
        """Advantages of all that was sampled; then, with `mask_truncated_completions`, what a limit cut off leaves,
        before anything is chosen of it. Returns the largest |A| of each rollout that is there, [S]."""
        largest_S = experience.assign_advantages(self.algorithm)
        if self.config.mask_truncated_completions:
            largest_S = largest_S[[i for i, sample in enumerate(experience.samples) if not sample.cut]]
            experience.leave_out_cut()
        return largest_S

    def improve(self, experience: Experience, step: int) -> dict[str, float]:
        """The optimizer steps of one step on what has its advantages; the means of their metrics. In the critic's
        warm-up the language model stays as it is."""
        if not experience.scored:
            self._score(experience)
        warms_up = step < self.algorithm.critic_warmup
        metrics = experience.train(
            self.learner,
            self.critic_alone if warms_up else self.objective,
            epochs=self.algorithm.epochs,
            rollouts_per_update=self.algorithm.rollouts_in_update(len(experience)),
            seed=row_seed(self.config.seed, step, 0),
            skip_idle=not self._idle_teach,
            whole_prompts=self.config.minibatches == "prompts",
            language=not warms_up,
        )
        self.policy_changed()
        if self.config.mask_truncated_completions:
            metrics["rollout/masked"] = float(experience.num_masked)
        return metrics

    def record(self, collected: Collected, metrics: dict[str, float]) -> None:
        """Log the step, and end a run in which nothing has been learned for long."""
        told_apart = tells_apart(collected.groups, over_step=self.algorithm.compares_step)
        cause = "whatever could teach ran into a limit, and mask_truncated_completions leaves it out"
        self.record_step(
            collected, metrics, taught=told_apart and bool(metrics["updates"]), cause=cause if told_apart else None
        )
