"""One process, DDP or DeepSpeed ZeRO behind two verbs, so that nothing above has to know which of them runs.

Invariants
- A loss handed to `backward` is a sum over this rank's items divided by a *global* count. DDP and ZeRO average over
  ranks, so it is multiplied by the number of ranks here, and only here.
- Gradients are reduced over ranks once per optimizer step, however many micro-batches there were.
- Only the policy is split (ZeRO-3): a model made after it, by us or by a reward function, is whole on each rank.
- What was launched is what runs: `accelerate` starts unconnected single processes in several combinations of launch
  file and arguments (each then trains apart, in silence), so the outcome is checked.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from llmrl.errors import RefusedError
from llmrl.learner.gradient_apart import GradientApart

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""More than any rank does alone while the others wait in a collective. What may take longer ends in a `Meeting`."""


def build_accelerator(mixed_precision: str = "no") -> Accelerator:
    """An Accelerator that runs what the launcher started: one process, DDP, or ZeRO; on GPUs or on CPUs over gloo.

    mixed_precision: `no`, `bf16` or `fp16`. Raises RefusedError if the ranks would train apart.
    """
    world_size, on_cpu = int(os.environ.get("WORLD_SIZE", "1")), not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    skip_shared_memory_op()
    handlers = []
    if world_size > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=COLLECTIVE_TIMEOUT))
    accelerator = Accelerator(cpu=on_cpu and not deepspeed, mixed_precision=mixed_precision, kwargs_handlers=handlers)
    expected = (
        {DistributedType.DEEPSPEED}
        if deepspeed
        else {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    )
    if accelerator.num_processes != world_size or accelerator.distributed_type not in expected:
        raise RefusedError(
            f"the launcher started {world_size} process(es) but accelerate reports {accelerator.num_processes} as "
            f"{accelerator.distributed_type}: they would train apart. Use a file from launch/accelerate/."
        )
    return accelerator


def skip_shared_memory_op() -> None:
    """Have DeepSpeed's processes on CPUs meet without an op that it would compile first; before they meet.

    Training does not need it, building it takes minutes, and a run killed meanwhile leaves a lock behind on which every
    later run hangs.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Backend(Protocol):
    """How gradients are accumulated, reduced and applied."""

    model: nn.Module
    applied: bool
    """Whether the last `apply` changed the weights: a gradient that is not finite leaves them as they are."""
    overflowed: bool
    """Whether it did not because float16's loss scale was too high for it, and has been lowered."""

    def step(self) -> AbstractContextManager[None]:
        """Around all the micro-batches of one optimizer step."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of a micro-batch's share of the loss."""

    def apply(self) -> float:
        """Clip, update the weights, clear the gradients; returns the global gradient norm before clipping."""

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward."""


class PlainBackend:
    """One process, or DDP."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        apart: nn.Module | None = None,
    ) -> None:
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.applied = self.overflowed = False
        self.apart = [] if apart is None else list(apart.parameters())
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        if accelerator.num_processes > 1 and not isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise RefusedError(
                f"{accelerator.num_processes} processes, but the model was not wrapped for averaging gradients"
            )

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        yield

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def apply(self) -> float:
        apart, most = {id(p) for p in self.apart}, self.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_([p for p in self.model.parameters() if id(p) not in apart], most)
        if self.apart:
            norm = norm + 0 * nn.utils.clip_grad_norm_(self.apart, most)  # not finite if either is not
        scaler = self.accelerator.scaler
        scale = None if scaler is None else scaler.get_scale()
        self.applied = bool(torch.isfinite(norm))
        if scale is not None or self.applied:  # a loss scaler leaves the step out itself, and must hear of it
            self.optimizer.step()
        # `optimizer.step_was_skipped` does not tell: a fused optimizer's step is called, and skips on the device.
        self.overflowed = scale is not None and scaler.get_scale() < scale
        self.optimizer.zero_grad()
        return float(norm)


class DeepSpeedBackend:
    """ZeRO-1/2/3 through accelerate's plugin; the engine is driven directly: `Accelerator.backward` would step it."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        apart: nn.Module | None = None,
    ) -> None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=max_grad_norm)
        if config.get("zero_optimization", {}).get("stage", 0) == 0:
            raise RefusedError(
                "DeepSpeed with ZeRO stage 0 is plain DDP: launch with launch/accelerate/cpu_ddp.yaml or ddp8.yaml"
            )
        self.accelerator, self.applied, self.overflowed = accelerator, False, False
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        self.engine: Any = self.model
        # transformers would go on splitting every model that is made: one made by a single rank waits for the others.
        unset_hf_deepspeed_config()
        self.apart = None if apart is None else GradientApart(apart, self.engine, max_grad_norm)

    def step(self) -> AbstractContextManager[None]:
        return self.engine.coalesce_grad_reduction()

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.backward(loss * self.accelerator.num_processes)

    def apply(self) -> float:
        self.engine.set_gradient_accumulation_boundary(True)
        with contextlib.nullcontext() if self.apart is None else self.apart.brought_in():
            self.engine.step()
        # ZeRO calls any gradient that is not finite an overflow, in every precision, and steps over it.
        self.applied = not getattr(self.engine.optimizer, "overflow", False)
        self.overflowed = not self.applied and bool(self.engine.fp16_enabled())
        return float(self.engine.get_global_grad_norm())


def build_backend(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    apart: nn.Module | None = None,
) -> Backend:
    """The backend for what was launched. `apart`: a part of the policy, whose optimizer groups are marked
    `part: VALUE_HEAD`; its gradient is clipped on its own, and is not in the norm that `apply` returns."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedBackend(accelerator, policy, optimizer, max_grad_norm, apart)
    return PlainBackend(accelerator, policy, optimizer, max_grad_norm, apart)


def zero_stage(accelerator: Accelerator) -> int:
    """0 without DeepSpeed, else the ZeRO stage."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)
