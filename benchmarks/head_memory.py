"""Peak memory of the log-prob pass against vocabulary size: llmrl's chunked head, and the plain full logits beside it.

    python benchmarks/head_memory.py            4k to 128k, about three minutes
    python benchmarks/head_memory.py --quick    4k and 32k

One forward and backward of the head alone, from hidden states that need a gradient to one log-probability a token, in a
process of its own. Fails when log-probabilities or gradients of the two ways differ, or the chunked pass grows with the
vocabulary by more than the head's own gradient and one chunk of logits.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import document
import measuring
from measuring import Meter
from processes import in_own_process

ROWS, HIDDEN = 1024, 512
VOCABULARIES = (4096, 8192, 16384, 32768, 65536, 131072)
CHUNKS = 5
"""Chunks of logits that may be alive at once, with what else the pass holds."""
FIGURES = ("logprob_sum", "hidden_gradient_norm", "weight_gradient_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="vocabularies of 4k and 32k only")
    parser.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the table goes")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmrl_benchmark_") as scratch:
        for vocabulary in (4096, 32768) if arguments.quick else VOCABULARIES:
            for trainable in (False, True):
                rows.append(_compared(vocabulary, trainable, Path(scratch)))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = report(rows)
    document.write_section(arguments.document, "head_memory", text)
    print(text)


def _compared(vocabulary: int, trainable: bool, folder: Path) -> list[str]:
    wanted = {"vocabulary": vocabulary, "trainable": trainable}
    chunked, plain = (
        in_own_process("head_memory.py", wanted | {"chunked": chunked}, folder, threads=1) for chunked in (True, False)
    )
    check(chunked, plain, **wanted)
    return _row(chunked, plain, **wanted)


def measure(specification: Path, result: Path) -> None:
    result.write_text(json.dumps(peak(**json.loads(specification.read_text()))))


def peak(vocabulary: int, trainable: bool, chunked: bool) -> dict[str, float]:
    """Extra megabytes of one forward and backward in this process, and figures that must not depend on the way."""
    import torch

    from llmrl.learner import head

    torch.manual_seed(0)
    layer = torch.nn.Linear(HIDDEN, vocabulary, bias=False).requires_grad_(trainable)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    targets = torch.randint(vocabulary, (ROWS,))
    upstream = torch.randn(ROWS)
    if chunked:
        head.install(layer)
    _pass(layer, hidden, targets, upstream, chunked, rows=8)  # what is set up once does not count
    hidden.grad = layer.weight.grad = None
    meter = Meter()
    meter.start()
    logprobs = _pass(layer, hidden, targets, upstream, chunked)
    meter.stop()
    weight_norm = float(layer.weight.grad.norm()) if trainable else 0.0
    found = (float(logprobs.sum()), float(hidden.grad.norm()), weight_norm)
    return {"extra_mb": meter.extra_mb} | dict(zip(FIGURES, found, strict=True))


def _pass(layer: Any, hidden: Any, targets: Any, upstream: Any, chunked: bool, rows: int = ROWS) -> Any:
    hidden, targets, upstream = hidden[:rows], targets[:rows], upstream[:rows]
    full = None if chunked else layer(hidden).log_softmax(-1)
    logprobs = layer(hidden, targets)[0] if full is None else full.gather(1, targets[:, None])[:, 0]
    (logprobs * upstream).sum().backward()
    return logprobs.detach()


def _gradient_mb(vocabulary: int, trainable: bool) -> float:
    return vocabulary * HIDDEN * 4 / 1e6 if trainable else 0.0


def check(chunked: dict[str, float], plain: dict[str, float], vocabulary: int, trainable: bool) -> None:
    """Ends the benchmark where the two ways do not compute the same, or the chunked one is not flat."""
    from llmrl.learner import head

    for name in FIGURES:
        if abs(chunked[name] - plain[name]) > 1e-4 * max(abs(plain[name]), 1e-6):
            sys.exit(f"vocabulary {vocabulary}: {name} is {chunked[name]} in chunks, {plain[name]} in full")
    kept = 4 * head.KEPT_ELEMENTS["cpu"] / 1e6 if trainable else 0.0
    allowed = _gradient_mb(vocabulary, trainable) + kept + CHUNKS * 4 * head.CHUNK_ELEMENTS["cpu"] / 1e6
    if chunked["extra_mb"] > allowed:
        sys.exit(f"vocabulary {vocabulary}: the chunked pass took {chunked['extra_mb']:.0f} MB, allowed {allowed:.0f}")


def _row(chunked: dict[str, float], plain: dict[str, float], vocabulary: int, trainable: bool) -> list[str]:
    gradient = _gradient_mb(vocabulary, trainable)
    return [
        f"{vocabulary // 1024}k, {'trainable' if trainable else 'frozen'}",
        f"{vocabulary * HIDDEN * 4 / 1e6:.0f}",
        f"{gradient:.0f}",
        f"{chunked['extra_mb']:.0f}",
        f"{chunked['extra_mb'] - gradient:.0f}",
        f"{plain['extra_mb']:.0f}",
        f"{plain['extra_mb'] - gradient:.0f}",
    ]


def report(rows: list[list[str]]) -> str:
    """The section of the document."""
    header = [
        "vocabulary, head", "weights MB", "their gradient MB", "llmrl: peak MB", "without the gradient",
        "full logits: peak MB", "without the gradient",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "## Memory of the log-prob pass against vocabulary size",
            f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}. {measuring.versions('torch')}.",
            f"Forward and backward of the output layer alone for {ROWS} scored tokens of {HIDDEN} hidden units in "
            "float32: how far the resident memory of the process rises above hidden states and weights. Both ways give "
            "the same log-probabilities and gradients (checked to 1e-4). What is left of llmrl's peak without the "
            "gradient is a few chunks of logits of 32 MB each, whatever the vocabulary, and with a trainable head up "
            "to 128 MB of Jacobians, which save computing those logits again.",
            document.table(header, rows),
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
