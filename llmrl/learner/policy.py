"""The language model as the learner calls it: packed or padded tokens in, log-probabilities of scored tokens out."""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmrl.learner import attention, head
from llmrl.learner.batches import ModelInputs


class Scores(NamedTuple):
    """Of the N scored tokens: log-probabilities, entropies (or None) and values of the predicting states (or None)."""

    logprobs_N: Tensor
    entropies_N: Tensor | None
    values_N: Tensor | None


class Policy(nn.Module):
    """A causal language model (plain or with PEFT adapters) and, if asked for, a value head on its last hidden state.

    `value_gradient`: the head's loss reaches the language model, too; otherwise the head reads hidden states as they
    are. The head starts at zero, so that a critic that has learned nothing says nothing.

    Everything the model computes happens inside this module's forward, because DDP and ZeRO only manage parameters used
    there; so only this module is prepared and called.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel | PeftModel,
        *,
        temperature: float = 1.0,
        value_head: bool = False,
        value_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        base = base_model(causal_lm)
        self.layer_types = sorted(set(getattr(base.config.get_text_config(), "layer_types", None) or []))
        self.transform = head.LogitTransform.of_model(base.config.get_text_config(), temperature)
        head.install(base.get_output_embeddings())
        self.value_head = _value_head(base.config.get_text_config().hidden_size) if value_head else None
        self.value_gradient = value_gradient

    def forward(self, inputs: ModelInputs, with_entropy: bool = False, plain: bool = False) -> Scores:
        """Score the inputs; `plain` takes the model's own forward instead, to compare with."""
        if plain:
            return Scores(self.plain_logprobs(inputs), None, None)
        base = base_model(self.causal_lm)
        states_M = self.states(inputs)
        logprobs_M, entropies_M = base.get_output_embeddings()(states_M, inputs.target_M, self.transform, with_entropy)
        values_M = None if self.value_head is None else self._values(states_M)
        rows = inputs.scored_row_N
        return Scores(
            logprobs_M[rows], entropies_M[rows] if with_entropy else None, None if values_M is None else values_M[rows]
        )

    def states(self, inputs: ModelInputs) -> Tensor:
        """[M, H] the hidden states from which the scored tokens are predicted."""
        decoder = base_model(self.causal_lm).get_decoder()
        states = decoder(**self._body_arguments(inputs), use_cache=False).last_hidden_state
        return states.flatten(0, 1)[inputs.source_M]

    def vocabulary_logprobs(self, states_M: Tensor) -> Tensor:
        """[M, H] -> [M, V] log pi of every token, without a gradient. Large: hand it a few states at a time."""
        return head.all_logprobs(base_model(self.causal_lm).get_output_embeddings(), states_M, self.transform)

    def _values(self, states_M: Tensor) -> Tensor:
        assert self.value_head is not None
        states_M = states_M if self.value_gradient else states_M.detach()
        return self.value_head(states_M.to(self.value_head.weight.dtype))[:, 0]

    def plain_logprobs(self, inputs: ModelInputs) -> Tensor:
        """[N] from the model's own forward and full logits on padded rows: slow, and what all else must equal."""
        logits = self.causal_lm(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False
        ).logits
        logprobs = (logits.flatten(0, 1)[inputs.source_M].float() / self.transform.temperature).log_softmax(-1)
        return logprobs.gather(1, inputs.target_M[:, None])[:, 0][inputs.scored_row_N]

    def _body_arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        if inputs.layout is None:
            return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        # A 4-D mask is passed through by transformers as it is: this one only keeps it from building a T x T one.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.input_ids.device)
        mask = {kind: unused for kind in self.layer_types} if len(self.layer_types) > 1 else unused
        return {
            "input_ids": inputs.input_ids,
            "position_ids": inputs.position_ids,
            "attention_mask": mask,
            "layout": inputs.layout,
        }


def _value_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def base_model(causal_lm: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside adapters, which stay active in it."""
    return causal_lm.get_base_model() if isinstance(causal_lm, PeftModel) else causal_lm


def can_take_tree(causal_lm: PreTrainedModel | PeftModel) -> str | None:
    """None if the model's attention can be replaced by the tree form, else the reason why not.

    This rules out what is known not to work; the learner also compares the two forms once on a probe.
    """
    base = base_model(causal_lm)
    config = base.config.get_text_config()
    if not getattr(base, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    unknown = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    try:
        base.set_attn_implementation(attention.NAME)
    except (ValueError, ImportError) as error:
        return f"it refuses another attention function ({error})"
    return None
