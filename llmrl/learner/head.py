r"""Log-probabilities of given tokens (and entropies) from hidden states, without ever holding [tokens, vocabulary].

With logits z = f(W h + b), f the model's own scaling or soft-cap divided by the sampling temperature:

    log p_n = z_{n, target} - logsumexp(z_n)             d log p_n / d z_n = onehot(target) - p_n
    H_n     = logsumexp(z_n) - sum_v p_nv z_nv           d H_n / d z_n     = -p_n (log p_n + H_n)

Both Jacobians are known in the forward pass, before anyone knows the upstream gradient g_n, one number per token. So
the forward keeps u_n = W^T f'(.) (onehot - p_n), [N, hidden], and the backward is g_n u_n: with a frozen head nothing
is computed twice. A trainable one recomputes its logits chunk by chunk in the backward, for the weight's gradient only.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**23
"""Logits held at once, in elements (32 MB in float32): rows per chunk shrink as the vocabulary grows."""
MAX_CHUNK_ROWS = 512


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
    ) -> tuple[Tensor, Tensor]:
        num, want_hidden = len(targets), ctx.needs_input_grad[0]
        compute_weight = weight.to(compute_dtype)
        logprobs = torch.empty(num, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty(num if with_entropy else 0, dtype=torch.float32, device=hidden.device)
        by_logprob = torch.empty_like(hidden) if want_hidden else None
        by_entropy = torch.empty_like(hidden) if want_hidden and with_entropy else None
        for rows in _chunks(num, len(weight)):
            logits = transform(_raw_logits(hidden[rows], compute_weight, bias))
            lse = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - lse
            if not want_hidden and not with_entropy:
                continue
            slope = transform.slope(logits)
            log_p = logits.sub_(lse[:, None])
            p = log_p.exp()
            if with_entropy:
                entropy = entropies[rows] = -(p * log_p).sum(-1)
                if by_entropy is not None:
                    jacobian = (log_p.add_(entropy[:, None]).mul_(p)).neg_().mul_(slope)
                    by_entropy[rows] = jacobian.to(compute_dtype) @ compute_weight
            if by_logprob is not None:
                by_logprob[rows] = _logprob_jacobian(p, targets[rows], slope).to(compute_dtype) @ compute_weight
        ctx.module, ctx.transform, ctx.with_entropy, ctx.compute_dtype = module, transform, with_entropy, compute_dtype
        kept = hidden if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(targets, by_logprob, by_entropy, kept)
        if not with_entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        targets, by_logprob, by_entropy, hidden = ctx.saved_tensors
        grad_hidden = None
        if by_logprob is not None:
            grad_hidden = by_logprob * grad_logprobs[:, None].to(by_logprob.dtype)
            if by_entropy is not None:
                grad_hidden += by_entropy * grad_entropies[:, None].to(by_entropy.dtype)
        grad_weight, grad_bias = None, None
        if hidden is not None:
            # Read from the module only now: under ZeRO-3 the full weight is gathered for the backward too, and a
            # tensor captured in the forward would have been emptied or kept alive.
            grad_weight, grad_bias = _parameter_gradients(ctx, hidden, targets, grad_logprobs, grad_entropies)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _parameter_gradients(
    ctx: Any, hidden: Tensor, targets: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor
) -> tuple[Tensor, Tensor | None]:
    weight, bias = ctx.module.weight, ctx.module.bias
    compute_weight = weight.to(ctx.compute_dtype)
    grad_weight = torch.zeros_like(weight)
    grad_bias = None if bias is None else torch.zeros_like(bias)
    for rows in _chunks(len(targets), len(weight)):
        logits = ctx.transform(_raw_logits(hidden[rows], compute_weight, bias))
        slope = ctx.transform.slope(logits)
        log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
        p = log_p.exp()
        grad_raw = None
        if ctx.with_entropy:
            entropy = -(p * log_p).sum(-1, keepdim=True)
            grad_raw = (log_p.add_(entropy).mul_(p)).neg_().mul_(slope).mul_(grad_entropies[rows, None])
        by_logprob = _logprob_jacobian(p, targets[rows], slope).mul_(grad_logprobs[rows, None])
        grad_raw = by_logprob if grad_raw is None else grad_raw.add_(by_logprob)
        left, right = grad_raw.to(ctx.compute_dtype).T, hidden[rows].to(ctx.compute_dtype)
        if ctx.compute_dtype == weight.dtype:
            grad_weight.addmm_(left, right)
        else:  # autocast: multiply in the low precision, accumulate in the weight's own
            grad_weight.add_(left @ right)
        if grad_bias is not None:
            grad_bias += grad_raw.sum(0)
    return grad_weight, grad_bias


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    step = max(1, min(MAX_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(
        hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    ).float()


def _logprob_jacobian(p: Tensor, targets: Tensor, slope: Tensor | float) -> Tensor:
    """(onehot - p) times the transform's slope, in place of `p`."""
    jacobian = p.neg_()
    jacobian.scatter_add_(1, targets[:, None], torch.ones_like(targets[:, None], dtype=p.dtype))
    return jacobian.mul_(slope)


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
            )

    head.forward = types.MethodType(forward, head)  # type: ignore[method-assign]
