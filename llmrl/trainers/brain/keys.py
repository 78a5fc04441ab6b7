"""What both loops of BRAIn are configured with. Loads without torch."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llmrl.config import Keys

if TYPE_CHECKING:
    from llmrl.objectives.brain import BRAIn, Proposal


class BRAInKeys(Keys):
    """BRAIn: the posterior that is fitted, and by which of a prompt's samples."""

    beta: Annotated[float, Field(gt=0)] = 0.5
    """Temperature of the target p exp(reward / beta): larger keeps the policy closer to the prior. Good where the
    deviation of a prompt's rewards is one or two times beta: brain/ess then lies between 2 and half of the samples."""
    baseline: bool = True
    """Subtract the policy's own weights from the target's, as published; false: likelihood weighted by the target."""
    most_prior_gap: Annotated[float, Field(gt=0)] | None = None
    """Samples whose log-probability under the prior and the proposal differ by more nats than this are left out of both
    softmaxes; null = none are."""
    truncated_samples: Literal["leave_out", "keep"] = "leave_out"
    """Samples that a limit cut off: left out, or kept as answers of their own with the reward that they got."""

    def objective(self, proposal: "Proposal") -> "BRAIn":
        """The loss with this proposal."""
        from llmrl.objectives.brain import BRAIn

        return BRAIn(self.beta, proposal, self.baseline, self.most_prior_gap)
