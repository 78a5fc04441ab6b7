"""Implicit rewards of given tokens from a policy and its reference, and how far the policy has left the reference.

Rafailov et al., "From r to Q*", arXiv 2404.12358. The forward pass is the learner's, without what trains: prefix trees,
where the model can take them, and a head that never holds the log-probabilities of a whole vocabulary at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from llmrl.errors import RefusedError
from llmrl.learner import forms
from llmrl.learner.batches import ModelInputs
from llmrl.learner.learner import Learner
from llmrl.learner.policy import Policy
from llmrl.learner.reference import IN_MEMORY, adapters_off, scoring
from llmrl.learner.sequences import Floats, Group, per_sequence, split_into_microbatches
from llmrl.objectives.implicit_reward import reference_drift

CHUNK_ELEMENTS = 2**22
"""Log-probabilities of a vocabulary held at once, of each of the two models."""


class ImplicitReward:
    """beta (log pi - log pi_ref) of given tokens. Without a `reference` it is the policy with its adapters off."""

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | PeftModel | None = None,
        beta: float = 0.1,
        tokens_per_microbatch: int = 4096,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Raises RefusedError where there is neither a reference nor an adapter to switch off."""
        if reference is None and not isinstance(policy, PeftModel):
            raise RefusedError("there is no reference: give one, or a policy with an adapter to switch off")
        self.beta, self.tokens_per_microbatch = beta, tokens_per_microbatch
        self.policy, self.form = _scoring_policy(policy, say)
        self.reference: Policy | None = None
        if reference is not None:
            self.reference, form = _scoring_policy(reference, say)
            self.form = self.form if form == "tree" else form

    def logprobs(
        self, groups: list[Group], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[list[tuple[Floats, Floats]]]:
        """(log pi, log pi_ref) of the scored tokens of each sequence of each group, float32."""
        found: dict[int, list[tuple[Floats, Floats]]] = {}
        for members, inputs in _batches(groups, self.form, self.tokens_per_microbatch, self._device):
            with scoring(self.policy):
                mine_N = self.policy(inputs).logprobs_N
                with _as_reference(self.policy, self.reference) as reference:
                    theirs_N = reference(inputs).logprobs_N
            chosen = [groups[i] for i in members]
            both = zip(_split(mine_N, chosen), _split(theirs_N, chosen), strict=True)
            found.update((i, list(zip(*parts, strict=True))) for i, parts in zip(members, both, strict=True))
            progress(len(found), len(groups))
        return [found[i] for i in range(len(groups))]

    def drift(self, groups: list[Group]) -> list[list[Floats]]:
        """E_{a ~ pi_ref}[beta log (pi / pi_ref)] = -beta KL(pi_ref || pi) at the state before each scored token.

        What a token drawn from the reference would lose on average: why the implicit reward of an answer falls that the
        reference was trained on (Sec. 5.4). Never above 0.
        """
        return _drift(self.policy, self.reference, self.form, groups, self.beta, self.tokens_per_microbatch)

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device


def learner_drift(learner: Learner, groups: list[Group], beta: float) -> dict[str, float]:
    """`reference_drift`, the mean of `ImplicitReward.drift` over the scored tokens, of a learner as it is.

    For evaluations of held-out pairs, beside `rewards/chosen` and `rewards/rejected`. Empty where `without_drift` says
    why.
    """
    if without_drift(learner) is not None:
        return {}
    drifts = _drift(learner.policy, learner.frozen, learner.form, groups, beta, learner.options.tokens_per_microbatch)
    return {"reference_drift": float(np.concatenate([part for group in drifts for part in group]).mean())}


def without_drift(learner: Learner) -> str | None:
    """Why `learner_drift` says nothing of this learner; None where it does."""
    if learner.reference_kind not in IN_MEMORY:
        return f"no reference is in memory (reference: {learner.reference_kind}); reference: frozen or use_peft has it"
    if learner.accelerator.num_processes > 1:
        return "it needs the whole model in one process"
    return None


def _drift(
    policy: Policy, reference: Policy | None, form: forms.Form, groups: list[Group], beta: float, budget: int
) -> list[list[Floats]]:
    found: dict[int, list[Floats]] = {}
    for members, inputs in _batches(groups, form, budget, next(policy.parameters()).device):
        with scoring(policy):
            mine_M = policy.states(inputs)
            with _as_reference(policy, reference) as other:
                theirs_M = other.states(inputs)
            rows = max(1, CHUNK_ELEMENTS // policy.vocabulary_logprobs(mine_M[:1]).shape[-1])
            parts = zip(mine_M.split(rows), theirs_M.split(rows), strict=True)
            drift_M = torch.cat([_chunk(policy, reference or policy, beta, *part) for part in parts])
        chosen = [groups[i] for i in members]
        found.update(zip(members, _split(drift_M[inputs.scored_row_N], chosen), strict=True))
    return [found[i] for i in range(len(groups))]


def _chunk(policy: Policy, reference: Policy, beta: float, mine_M: Tensor, theirs_M: Tensor) -> Tensor:
    return reference_drift(policy.vocabulary_logprobs(mine_M), reference.vocabulary_logprobs(theirs_M), beta)


def _scoring_policy(causal_lm: PreTrainedModel | PeftModel, say: Callable[[str], None]) -> tuple[Policy, forms.Form]:
    """The model with the learner's forward, in the form that was compared with the model's own."""
    policy = Policy(causal_lm)
    device = next(policy.parameters()).device
    probe = forms.probe(policy, causal_lm.config.get_text_config().vocab_size, device)
    form = forms.check(forms.choose(policy, "auto", say), probe, causal_lm.dtype, device.type == "cpu", say)
    return policy, form


@contextmanager
def _as_reference(policy: Policy, reference: Policy | None) -> Iterator[Policy]:
    """The reference, ready to score: the policy itself with its adapters off where there is no other."""
    with adapters_off(policy) if reference is None else scoring(reference):
        yield reference or policy


def _batches(
    groups: list[Group], form: forms.Form, budget: int, device: torch.device
) -> Iterator[tuple[list[int], ModelInputs]]:
    for members in split_into_microbatches([forms.size(form, group) for group in groups], budget):
        yield members, forms.inputs(form, [groups[i] for i in members], device)


def _split(values_N: Tensor, groups: list[Group]) -> list[list[Floats]]:
    return per_sequence(values_N.float().cpu().numpy(), groups)
