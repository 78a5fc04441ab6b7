"""The output layer at a vocabulary of 152k: chunks of several sizes, and whole logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_checks.report import DEVICE, GPU, Report, measured, patched
from llmrl.learner import head


def head_section(report: Report, small: bool) -> None:
    """The output layer at a vocabulary of 152k, forward and backward: chunks of several sizes, and whole logits."""
    rows, hidden_size, vocabulary = (64, 64, 503) if small else (8192, 1536, 151_936)
    dtype = torch.bfloat16 if GPU else torch.float32
    layer = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=DEVICE, dtype=dtype)
    head.install(layer)
    hidden = torch.randn(rows, hidden_size, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)

    def whole() -> Tensor:
        logits = torch.nn.functional.linear(hidden, layer.weight).float()
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def case(name: str, trainable: bool, with_entropy: bool, elements: int) -> dict[str, Any]:
        layer.weight.requires_grad_(trainable)

        def once() -> None:
            layer.weight.grad = hidden.grad = None
            if name == "whole":
                whole().mean().backward()
            else:
                logprobs, entropies = layer(hidden, targets, None, with_entropy)
                (logprobs.mean() + (entropies.mean() if with_entropy else 0.0)).backward()

        with patched(
            head, CHUNK_ELEMENTS={"cpu": elements, "cuda": elements}, MAX_CHUNK_ROWS={"cpu": 2**20, "cuda": 2**20}
        ):
            return {"chunk_rows": max(1, elements // vocabulary), **measured(once, repeats=3, warm_ups=1)}

    for trainable in (False, True):
        kind = "trainable" if trainable else "frozen"
        for power in (23, 25, 26, 27, 28):
            report.case("head", f"chunks of 2^{power}, {kind}", partial(case, "chunked", trainable, False, 2**power))
        report.case("head", f"whole, {kind}", partial(case, "whole", trainable, False, 1))
    report.case("head", "chunks of 2^26, frozen, with entropy", partial(case, "chunked", False, True, 2**26))
