r"""Log-probabilities of given tokens (and entropies) from hidden states, without ever holding [tokens, vocabulary].

With logits z = f(W h + b), f the model's own scaling or soft-cap divided by the sampling temperature:

    log p_n = z_{n, target} - logsumexp(z_n)             d log p_n / d z_n = onehot(target) - p_n
    H_n     = logsumexp(z_n) - sum_v p_nv z_nv           d H_n / d z_n     = -p_n (log p_n + H_n)

Both Jacobians are known in the forward pass, before anyone knows the upstream gradient g_n, one number per token. So
the forward keeps u_n = W^T f'(.) (onehot - p_n), [N, hidden], and the backward is g_n u_n: with a frozen head nothing
is computed twice. The gradient of a trainable one is the sum of f'(.) (onehot - p_n) g_n h_n^T: the first chunks'
Jacobians are kept for it, as many as KEPT_ELEMENTS holds, and the others' logits are computed again in the backward.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits held at once, in elements (32 MB and 256 MB in float32): rows per chunk shrink as the vocabulary grows. On an
H200, at a vocabulary of 152k, 2**26 takes 6% longer than chunks four times as large, and 2**23 twice as long."""
MAX_CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
KEPT_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}
"""Elements of Jacobians that a trainable head may keep from forward to backward (128 MB and 512 MB in float32), which
saves one of its four products."""


@dataclass(frozen=True)
class LogitTransform:
    """From W h + b to the logits that are sampled from: multiply by `scale`, soft-cap, divide by temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of_model(cls, config: Any, temperature: float = 1.0) -> "LogitTransform":
        """From a transformers config: Gemma's final soft-cap, Cohere's logit_scale, Granite's logits_scaling."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None), temperature)

    def __call__(self, raw: Tensor) -> Tensor:
        """[rows, V] float32 -> logits, in place."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return raw if factor == 1.0 else raw.mul_(factor)
        return raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d raw, from the logits: [rows, V], or one number where it is constant."""
        if self.softcap is None:
            return self.scale / self.temperature
        return (1 - (logits * (self.temperature / self.softcap)) ** 2) * (self.scale / self.temperature)


class _ChunkedLogProbs(torch.autograd.Function):
    """hidden [N, H], targets [N], module with weight [V, H] (and bias) -> log-probs [N], entropies [N] (or empty)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        module: nn.Linear,
        transform: LogitTransform,
        with_entropy: bool,
        compute_dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        # `needs_input_grad` does not know of no_grad: a parameter that requires a gradient says so there, too.
        num, want_hidden = len(targets), with_gradient and ctx.needs_input_grad[0]
        want_weight = with_gradient and any(ctx.needs_input_grad[1:3])
        compute_weight = weight.to(compute_dtype)
        logprobs, lse = (torch.empty(num, dtype=torch.float32, device=hidden.device) for _ in range(2))
        entropies = torch.empty(num if with_entropy else 0, dtype=torch.float32, device=hidden.device)
        by_logprob = torch.empty_like(hidden) if want_hidden else None
        by_entropy = torch.empty_like(hidden) if want_hidden and with_entropy else None
        jacobians: list[Tensor] = []  # of the first chunks, p - onehot; the entropy's would be a second set
        room = 0 if with_entropy or not want_weight else _of(KEPT_ELEMENTS, hidden.device.type)

        def one(rows: slice) -> None:
            """A chunk, in a function so that its logits are gone before the next one's are made."""
            logits = transform(_raw_logits(hidden[rows], compute_weight, bias))
            keep = rows.stop * len(weight) <= room
            slope = transform.slope(logits) if want_hidden or keep else 1.0
            at_target = logits.gather(1, targets[rows, None])[:, 0]
            kept = logits.clone() if with_entropy else None
            p, lse[rows] = _softmax_(logits)
            logprobs[rows] = at_target - lse[rows]
            if kept is not None:
                log_p = kept.sub_(lse[rows, None])
                entropy = entropies[rows] = -(p * log_p).sum(-1)
                if by_entropy is not None:
                    jacobian = _times((log_p.add_(entropy[:, None]).mul_(p)).neg_(), slope)
                    by_entropy[rows] = jacobian.to(compute_dtype) @ compute_weight
            if by_logprob is not None or keep:
                negative = _times(_minus_at(p, targets[rows], 1.0), slope).to(compute_dtype)
                if by_logprob is not None:
                    by_logprob[rows] = (negative @ compute_weight).neg_()
                if keep:
                    jacobians.append(negative)

        for rows in _chunks(num, len(weight), hidden.device.type):
            one(rows)
        ctx.module, ctx.transform, ctx.with_entropy, ctx.compute_dtype = module, transform, with_entropy, compute_dtype
        kept_hidden, kept_lse = (hidden, lse) if want_weight else (None, None)
        ctx.save_for_backward(targets, by_logprob, by_entropy, kept_hidden, kept_lse, *jacobians)
        if not with_entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        targets, by_logprob, by_entropy, hidden, lse, *jacobians = ctx.saved_tensors
        grad_hidden = None
        if by_logprob is not None:
            grad_hidden = by_logprob * grad_logprobs[:, None].to(by_logprob.dtype)
            if by_entropy is not None:
                grad_hidden += by_entropy * grad_entropies[:, None].to(by_entropy.dtype)
        grad_weight, grad_bias = None, None
        if hidden is not None:
            # Read from the module only now: under ZeRO-3 the full weight is gathered for the backward too, and a
            # tensor captured in the forward would have been emptied or kept alive.
            grad_weight, grad_bias = _parameter_gradients(
                ctx, hidden, targets, lse, jacobians, grad_logprobs, grad_entropies
            )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


@torch.no_grad()
def all_logprobs(head: nn.Linear, hidden: Tensor, transform: LogitTransform) -> Tensor:
    """[N, H] hidden states -> [N, V] float32 log-probabilities of the whole vocabulary."""
    return transform(_raw_logits(hidden, head.weight, head.bias)).log_softmax(-1)


def _parameter_gradients(
    ctx: Any,
    hidden: Tensor,
    targets: Tensor,
    lse: Tensor,
    jacobians: list[Tensor],
    grad_logprobs: Tensor,
    grad_entropies: Tensor,
) -> tuple[Tensor, Tensor | None]:
    weight, bias = ctx.module.weight, ctx.module.bias
    compute_weight = weight.to(ctx.compute_dtype)
    grad_weight = torch.zeros_like(weight)
    grad_bias = None if bias is None else torch.zeros_like(bias)

    def one(rows: slice) -> None:
        """A chunk, in a function so that its logits are gone before the next one's are made."""
        logits = ctx.transform(_raw_logits(hidden[rows], compute_weight, bias))
        slope = ctx.transform.slope(logits)
        log_p = logits.sub_(lse[rows, None])
        upstream = grad_logprobs[rows, None]
        if ctx.with_entropy:
            p = log_p.exp()
            entropy = -(p * log_p).sum(-1, keepdim=True)
            negative = log_p.add_(entropy).mul_(p).mul_(grad_entropies[rows, None]).add_(p.mul_(upstream))
        else:
            negative = log_p.exp_().mul_(upstream)
        negative = _times(_minus_at(negative, targets[rows], upstream), slope)
        add(negative.to(ctx.compute_dtype), hidden[rows])
        if grad_bias is not None:
            grad_bias.sub_(negative.sum(0))

    def kept(rows: slice, negative: Tensor) -> None:
        """A chunk whose Jacobian the forward has kept: the upstream gradient goes to the smaller factor."""
        add(negative, hidden[rows] * grad_logprobs[rows, None].to(hidden.dtype))
        if grad_bias is not None:
            grad_bias.sub_(grad_logprobs[rows].float() @ negative.float())

    def add(negative: Tensor, right: Tensor) -> None:
        left, right = negative.T, right.to(ctx.compute_dtype)
        if ctx.compute_dtype == weight.dtype:
            grad_weight.addmm_(left, right, alpha=-1)
        else:  # autocast: multiply in the low precision, accumulate in the weight's own
            grad_weight.sub_(left @ right)

    chunks = _chunks(len(targets), len(weight), hidden.device.type)
    for rows, jacobian in zip(chunks, jacobians, strict=False):
        kept(rows, jacobian)
    for rows in chunks[len(jacobians) :]:
        one(rows)
    return grad_weight, grad_bias


def _chunks(num_rows: int, vocabulary: int, device: str) -> list[slice]:
    step = max(1, min(_of(MAX_CHUNK_ROWS, device), _of(CHUNK_ELEMENTS, device) // vocabulary))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _of(sizes: dict[str, int], device: str) -> int:
    return sizes.get(device, sizes["cpu"])


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(
        hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    ).float()


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of [rows, V] in place of the logits, and their log-sum-exp [rows]: five passes and no second buffer."""
    top = logits.amax(-1, keepdim=True)
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), (top + total.log())[:, 0]


def _minus_at(values: Tensor, targets: Tensor, amount: Tensor | float) -> Tensor:
    """Subtract `amount` (a number, or [rows, 1]) at each row's target, in place."""
    at = targets[:, None]
    return values.scatter_add_(1, at, torch.zeros_like(at, dtype=values.dtype).sub_(amount))


def _times(values: Tensor, slope: Tensor | float) -> Tensor:
    """In place; a slope of one costs no pass over the logits."""
    return values if isinstance(slope, float) and slope == 1.0 else values.mul_(slope)


def install(head: nn.Linear) -> None:
    """Give an output layer a second way to be called: `head(hidden, targets, transform, with_entropy)`.

    The work has to happen inside the layer's own forward, for that is when ZeRO-3 has its weight gathered. Called with
    hidden states alone it stays what it was.
    """

    def forward(
        self: nn.Linear,
        hidden: Tensor,
        targets: Tensor | None = None,
        transform: LogitTransform | None = None,
        with_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            return type(self).forward(self, hidden)
        kind = hidden.device.type
        compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        with_gradient = torch.is_grad_enabled()
        with torch.autocast(kind, enabled=False):
            return _ChunkedLogProbs.apply(
                hidden,
                self.weight,
                self.bias,
                targets,
                self,
                transform or LogitTransform(),
                with_entropy,
                compute_dtype,
                with_gradient,
            )

    head.forward = types.MethodType(forward, head)  # type: ignore[method-assign]
