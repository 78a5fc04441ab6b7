"""Under DeepSpeed: the gradient of a small part of the policy, kept out of the engine's common norm and clipping."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.learner.optimizer import VALUE_HEAD


class GradientApart:
    """What `part` gets as its gradient goes past the engine: the engine finds 0 there, so that the others are clipped
    as if it were not; right before the optimizer moves the part, its own clipped gradient is put in place.

    The engine still finds a gradient that is not finite (times 0 it is NaN), and leaves the step out. The part's
    optimizer groups are those marked `part: VALUE_HEAD`, one of each parameter and in their order; ZeRO keeps of each a
    flat piece on each rank, the ranks' pieces in order, the last filled up with zeros.
    """

    def __init__(self, part: nn.Module, engine: Any, max_grad_norm: float) -> None:
        self.engine, self.max_grad_norm = engine, max_grad_norm or float("inf")
        parameters = list(part.parameters())
        self._count = len(parameters)
        self._gradients: dict[int, Tensor] = {}
        self._waiting: list[Tensor] = []
        for number, parameter in enumerate(parameters):
            parameter.register_hook(lambda gradient, number=number: self._kept(number, gradient))
        engine.basic_optimizer.register_step_pre_hook(self._put_in_place)

    def _kept(self, number: int, gradient: Tensor) -> Tensor:
        """Add a micro-batch's gradient to what this rank has; the engine gets zeros."""
        mine = gradient.detach().float()
        self._gradients[number] = self._gradients[number] + mine if number in self._gradients else mine.clone()
        return gradient * 0

    @contextmanager
    def brought_in(self) -> Iterator[None]:
        """Around the engine's step."""
        found, self._gradients = self._gradients, {}
        self._waiting = self._clipped([found[number] for number in range(self._count)]) if found else []
        yield
        if self._waiting and not self.engine.optimizer.overflow:
            raise RuntimeError("DeepSpeed moved the value head without its gradient")

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        """Means over the ranks, without the loss scale, cut to the largest norm."""
        world_size = torch.distributed.get_world_size()
        scale = self.engine.optimizer.loss_scale if self.engine.fp16_enabled() else 1.0
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= world_size * scale
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return [gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for gradient in gradients]

    def _put_in_place(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Fill this rank's pieces of the part, of which the engine moves one after another."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for group in optimizer.param_groups:
            for piece in group["params"] if group["part"] == VALUE_HEAD and self._waiting else ():
                whole = self._waiting.pop(0).flatten()
                filled = nn.functional.pad(whole, (0, piece.numel() * world_size - whole.numel()))
                piece.grad.copy_(filled.chunk(world_size)[rank])
