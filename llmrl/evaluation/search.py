r"""Search decoding with a policy and its reference: beam search by likelihood or by implicit reward.

Rafailov et al., "From r to Q*", arXiv 2404.12358, Sec. 5.2, Eqs. 12-13: among continuations of one state, the largest
sum of r + beta log pi_ref, with V* of the state it ends in, is the largest sum of beta log pi*. So beam search on a DPO
policy's likelihood is search by its implicit reward, kept to the reference:

    likelihood   sum_t log pi(y_t | x, y_<t)
    reward       sum_t log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)      (times beta)

The second is the implicit reward alone. Tokens that neither model would ever say have ratios of any size, and search
finds those: it chooses only among tokens that are `plausible` to the policy, at least that share of its likeliest one
(the constraint of contrastive decoding: Li et al., arXiv 2210.15097, Eq. 3), and to which the reference gives any
probability at all. Sums are not divided by lengths.

transformers' own beam search finds the same by likelihood (the tests compare), but takes no second model.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.decoding import base_model, decoding_mode

By = Literal["likelihood", "reward"]


@dataclass(frozen=True)
class Found:
    """The best answer to a prompt: the token that ended it, if one did (`ended`), is its last.

    logprob: its log pi. log_ratio: its log pi - log pi_ref; 0 in a search by likelihood, which asks no reference.
    """

    token_ids: list[int]
    logprob: float
    log_ratio: float
    ended: bool


NOTHING = Found([], 0.0, 0.0, ended=False)


class BeamSearch:
    """Beam search with `policy` over the answers to several prompts at once; `width` beams a prompt, 1 is greedy.

    reference: needed `by` reward; None is the policy with its adapters off. plausible: by reward, tokens whose pi is
    below this share of the likeliest token's are not chosen; at 1 only the likeliest is, at 0 every token may be.
    prompts_per_batch: of them `width` rows each are under way at once.
    """

    def __init__(
        self,
        policy: nn.Module,
        width: int,
        stop_token_ids: Collection[int],
        *,
        by: By = "likelihood",
        reference: nn.Module | None = None,
        plausible: float = 0.1,
        prompts_per_batch: int = 16,
    ) -> None:
        """Raises RefusedError for a search that cannot be: an unknown `by`, no beam, or `by` reward without a reference
        that says the same tokens or an adapter to switch off."""
        _check_numbers(width=width, prompts_per_batch=prompts_per_batch)
        if by not in get_args(By):
            raise RefusedError(f"by ({by!r}) must be one of {', '.join(get_args(By))}")
        if not 0 <= plausible <= 1:
            raise RefusedError(f"plausible ({plausible}) must be a share between 0 and 1")
        if by == "reward":
            _check_reference(policy, reference)
        self.policy, self.reference, self.by, self.width = policy, reference, by, width
        self.stops = frozenset(stop_token_ids)
        self.least = math.log(plausible) if plausible else -math.inf
        self.continuations = width * (1 + len(self.stops))  # so many that `width` go on, however many of them end
        self.prompts_per_batch = prompts_per_batch

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Found]:
        """The best answer to each prompt (token ids), of at most `max_new_tokens`; an open one where none has ended.

        By likelihood a prompt is done when no open beam can become better than its best ended answer; by reward, whose
        sums may rise again, when `width` answers have ended. Raises RefusedError for a prompt that cannot be continued,
        RunFailedError where no token can be chosen.
        """
        _check(self.policy, prompts, max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Found] = {}
        for start in range(0, len(order), self.prompts_per_batch):
            batch = order[start : start + self.prompts_per_batch]
            with torch.no_grad(), decoding_mode(self.policy), decoding_mode(self.reference or self.policy):
                found.update(zip(batch, self._search([prompts[i] for i in batch], max_new_tokens), strict=True))
            progress(len(found), len(prompts))
        return [found[i] for i in range(len(prompts))]

    def _readers(self, prompts: Sequence[Sequence[int]]) -> "list[_Reader]":
        readers = [_Reader(self.policy, prompts, nullcontext)]
        if self.by == "reward":
            off = self.policy.disable_adapter if isinstance(self.policy, PeftModel) else nullcontext
            readers.append(_Reader(self.reference or self.policy, prompts, nullcontext if self.reference else off))
        return readers

    def _search(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Found]:
        readers = self._readers(prompts)
        logprobs = [reader.logprobs_RV for reader in readers]
        ended: list[list[Found]] = [[] for _ in prompts]
        beams = {number: [NOTHING] for number in range(len(prompts))}
        best_open = [NOTHING for _ in prompts]
        for _ in range(max_new_tokens):
            parents: list[int] = []
            first_row, going = 0, {}
            for number, open_beams in beams.items():
                rows = range(first_row, first_row + len(open_beams))
                first_row = rows.stop
                chosen = self._continuations(open_beams, [each[rows.start : rows.stop] for each in logprobs])
                goes_on = self._parted(chosen, ended[number])
                best_open[number] = goes_on[0][1] if goes_on else NOTHING
                if goes_on and not self._is_done(goes_on[0][1], ended[number]):
                    going[number] = [beam for _, beam in goes_on]
                    parents += [rows[parent] for parent, _ in goes_on]
            beams = going
            if not beams:
                break
            tokens = [beam.token_ids[-1] for open_beams in beams.values() for beam in open_beams]
            logprobs = [reader.read(parents, tokens) for reader in readers]
        return [max(answers, key=self._score) if answers else best_open[n] for n, answers in enumerate(ended)]

    def _continuations(self, beams: list[Found], logprobs: list[Tensor]) -> list[tuple[int, Found]]:
        """(the beam it continues, the continued one), best first; `logprobs` [beams, V] are those of each model."""
        mine_BV = gains_BV = logprobs[0]
        if self.by == "reward":
            is_plausible = mine_BV >= mine_BV.amax(-1, keepdim=True) + self.least
            # What the reference never says has no ratio, and no optimal policy says it either.
            gains_BV = (mine_BV - logprobs[1]).where(is_plausible & logprobs[1].isfinite(), -torch.inf)
        # Of one beam no more than `continuations` can be among the best of all.
        gains_BC, tokens_BC = gains_BV.topk(min(self.continuations, gains_BV.shape[-1]), dim=-1)
        ratios_BC = gains_BC if self.by == "reward" else torch.zeros_like(gains_BC)
        before_B1 = torch.tensor([[self._score(beam)] for beam in beams], dtype=torch.float64)
        scores = (before_B1 + gains_BC.double().cpu()).flatten()
        of_all = (tokens_BC, mine_BV.gather(-1, tokens_BC), ratios_BC)
        tokens, mine, ratios = (each.flatten().tolist() for each in of_all)
        found = []
        for at in scores.topk(min(self.continuations, len(scores))).indices.tolist():
            if not scores[at] > -torch.inf:
                break
            parent = at // tokens_BC.shape[1]
            beam = beams[parent]
            further = Found([*beam.token_ids, tokens[at]], beam.logprob + mine[at], beam.log_ratio + ratios[at], False)
            found.append((parent, further))
        if not found:
            raise RunFailedError(
                f"after {len(beams[0].token_ids)} tokens of an answer no token can be chosen: the reference gives no "
                "probability to any that is plausible to the policy, or log-probabilities are not finite. Remedy: the "
                "reference that the policy was trained from, a smaller `plausible`, or a model whose weights are sound"
            )
        return found

    def _parted(self, chosen: list[tuple[int, Found]], ended: list[Found]) -> list[tuple[int, Found]]:
        """Those of the first `width` that end go into `ended`; returned are the best `width` of those that do not."""
        ends = [beam.token_ids[-1] in self.stops for _, beam in chosen]
        ended += [
            replace(beam, ended=True)
            for (_, beam), at_end in list(zip(chosen, ends, strict=True))[: self.width]
            if at_end
        ]
        return [each for each, at_end in zip(chosen, ends, strict=True) if not at_end][: self.width]

    def _is_done(self, best_open: Found, ended: list[Found]) -> bool:
        if self.by == "reward":
            return len(ended) >= self.width
        return bool(ended) and max(map(self._score, ended)) >= self._score(best_open)

    def _score(self, beam: Found) -> float:
        return beam.logprob if self.by == "likelihood" else beam.log_ratio


class _Reader:
    """A model that has read some rows and says what could come next: log pi [R, V] of every token.

    mode: a context in which it computes, such as its adapters off.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], mode: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.model, self.mode = model, mode
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=base_model(model).config)
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt))
            self.mask[row, width - len(prompt) :] = 1
        ids, self.mask = ids.to(self.device), self.mask.to(self.device)
        self.lengths = self.mask.sum(1, keepdim=True)
        self.logprobs_RV = self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))
        if not all(isinstance(layer, DynamicLayer) for layer in self.cache.layers):
            raise RefusedError(
                f"{type(base_model(model)).__name__} does not keep its past as keys and values of each token, which "
                "beam search needs in order to go on from another beam's past"
            )

    def read(self, parents: list[int], tokens: list[int]) -> Tensor:
        """[R', V] after one more token each; row r goes on from what row `parents[r]` has read."""
        rows = torch.tensor(parents, device=self.device)
        self.cache.batch_select_indices(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones((len(parents), 1))], dim=1)
        positions = self.lengths[rows]
        self.lengths = positions + 1
        return self._forward(torch.tensor(tokens, device=self.device)[:, None], positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self.mode():
            logits = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        logprobs_RV: Tensor = logits[:, -1].float().log_softmax(-1)
        return logprobs_RV


def _check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Integral) or number < 1:
            raise RefusedError(f"{name} ({number}) must be a whole number of at least 1")


def _check_reference(policy: nn.Module, reference: nn.Module | None) -> None:
    """Refuse a search by reward whose reference is missing or says other tokens."""
    if reference is None:
        if not isinstance(policy, PeftModel):
            raise RefusedError("search by reward needs a reference, or a policy with an adapter to switch off")
        return
    mine, theirs = (base_model(each).config.get_text_config().vocab_size for each in (policy, reference))
    if mine != theirs:
        raise RefusedError(
            f"the policy has {mine} tokens and the reference {theirs}, so their log-probabilities cannot be compared. "
            "Remedy: the model that the policy was trained from"
        )


def _check(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what the model cannot continue, before anything is computed."""
    limit = getattr(base_model(model).config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise RefusedError(f"prompt {number} is empty: there is nothing to continue")
        if limit and len(prompt) + max_new_tokens > limit:
            raise RefusedError(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"model's {limit} positions. Remedy: shorten the prompt or lower max_new_tokens"
            )
