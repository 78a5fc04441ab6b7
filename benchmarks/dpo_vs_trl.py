"""DPO in llmrl and in TRL's DPOTrainer: time, memory and losses on the same model, pairs and batches.

    python benchmarks/dpo_vs_trl.py            all cells; the better part of an hour on two cores
    python benchmarks/dpo_vs_trl.py --quick    two small cells, under two minutes
    python benchmarks/dpo_vs_trl.py --resume   go on with a run that was ended: cells already measured are kept

Every measurement is a process of its own (`worker.py`); toolkits take turns, and a ratio is between measurements of the
same round. TRL runs twice: as installed, and with its head's row selection forced on for the CPU, as a GPU run has it.
Fails when the losses or the token ids of the toolkits differ.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import document
import measuring
import workloads
from processes import in_own_process
from workloads import Cell

TOOLKITS = ("llmrl", "trl", "trl_selecting")
TOLERANCE = 1e-5
SHAPES = ("long prompt", "short prompt", "ragged")
QUICK = [Cell(4096, "long prompt", True), Cell(4096, "ragged", False)]
FULL = [
    *(Cell(32768, shape, use_peft) for use_peft in (True, False) for shape in SHAPES),
    *(Cell(4096, shape, True) for shape in SHAPES),
    Cell(4096, "long prompt", False),
    *(Cell(0, shape, True) for shape in ("few-shot", "question")),
    Cell(0, "few-shot", False),
    *(Cell(131072, shape, True) for shape in SHAPES),
    Cell(131072, "long prompt", False),
]
MEASUREMENTS = Path(__file__).resolve().parent / "results" / "dpo_vs_trl.json"
Measurements = list[dict[str, Any]]
"""By round: what each toolkit's worker found, under the toolkit's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small cells")
    parser.add_argument("--cells", nargs="+", default=[""], help="only those whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=0, help="measurements of each toolkit a cell (3; with --quick 1)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each process (default: the number of cores)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the cells that are in the file of measurements")
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="every measurement, as JSON")
    parser.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the tables go")
    arguments = parser.parse_args()
    cells = [
        cell for cell in (QUICK if arguments.quick else FULL) if any(part in cell.name for part in arguments.cells)
    ]
    if not cells:
        parser.error(f"no cell's name contains {arguments.cells}; there are: {'; '.join(c.name for c in FULL)}")
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    done = json.loads(arguments.measurements.read_text()) if arguments.resume else {}
    with tempfile.TemporaryDirectory(prefix="llmrl_benchmark_") as scratch:
        for cell in cells:
            if cell.name not in done:
                found = measured(cell, Path(scratch), rounds, arguments.threads)
                check_equal(cell, found)
                done[cell.name] = found
                arguments.measurements.parent.mkdir(parents=True, exist_ok=True)
                arguments.measurements.write_text(json.dumps(done, indent=1) + "\n")
            results = [(cell, done[cell.name]) for cell in cells if cell.name in done]
            document.write_section(arguments.document, "dpo_vs_trl", report(results))
    print(report([(cell, done[cell.name]) for cell in cells]))


def measured(cell: Cell, scratch: Path, rounds: int, threads: int) -> Measurements:
    """All toolkits in turn, `rounds` times."""
    folder = scratch / str(cell.vocabulary)
    folder.mkdir(exist_ok=True)
    workloads.build(cell, folder)
    found: Measurements = []
    for number in range(1, rounds + 1):
        found.append({})
        for toolkit in TOOLKITS:
            began = time.perf_counter()
            load = os.getloadavg()[0]
            wanted = {"cell": cell.to_dict(), "folder": str(folder), "toolkit": toolkit}
            found[-1][toolkit] = one = in_own_process("worker.py", wanted, folder, threads)
            one |= {"threads": threads, "load": load}
            workloads.clear(folder)
            print(
                f"{cell.name}: round {number}, {toolkit}: {one['cpu_seconds']:.2f} CPU s, {one['wall_seconds']:.2f} s, "
                f"{one['extra_mb']:.0f} MB (process: {time.perf_counter() - began:.0f} s)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return found


def check_equal(cell: Cell, found: Measurements) -> None:
    """Ends the benchmark unless all toolkits trained on the same token ids and had the same loss at every step."""
    for number, one in enumerate(found, 1):
        ours = one["llmrl"]
        for toolkit in TOOLKITS[1:]:
            theirs = one[toolkit]
            if ours["pairs"] != theirs["pairs"]:
                sys.exit(f"{cell.name}, round {number}: llmrl and {toolkit} trained on different token ids")
            if len(ours["losses"]) != cell.steps or len(theirs["losses"]) != cell.steps:
                sys.exit(f"{cell.name}: {ours['losses']} and {theirs['losses']} are not {cell.steps} losses each")
            if difference(ours["losses"], theirs["losses"]) > TOLERANCE:
                sys.exit(
                    f"{cell.name}, round {number}: the losses of llmrl and {toolkit} differ by more than {TOLERANCE}: "
                    f"{ours['losses']}, {theirs['losses']}"
                )


def difference(ours: list[float], theirs: list[float]) -> float:
    """Largest absolute difference; infinite if anything is not a number."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return math.inf if any(not math.isfinite(d) for d in differences) else max(differences)


def report(results: list[tuple[Cell, Measurements]]) -> str:
    """The section of the document: conditions, speed, memory, losses."""
    packages = ("torch", "transformers", "accelerate", "peft", "trl")
    ones = [one for _, found in results for a_round in found for one in a_round.values()]
    loads, threads = [one["load"] for one in ones], sorted({one["threads"] for one in ones})
    rounds = sorted({len(found) for _, found in results})
    conditions = (
        f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}; "
        f"threads of a process: {_listed(threads)}; "
        f"load average before a measurement {min(loads):.1f} to {max(loads):.1f}. "
        f"{measuring.versions(*packages)}."
    )
    parts = [
        "## DPO: llmrl and TRL's DPOTrainer",
        conditions,
        EXPLANATION.format(rounds=_listed(rounds)),
        "### Speed",
        document.table(SPEED_HEADER, [_speed(cell, found) for cell, found in results]),
        "### Memory and losses",
        document.table(MEMORY_HEADER, [_memory(cell, found) for cell, found in results]),
    ]
    return "\n\n".join(parts)


EXPLANATION = """\
Each figure is the median of the rounds ({rounds}), in brackets the lowest and the highest. A step is the time from the
loaded model to the end of training, divided by the number of steps: reference log-probabilities (TRL: in every step;
llmrl: ahead of training for full tuning, in every step for LoRA), forward, backward, update and logging are all in it.
CPU seconds are those of all threads of the process.

*TRL* is DPOTrainer as installed with the settings of a CPU user: float32, `use_cpu`, no gradient checkpointing (its
default, which saves memory for about a third more time, is off), the reference made within the step, losses logged at
every step as llmrl does. *TRL, rows selected* is the same with the row selection of its fused head forced on, which it
otherwise has on GPUs only. Both toolkits have the whole batch in one micro-batch. Of extra memory, the peak above the
loaded policy, the second copy of the weights that TRL keeps as the reference for full tuning is a part.

The *token bound* is the slots that TRL computes (padding and repeated prompts included) over the tokens that llmrl
computes: the gain over *TRL, rows selected* if every token cost the same."""

SPEED_HEADER = [
    "vocabulary, shape, tuning", "token bound", "llmrl: CPU s a step", "llmrl: tokens a CPU s", "TRL / llmrl, CPU",
    "TRL / llmrl, wall", "TRL, rows selected / llmrl, CPU", "TRL, rows selected / llmrl, wall",
]  # fmt: skip
MEMORY_HEADER = [
    "vocabulary, shape, tuning", "llmrl: extra MB", "TRL: extra MB", "TRL, rows selected: extra MB", "llmrl / TRL",
    "llmrl / TRL, rows selected", "first and last loss", "largest difference of a loss",
]  # fmt: skip


def _speed(cell: Cell, found: Measurements) -> list[str]:
    ours, theirs = found[0]["llmrl"], found[0]["trl"]
    cpu = median(one["llmrl"]["cpu_seconds"] for one in found)
    return [
        cell.name,
        f"{theirs['slots'] / ours['computed_tokens']:.2f}",
        f"{cpu / cell.steps:.2f}",
        f"{theirs['real_tokens'] / cpu:.0f}",
        *(_ratios(found, t, "llmrl", f) for t in TOOLKITS[1:] for f in ("cpu_seconds", "wall_seconds")),
    ]


def _memory(cell: Cell, found: Measurements) -> list[str]:
    losses = found[0]["llmrl"]["losses"]
    apart = max(difference(one["llmrl"]["losses"], one[t]["losses"]) for one in found for t in TOOLKITS[1:])
    return [
        cell.name,
        *(f"{median(one[t]['extra_mb'] for one in found):.0f}" for t in TOOLKITS),
        *(_ratios(found, "llmrl", t, "extra_mb") for t in TOOLKITS[1:]),
        f"{losses[0]:.4f}, {losses[-1]:.4f}",
        f"{apart:.1e}",
    ]


def _listed(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def _ratios(found: Measurements, above: str, below: str, figure: str) -> str:
    """Median, lowest and highest ratio of a figure between two toolkits in the same round."""
    ratios = sorted(one[above][figure] / one[below][figure] for one in found)
    return f"{median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]"


if __name__ == "__main__":
    main()
