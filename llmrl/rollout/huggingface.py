"""Generation with the very model that is being trained, on any device that transformers runs on.

The token loop is our own because `model.generate` keeps finished rows in the batch, prefills a prompt once per
sample, ties a row's random numbers to its neighbours, takes no row that comes later, and can return log-probabilities
only by keeping [rows, vocabulary] logits of every step.

Shapes: R rows in the batch (a row is one completion), U different prompts, L columns of the cache, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.decoding import base_model, decoding_mode, draw, row_uniforms
from llmrl.rollout.protocol import ASLEEP, Completion, FinishReason, SamplingParams
from llmrl.rollout.stepped import SteppedEngine

COMPACT_BELOW = 0.75  # share of rows still going under which the finished ones leave, which copies the cache


@dataclass
class _Row:
    """One completion, waiting or under way; `ended` rows stay in the batch until it is worth copying the cache."""

    key: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    version: int
    stop: set[int]
    uniforms: list[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def completion(self) -> Completion:
        reason: FinishReason = "stop" if self.tokens[-1] in self.stop else "length"
        return Completion(self.tokens, self.logprobs, reason, self.sampling.seed, self.version)

    @property
    def longest(self) -> int:
        """Tokens that it may come to hold in the cache."""
        return len(self.prompt) + self.sampling.max_tokens


class HuggingFaceEngine(SteppedEngine):
    """Samples from `model` as it is at the moment of the call.

    `max_rows` completions are under way at once, fewer where the tokens that they may come to hold would exceed
    `max_cache_tokens`: the knobs for memory. Others wait, and join as soon as there is room.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_rows: int = 64,
        max_cache_tokens: int = 65_536,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_cache_tokens = max_rows, max_cache_tokens
        self._waiting: list[_Row] = []
        self._batch: _Batch | None = None
        self._is_asleep = False
        self._takes_positions = "position_ids" in inspect.signature(base_model(model).forward).parameters

    # -- the engine's own --------------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The model is the learner's own, so only the version changes; `weights` are not read."""
        self.policy_version, self._is_asleep = version, False

    def sleep(self) -> None:
        """Keys and values went with the last completion. What torch keeps of a GPU's memory for more of them, which
        training has other sizes for, goes now. Raises RunFailedError where something is under way."""
        if self._waiting or self._batch is not None:
            raise RunFailedError("completions are under way, so the engine cannot sleep")
        self._is_asleep = True
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Be ready to sample again."""
        self._is_asleep = False

    def close(self) -> None:
        """Nothing to do."""

    def stop_token_ids(self, sampling: SamplingParams) -> set[int]:
        """Every token that ends a completion: the tokenizer's, the generation configuration's, the caller's."""
        configured = base_model(self.model).generation_config.eos_token_id
        own = configured if isinstance(configured, list) else [configured]
        return {i for i in (self.tokenizer.eos_token_id, *own, *sampling.stop_token_ids) if i is not None}

    def _check(self, prompt_ids: Sequence[int], sampling: SamplingParams, number: int) -> None:
        if self._is_asleep:
            raise RunFailedError(ASLEEP)
        limit = getattr(base_model(self.model).config, "max_position_embeddings", None)
        if not len(prompt_ids):
            raise RefusedError(f"prompt {number} is empty: there is nothing to continue")
        if limit and len(prompt_ids) + sampling.max_tokens > limit:
            raise RefusedError(
                f"prompt {number} has {len(prompt_ids)} tokens; with {sampling.max_tokens} new ones it exceeds the "
                f"model's {limit} positions. Remedy: shorten the prompt or lower the number of new tokens."
            )

    def _add(self, key: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        uniforms = row_uniforms(sampling.seed, sampling.max_tokens) if sampling.temperature > 0 else []
        prompt = tuple(int(i) for i in prompt_ids)
        stop = self.stop_token_ids(sampling)
        self._waiting.append(_Row(key, prompt, sampling, self.policy_version, stop, uniforms))

    def _abort(self, keys: Sequence[int]) -> None:
        gone = set(keys)
        self._waiting = [row for row in self._waiting if row.key not in gone]
        if self._batch is not None:
            for row in self._batch.rows:
                row.ended = row.ended or row.key in gone
            self._drop_ended()

    @contextmanager
    def _working(self) -> Iterator[None]:
        with decoding_mode(self.model):
            yield

    @torch.no_grad()
    def _step(self) -> list[tuple[int, Completion]]:
        """One token for every row under way; waiting rows are prefilled and draw their first."""
        logits = [] if self._batch is None else [self._forward(*self._batch.next_inputs())]
        if joining := self._admitted():
            first_logits, new = self._prefill(joining)
            logits.append(first_logits)
            self._batch = new if self._batch is None else self._batch.joined(new)
        assert self._batch is not None, "a step needs a row"
        ended = self._draw(self._batch, torch.cat(logits))
        self._drop_ended()
        return ended

    def _admitted(self) -> list[_Row]:
        """The waiting rows that there is room for, in their order; at least one where nothing is under way."""
        going = [] if self._batch is None else [row for row in self._batch.rows if not row.ended]
        if self._batch is not None and not self._batch.can_be_joined:
            return []
        width = max((row.longest for row in going), default=0)
        count = len(going)
        for number, row in enumerate(self._waiting):
            width, count = max(width, row.longest), count + 1
            if count > 1 and (count > self.max_rows or count * width > self.max_cache_tokens):
                admitted, self._waiting = self._waiting[:number], self._waiting[number:]
                return admitted
        admitted, self._waiting = self._waiting, []
        return admitted

    def _draw(self, batch: "_Batch", logits_RV: Tensor) -> list[tuple[int, Completion]]:
        uniforms = [row.uniforms[len(row.tokens)] if row.uniforms and not row.ended else 0.0 for row in batch.rows]
        tokens_R, logprobs_R = draw(logits_RV, [row.sampling.temperature for row in batch.rows], uniforms)
        batch.next_ids = tokens_R[:, None]
        finished = []
        for row, token, logprob in zip(batch.rows, tokens_R.tolist(), logprobs_R.tolist(), strict=True):
            if row.ended:
                continue
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.ended = token in row.stop or len(row.tokens) == row.sampling.max_tokens
            if row.ended:
                finished.append((row.key, row.completion()))
        return finished

    def _drop_ended(self) -> None:
        """Let the ended rows go, once there are enough of them to pay for copying the cache."""
        assert self._batch is not None
        going = [i for i, row in enumerate(self._batch.rows) if not row.ended]
        if not going:
            self._batch = None
        elif len(going) < COMPACT_BELOW * len(self._batch.rows):
            self._batch.keep(going)

    def _prefill(self, rows: list[_Row]) -> tuple[Tensor, "_Batch"]:
        """(next-token logits [R, V], the rows as a batch of their own); equal prompts are computed once.

        What all prompts begin with (a system message) is computed once, too. Then comes padding, then the rest of
        each, so that all end in the same column; positions do not count the padding.
        """
        device = next(self.model.parameters()).device
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        cache = DynamicCache(config=base_model(self.model).config)
        shared = _common_prefix(prompts) if self._can_skip_padding(cache) else 0
        count, width = len(prompts), max(map(len, prompts)) - shared
        ids = torch.full((count, width), int(self.tokenizer.eos_token_id or 0), device=device)
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
        logits_UV = self._forward(ids, mask, positions, cache)
        self._refuse_other_memory(cache, shared + width)
        number = {prompt: u for u, prompt in enumerate(prompts)}
        source = torch.tensor([number[row.prompt] for row in rows], device=device)
        if count < len(rows):
            cache.batch_select_indices(source)
        lengths = torch.tensor([[len(row.prompt)] for row in rows], device=device)
        return logits_UV[source], _Batch(rows, cache, mask[source], lengths, self._can_skip_padding(cache))

    def _refuse_other_memory(self, cache: DynamicCache, length: int) -> None:
        keeps_keys = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        if not keeps_keys or cache.get_seq_length() != length:
            raise RefusedError(
                f"{type(base_model(self.model)).__name__} does not keep its past as keys and values of each token, "
                "and the huggingface engine, which answers problems of task_evaluation too, samples only from models "
                "that do. Remedy: engine.kind vllm or vllm_server for rollouts, and no task_evaluation"
            )

    def _can_skip_padding(self, cache: DynamicCache) -> bool:
        """Whether a key's place in the cache does not matter: padding may then lie between a shared start and the rest,
        and rows of different lengths may join.

        It would shift sliding windows, enter recurrent states, and move what models without `position_ids` (MPT) count.
        """
        plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
        return plain and self._takes_positions

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


class _Batch:
    """The rows under way with their cache: all end in its last column, and `mask` [R, L] says which columns are a row's
    own. `next_ids` [R, 1] are to be forwarded next, at `lengths` [R, 1], which counts what a row holds."""

    def __init__(
        self, rows: list[_Row], cache: DynamicCache, mask: Tensor, lengths: Tensor, can_be_joined: bool
    ) -> None:
        self.rows, self.cache, self.mask, self.lengths = rows, cache, mask, lengths
        self.can_be_joined = can_be_joined
        self.next_ids = torch.zeros_like(lengths)

    def next_inputs(self) -> tuple[Tensor, Tensor, Tensor, DynamicCache]:
        """(ids, mask, positions, cache) of the next token; the rows are from now on one longer."""
        positions = self.lengths
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.rows), 1))], dim=1)
        self.lengths = self.lengths + 1
        return self.next_ids, self.mask, positions, self.cache

    def joined(self, new: "_Batch") -> "_Batch":
        """These rows and behind them those of `new`; the narrower cache is padded on the left."""
        width = max(self.mask.shape[1], new.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, new.cache.layers, strict=True):
            mine.keys = torch.cat([_padded(mine.keys, 2, width), _padded(theirs.keys, 2, width)])
            mine.values = torch.cat([_padded(mine.values, 2, width), _padded(theirs.values, 2, width)])
        mask = torch.cat([_padded(self.mask, 1, width), _padded(new.mask, 1, width)])
        lengths = torch.cat([self.lengths, new.lengths])
        return _Batch(self.rows + new.rows, self.cache, mask, lengths, self.can_be_joined)

    def keep(self, places: list[int]) -> None:
        """Only these rows go on; columns on the left that are padding in all of them are cut."""
        kept = torch.tensor(places, device=self.mask.device)
        self.cache.batch_select_indices(kept)
        self.rows = [self.rows[i] for i in places]
        self.mask, self.lengths, self.next_ids = self.mask[kept], self.lengths[kept], self.next_ids[kept]
        unused = int(self.mask.any(0).to(torch.uint8).argmax())
        if unused and self.can_be_joined:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
            self.mask = self.mask[:, unused:]


def _padded(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Zeros in front along `dim`, up to `width`."""
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with; at least one token of each is left, whose logits are wanted."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most) if len(prompts) > 1 else 0
