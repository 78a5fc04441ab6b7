"""What only a GPU can show: the tree attention's kernel against the dense mask and padded rows, in numbers and in time.

    python benchmarks/gpu_check.py [--sections compile,right,attention,update,head,generate,more] [--seconds 215]

One JSON object a line, printed and written to `gpu_check.jsonl` in --out ($OUT, or the current folder). A section or a
case that fails is reported as a line with `error`, and the others go on; cases that no longer fit into --seconds are
reported as `skipped`. --small runs everything in miniature, also on a CPU (no kernel there, so forward passes only are
compared), to try the script itself. Models are random: nothing is read from a hub.
"""

import argparse
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_checks import generate, head, kernel, right, update
from gpu_checks.report import GPU, Report, clear

SECTIONS: dict[str, Callable[[Report, bool], None]] = {
    "compile": kernel.compile_section,
    "right": right.right_section,
    "attention": kernel.attention_section,
    "update": update.update_section,
    "head": head.head_section,
    "generate": generate.generate_section,
    "more": lambda report, small: right.right_section(report, small, more=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=215.0, help="cases are not begun after that")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.out / "gpu_check.jsonl", arguments.seconds)
    device = torch.cuda.get_device_name() if GPU else "CPU"
    report.line("machine", device=device, torch=torch.__version__, threads=torch.get_num_threads())
    for name in arguments.sections.split(","):
        try:
            SECTIONS[name](report, arguments.small)
        except Exception as error:
            report.line(name, error=f"{type(error).__name__}: {error}", where=traceback.format_exc().splitlines()[-6:])
        clear()
    report.line("end")


if __name__ == "__main__":
    main()
