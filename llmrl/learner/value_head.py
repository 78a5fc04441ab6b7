"""The value head's two tensors in a file beside the model that an export leaves, and back from there."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmrl.errors import RefusedError
from llmrl.learner.learner import Learner
from llmrl.learner.sharding import zero_stage

FILE = "value_head.safetensors"


def save_value_head(learner: Learner, folder: Path) -> None:
    """Write `FILE` into an existing folder; called on all ranks, written by the first."""
    head = learner.policy.value_head
    assert head is not None, "this learner has no value head"
    if zero_stage(learner.accelerator) == 3:
        raise RefusedError("a value head is saved whole, and ZeRO-3 has split it: launch with ZeRO-2 or DDP")
    if learner.accelerator.is_main_process:
        save_file({name: p.detach().cpu().contiguous() for name, p in head.named_parameters()}, folder / FILE)
    learner.accelerator.wait_for_everyone()


def load_value_head(learner: Learner, folder: Path) -> None:
    """Take over what `save_value_head` wrote, for scoring; raises RefusedError where it is missing or does not fit."""
    head, file = learner.policy.value_head, folder / FILE
    assert head is not None, "this learner has no value head"
    if not file.is_file():
        raise RefusedError(
            f"{folder} holds no {FILE}, so its model is no critic; name a folder that a critic was saved to"
        )
    saved, mine = load_file(file), dict(head.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    if shapes != wanted:
        raise RefusedError(
            f"{file}: the value head has the shapes {shapes}, and the model beside it needs {wanted}: they are not of "
            "one critic. Remedy: name the folder of a critic as it was saved, or train it again"
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])
