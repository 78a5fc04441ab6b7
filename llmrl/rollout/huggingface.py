"""Generation with the very model that is being trained, on any device that transformers runs on.

The token loop is our own because `model.generate` keeps finished rows in the batch, prefills a prompt once per
sample, ties a row's random numbers to its neighbours, and can return log-probabilities only by keeping [rows,
vocabulary] logits of every step.

Shapes: R rows in a batch (a row is one sample of one prompt), U different prompts among them, L prompt tokens, V
vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from llmrl.errors import RefusedError
from llmrl.rollout.decoding import base_model, decoding_mode, draw, row_uniforms
from llmrl.rollout.protocol import Completion, SamplingParams, row_seed

COMPACT_BELOW = 0.75  # share of rows still going under which the finished ones leave, which copies the cache


@dataclass(frozen=True)
class _Row:
    """Where a completion belongs: prompt number, number of the sample, its seed."""

    prompt: int
    sample: int
    seed: int


class HuggingFaceEngine:
    """Samples from `model` as it is at the moment of the call.

    `max_rows` completions are generated at once, fewer where prompt and completion tokens of a batch would exceed
    `max_cache_tokens`: the knobs for memory.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_rows: int = 64,
        max_cache_tokens: int = 65_536,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_cache_tokens = max_rows, max_cache_tokens

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """For each prompt `sampling.n` completions.

        The model's training mode, weights and the global random state are afterwards what they were. Raises
        `RefusedError` for an empty prompt and for one that leaves no room for `max_tokens` within the model's
        positions.
        """
        self._check(prompt_ids, sampling)
        found: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), decoding_mode(self.model):
            for rows in self._batches(prompt_ids, sampling):
                for row, completion in zip(rows, self._batch(rows, prompt_ids, sampling), strict=True):
                    found[row.prompt, row.sample] = completion
        return [[found[p, s] for s in range(sampling.n)] for p in range(len(prompt_ids))]

    def stop_token_ids(self, sampling: SamplingParams) -> set[int]:
        """Every token that ends a completion: the tokenizer's, the generation configuration's, the caller's."""
        configured = base_model(self.model).generation_config.eos_token_id
        own = configured if isinstance(configured, list) else [configured]
        return {i for i in (self.tokenizer.eos_token_id, *own, *sampling.stop_token_ids) if i is not None}

    def _check(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        limit = getattr(base_model(self.model).config, "max_position_embeddings", None)
        for number, ids in enumerate(prompt_ids, 1):
            if not ids:
                raise RefusedError(f"prompt {number} is empty: there is nothing to continue")
            if limit and len(ids) + sampling.max_tokens > limit:
                raise RefusedError(
                    f"prompt {number} has {len(ids)} tokens; with {sampling.max_tokens} new ones it exceeds the "
                    f"model's {limit} positions. Remedy: shorten the prompt or lower the number of new tokens."
                )

    def _batches(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> Iterator[list[_Row]]:
        """Rows of similar prompt length together, the longest first, so that what does not fit shows at once."""
        rows: list[_Row] = []
        width = 0
        for prompt in sorted(range(len(prompt_ids)), key=lambda p: len(prompt_ids[p]), reverse=True):
            for sample in range(sampling.n):
                width = width or len(prompt_ids[prompt]) + sampling.max_tokens
                if rows and (len(rows) == self.max_rows or (len(rows) + 1) * width > self.max_cache_tokens):
                    yield rows
                    rows, width = [], len(prompt_ids[prompt]) + sampling.max_tokens
                rows.append(_Row(prompt, sample, row_seed(sampling.seed, prompt, sample)))
        if rows:
            yield rows

    def _batch(
        self, rows: list[_Row], prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[Completion]:
        """Prefill the different prompts once, then decode all rows, dropping those that have ended."""
        device = next(self.model.parameters()).device
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        logits_UV, cache, mask_UL = self._prefill([list(prompt_ids[p]) for p in prompts], device)
        source_R = torch.tensor([prompts.index(row.prompt) for row in rows], device=device)
        if len(prompts) < len(rows):
            cache.batch_select_indices(source_R)
        state = _Decoding(rows, sampling, self.stop_token_ids(sampling), cache, mask_UL[source_R])
        logits_RV = logits_UV[source_R]
        while state.accept(logits_RV):
            logits_RV = self._forward(state.next_ids, state.mask, state.positions, state.cache)
        return state.completions()

    def _prefill(self, prompts: list[list[int]], device: torch.device) -> tuple[Tensor, DynamicCache, Tensor]:
        """(next-token logits [U, V], cache, attention mask [U, L]) of the prompts.

        What all of them begin with (a system message) is computed once. Then comes padding, then the rest of each, so
        that all end in the same column; positions do not count the padding.
        """
        cache = DynamicCache(config=base_model(self.model).config)
        shared = _common_prefix(prompts) if self._can_skip_padding(cache) else 0
        count, width = len(prompts), max(map(len, prompts)) - shared
        ids = torch.full((count, width), self._any_token, device=device)
        mask = torch.zeros((count, width), dtype=torch.long, device=device)
        for i, prompt in enumerate(prompts):
            rest = prompt[shared:]
            ids[i, width - len(rest) :] = torch.tensor(rest, device=device)
            mask[i, width - len(rest) :] = 1
        if shared:
            first = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(first, torch.ones_like(first), torch.arange(shared, device=device)[None], cache)
            cache.batch_repeat_interleave(count)
        positions = shared + (mask.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask.new_ones((count, shared)), mask], dim=1)
        logits = self._forward(ids, mask, positions, cache)
        keeps_keys = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        if not keeps_keys or cache.get_seq_length() != shared + width:
            raise RefusedError(
                f"{type(base_model(self.model)).__name__} does not keep its past as keys and values of each token, "
                "and this engine samples only from models that do. Leave task_evaluation out for this model"
            )
        return logits, cache, mask

    def _can_skip_padding(self, cache: DynamicCache) -> bool:
        """Whether a key's place in the cache does not matter: padding may then lie between a shared start and the rest.

        It would shift sliding windows, enter recurrent states, and move what models without `position_ids` (MPT) count.
        """
        plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
        return plain and "position_ids" in inspect.signature(base_model(self.model).forward).parameters

    @property
    def _any_token(self) -> int:
        return int(self.tokenizer.eos_token_id or 0)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Next-token logits [rows, V] after `ids` [rows, new]; the cache grows by them."""
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


class _Decoding:
    """The rows of one batch while their tokens are drawn. `active` names, for each row of the cache, the row it is."""

    def __init__(
        self, rows: list[_Row], sampling: SamplingParams, stop: set[int], cache: DynamicCache, mask_RL: Tensor
    ) -> None:
        device = mask_RL.device
        self.rows, self.sampling, self.cache, self.mask = rows, sampling, cache, mask_RL
        self.positions = mask_RL.sum(1, keepdim=True) - 1
        self.next_ids = self.positions
        self._stop = torch.tensor(sorted(stop), device=device)
        self._active = torch.arange(len(rows), device=device)
        self._going = torch.ones(len(rows), dtype=torch.bool, device=device)
        self._tokens = torch.zeros((len(rows), sampling.max_tokens), dtype=torch.long, device=device)
        self._logprobs = torch.zeros((len(rows), sampling.max_tokens), device=device)
        self._lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        self._stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self._uniforms: Tensor | None = None
        if sampling.temperature > 0:
            self._uniforms = row_uniforms([row.seed for row in rows], sampling.max_tokens).to(device)
        self._step = 0

    def accept(self, logits_RV: Tensor) -> bool:
        """Draw each active row's next token from its logits; False when no row goes on."""
        uniforms = None if self._uniforms is None else self._uniforms[self._active, self._step]
        tokens, logprobs = draw(logits_RV, self.sampling.temperature, uniforms)
        going = self._active[self._going]
        self._tokens[going, self._step] = tokens[self._going]
        self._logprobs[going, self._step] = logprobs[self._going]
        self._lengths[going] += 1
        ended = self._going & torch.isin(tokens, self._stop)
        self._stopped[self._active[ended]] = True
        self._going = self._going & ~ended
        self._step += 1
        if self._step == self.sampling.max_tokens or not self._going.any():
            return False
        self.next_ids = tokens[:, None]
        self._drop_ended()
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], dim=1)
        self.positions = self.positions + 1
        return True

    def _drop_ended(self) -> None:
        if int(self._going.sum()) >= COMPACT_BELOW * len(self._going):
            return
        kept = self._going.nonzero()[:, 0]
        self.cache.batch_select_indices(kept)
        self._active, self.mask, self.positions = self._active[kept], self.mask[kept], self.positions[kept]
        self.next_ids, self._going = self.next_ids[kept], self._going[kept]

    def completions(self) -> list[Completion]:
        """What was drawn, in the order of the rows."""
        tokens, logprobs = self._tokens.tolist(), self._logprobs.tolist()
        return [
            Completion(tokens[i][:length], logprobs[i][:length], "stop" if stopped else "length", self.rows[i].seed)
            for i, (length, stopped) in enumerate(zip(self._lengths.tolist(), self._stopped.tolist(), strict=True))
        ]


def _common_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with; at least one token of each is left, whose logits are wanted."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most) if len(prompts) > 1 else 0
