"""Saving, loading, streaming and exporting the learner's weights, whatever they are sharded over.

Invariant: what is trained is saved, and nothing else. A frozen base is loaded again from where it came from, so an
adapter's checkpoint stays small.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmrl.errors import RunFailedError
from llmrl.learner.policy import Policy

TRAINED, PHASE = "trained.safetensors", "phase.json"


@dataclass
class Course:
    """Where training stands beside weights and optimizer: the schedule, and the updates in a row that float16's loss
    scale spoiled (`overflows`) or that were left out as not finite (`skipped`)."""

    scheduler: Any
    overflows: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.scheduler.state_dict(), "overflows": self.overflows, "skipped": self.skipped}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(saved["schedule"])
        self.overflows, self.skipped = saved["overflows"], saved["skipped"]


def register(accelerator: Accelerator, policy: Policy, course: Course) -> None:
    """Tell accelerate what a checkpoint holds: the trainable parameters and the course, besides optimizer and RNG."""
    accelerator.register_for_checkpointing(course)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return

    def write(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_file({n: p.detach().cpu().contiguous() for n, p in _trainable(policy).items()}, Path(folder) / TRAINED)

    def read(models: list[nn.Module], folder: str) -> None:
        models.clear()
        saved, mine = load_file(Path(folder) / TRAINED), _trainable(policy)
        if saved.keys() != mine.keys():
            raise RunFailedError(
                f"{folder} holds other parameters than are trained now, e.g. {sorted(saved.keys() ^ mine.keys())[:3]}"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def _trainable(policy: Policy) -> dict[str, nn.Parameter]:
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


def save(accelerator: Accelerator, folder: Path, phase: dict[str, Any]) -> None:
    """Write the training state into `folder`, and the options of the phase of training; called on all ranks."""
    extra = {"exclude_frozen_parameters": True} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    accelerator.save_state(str(folder), **extra)
    if accelerator.is_main_process:
        (folder / PHASE).write_text(json.dumps(phase) + "\n", encoding="utf-8")


def phase_of(folder: Path) -> dict[str, Any]:
    """The options of the phase in which `save` wrote: schedules are built from them before `load` says how far."""
    found: dict[str, Any] = json.loads((folder / PHASE).read_text(encoding="utf-8"))
    return found


def load(accelerator: Accelerator, folder: Path) -> None:
    """Restore what `save` wrote; called on all ranks, with the same number of ranks."""
    extra = {"load_module_strict": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    accelerator.load_state(str(folder), load_kwargs={"weights_only": True}, **extra)


def export(accelerator: Accelerator, model: nn.Module, causal_lm: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the model as transformers (or PEFT) saves it; called on all ranks, written by the first."""
    prefix = "causal_lm."
    gathered = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        weights = {name.removeprefix(prefix): tensor for name, tensor in gathered.items() if name.startswith(prefix)}
        causal_lm.save_pretrained(folder, state_dict=weights)
    accelerator.wait_for_everyone()


def stream_weights(causal_lm: nn.Module, bucket_bytes: int, partitioned: bool) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole; a tied weight comes once. Under ZeRO-3 (`partitioned`) at most `bucket_bytes` are
    gathered at a time, and all ranks must walk together."""
    if not partitioned:
        yield from ((name, parameter.detach()) for name, parameter in causal_lm.named_parameters())
        return
    import deepspeed

    for bucket in _buckets(list(causal_lm.named_parameters()), bucket_bytes):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            whole = [(name, parameter.detach().clone()) for name, parameter in bucket]
        yield from whole


def _buckets(parameters: list[tuple[str, Any]], bucket_bytes: int) -> Iterator[list[tuple[str, Any]]]:
    bucket: list[tuple[str, Any]] = []
    held = 0
    for name, parameter in parameters:
        size = parameter.ds_numel * parameter.element_size()
        if bucket and held + size > bucket_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, parameter))
        held += size
    if bucket:
        yield bucket
