"""Steps of an online method in llmrl and in TRL: the update alone on the same rollouts, and whole steps.

    python benchmarks/rl_step.py               all cells, under ten minutes on two cores
    python benchmarks/rl_step.py --quick       miniature cells, under two minutes
    python benchmarks/rl_step.py --resume      go on with a run that was ended: cells already measured are kept

Every measurement is a process of its own (`rl_worker.py`); toolkits take turns, and a ratio is between measurements of
the same round. TRL runs twice: as installed, and with its head's row selection forced on for the CPU, as a GPU run has
it. Fails when losses or gradient norms of the same rollouts differ.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import document
import measuring
import rl_workloads
import workloads
from dpo_vs_trl import TOOLKITS, Measurements, difference
from processes import in_own_process
from rl_workloads import Cell

TOLERANCE = 1e-5
QUICK = [
    Cell("update", "tiny", 24, 2, 2, vocabulary=4096),
    Cell("grpo", "tiny", 24, 2, 2, vocabulary=4096, longest=32),
]
FULL = [
    Cell("update", "256 x 4", 115, 2, 3, longest=256),
    Cell("update", "256 x 4", 350, 2, 2, longest=256),
    Cell("update", "256 x 4", 115, 6, 2, longest=256),
    Cell("update", "512 x 8", 115, 2, 2, longest=256),
    Cell("grpo", "256 x 4", 115, 2, 3),
    Cell("grpo", "256 x 4", 350, 2, 2),
    Cell("rloo", "256 x 4", 115, 2, 3),
]
MEASUREMENTS = Path(__file__).resolve().parent / "results" / "rl_step.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="miniature cells")
    parser.add_argument("--cells", nargs="+", default=[""], help="only those whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each toolkit a cell")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are in the file of measurements")
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="every measurement, as JSON")
    parser.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the tables go")
    arguments = parser.parse_args()
    every = QUICK if arguments.quick else FULL
    cells = [cell for cell in every if any(part in label(cell) for part in arguments.cells)]
    if not cells:
        parser.error(f"no cell's name contains {arguments.cells}; there are: {'; '.join(map(label, every))}")
    done = json.loads(arguments.measurements.read_text()) if arguments.resume else {}
    for cell in cells:
        if label(cell) not in done:
            done[label(cell)] = measured(cell, arguments.rounds, arguments.threads)
            arguments.measurements.parent.mkdir(parents=True, exist_ok=True)
            arguments.measurements.write_text(json.dumps(done, indent=1) + "\n")
    text = report([(cell, done[label(cell)]) for cell in cells])
    document.write_section(arguments.document, "rl_step", text)
    print(text)


def label(cell: Cell) -> str:
    return f"{cell.what}: {cell.name}"


def measured(cell: Cell, rounds: int, threads: int) -> Measurements:
    """All toolkits in turn, `rounds` times; ends the benchmark where they do not agree."""
    found: Measurements = []
    with tempfile.TemporaryDirectory(prefix="llmrl_benchmark_") as scratch:
        folder = Path(scratch)
        rl_workloads.build(cell, folder)
        rl_workloads.write_prompts(cell, folder)
        for number in range(1, rounds + 1):
            found.append({})
            for toolkit in TOOLKITS:
                began, load = time.perf_counter(), os.getloadavg()[0]
                wanted = {"cell": asdict(cell), "folder": scratch, "toolkit": toolkit}
                one = in_own_process("rl_worker.py", wanted, folder, threads)
                found[-1][toolkit] = {**one, "threads": threads, "load": load}
                workloads.clear(folder)
                print(
                    f"{label(cell)}: round {number}, {toolkit}: {per_step(one, 1):.2f} CPU s, "
                    f"{per_step(one, 0):.2f} s, {one['extra_mb']:.0f} MB (process: "
                    f"{time.perf_counter() - began:.0f} s)",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    if cell.what == "update":
        check_equal(cell, found)
    return found


def check_equal(cell: Cell, found: Measurements) -> None:
    """Ends the benchmark unless all toolkits had the same loss and gradient norm at every step."""
    for one in found:
        for toolkit in TOOLKITS[1:]:
            for figure in ("losses", "grad_norms"):
                ours, theirs = one["llmrl"][figure], one[toolkit][figure]
                if len(ours) != cell.steps or len(theirs) != cell.steps:
                    sys.exit(f"{label(cell)}: {ours} and {theirs} are not {cell.steps} {figure} each")
                if apart(ours, theirs) > TOLERANCE:
                    sys.exit(f"{label(cell)}: {figure} of llmrl and {toolkit} differ: {ours}, {theirs}")


def apart(ours: list[float], theirs: list[float]) -> float:
    """Largest difference, relative where the numbers are above 1; infinite if anything is not a number."""
    scales = [max(abs(b), 1.0) for b in theirs]
    return difference(*([x / scale for x, scale in zip(numbers, scales, strict=True)] for numbers in (ours, theirs)))


def per_step(one: dict[str, Any], clock: int) -> float:
    """Seconds of a step once warm: the mean of those behind the first. `clock` 0: wall, 1: CPU."""
    laps = [lap[clock] for lap in one["laps"]]
    return (laps[-1] - laps[0]) / (len(laps) - 1) if len(laps) > 1 else laps[0]


def warm(values: list[Any]) -> list[Any]:
    """Those of the steps that `per_step` counts."""
    return values[1:] or values


def report(results: list[tuple[Cell, Measurements]]) -> str:
    """The section of the document."""
    ones = [one for _, found in results for a_round in found for one in a_round.values()]
    loads, threads = [one["load"] for one in ones], sorted({one["threads"] for one in ones})
    packages = ("torch", "transformers", "accelerate", "trl")
    conditions = (
        f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}; threads of a process: "
        f"{' or '.join(map(str, threads))}; load average before a measurement {min(loads):.1f} to {max(loads):.1f}. "
        f"{measuring.versions(*packages)}."
    )
    vocabularies = " or ".join(str(v) for v in sorted({cell.vocabulary for cell, _ in results}))
    explanation = EXPLANATION.format(vocabularies=vocabularies)
    parts = ["## Online methods: llmrl and TRL's GRPOTrainer and RLOOTrainer", conditions, explanation]
    updates = [result for result in results if result[0].what == "update"]
    if updates:
        parts += ["### The update alone", UPDATES, document.table(UPDATE_HEADER, [_update_row(*r) for r in updates])]
    whole = [result for result in results if result[0].what != "update"]
    if whole:
        longest = " or ".join(str(n) for n in sorted({cell.longest for cell, _ in whole}))
        parts += [
            "### Whole steps",
            WHOLE.format(longest=longest),
            document.table(STEP_HEADER, [_step_row(*r) for r in whole]),
        ]
        parts += [
            "Where the wall time of a step goes, in seconds (rollout / reward / everything else):",
            document.table(["method, model", *TOOLKIT_NAMES], [_breakdown_row(*result) for result in whole]),
        ]
    return "\n\n".join(parts)


TOOLKIT_NAMES = ["llmrl", "TRL", "TRL, rows selected"]
EXPLANATION = """\
Random Llamas with a vocabulary of {vocabularies}, named by hidden units x layers, all weights trained in float32;
prompts x 8 samples in one optimizer step. Seconds are those of a step once warm (all but the first); memory is the peak
above the loaded model over all steps. *TRL* is as installed with the settings of a CPU user: `use_cpu`, no gradient
checkpointing (its default, which saves memory for about a third more time, is off), a micro-batch for each prompt;
*TRL, rows selected* is the same with the row selection of its fused head forced on, which it otherwise has on GPUs
only."""
UPDATES = """\
The same rollouts (log-normal lengths, mean 54) with the same advantages: forward, backward, optimizer step and metrics.
Losses and gradient norms agree as the last column says. The *token bound* is the slots that TRL computes over the
tokens that llmrl computes."""
WHOLE = """\
Each toolkit as its user would call it, sampling from the model that is trained. An answer ends with chance 1/54 a token
and is cut at {longest}. Samples differ, so the ratios are those of CPU seconds for a sampled token. RLOO has a frozen
reference and its KL term in the reward in both toolkits, GRPO has none."""
UPDATE_HEADER = [
    "model, prompts", "token bound", "llmrl: CPU s a step", "TRL / llmrl, CPU", "TRL / llmrl, wall",
    "TRL, rows selected / llmrl, CPU", "TRL, rows selected / llmrl, wall", "llmrl: extra MB", "TRL: extra MB",
    "TRL, rows selected: extra MB", "largest difference",
]  # fmt: skip
STEP_HEADER = [
    "method, model", "llmrl: CPU s a step", "llmrl: sampled tokens a step", "TRL / llmrl, CPU", "TRL / llmrl, wall",
    "TRL, rows selected / llmrl, CPU", "TRL, rows selected / llmrl, wall", "llmrl: extra MB", "TRL: extra MB",
    "TRL, rows selected: extra MB",
]  # fmt: skip


def _update_row(cell: Cell, found: Measurements) -> list[str]:
    ours, theirs = found[0]["llmrl"], found[0]["trl"]
    largest = max(
        apart(one["llmrl"][figure], one[toolkit][figure])
        for one in found
        for toolkit in TOOLKITS[1:]
        for figure in ("losses", "grad_norms")
    )
    return [
        cell.name,
        f"{theirs['slots'] / ours['computed_tokens']:.2f}",
        f"{median(per_step(one['llmrl'], 1) for one in found):.2f}",
        *_ratios(found, lambda one, clock: per_step(one, clock)),
        *_memory(found),
        f"{largest:.1e}",
    ]


def _step_row(cell: Cell, found: Measurements) -> list[str]:
    return [
        f"{cell.what}, {cell.name}",
        f"{median(per_step(one['llmrl'], 1) for one in found):.2f}",
        f"{tokens_a_step(found[0]['llmrl']):.0f}",
        *_ratios(found, lambda one, clock: per_step(one, clock) / tokens_a_step(one)),
        *_memory(found),
    ]


def tokens_a_step(one: dict[str, Any]) -> float:
    return fmean(tokens for _, tokens in warm(one["rewards"]))


def _ratios(found: Measurements, figure: Any) -> list[str]:
    """Of each TRL over llmrl in the same round: CPU, then wall; the median, and the range of more than one round."""
    cells = []
    for toolkit in TOOLKITS[1:]:
        for clock in (1, 0):
            ratios = sorted(figure(one[toolkit], clock) / figure(one["llmrl"], clock) for one in found)
            spread = f" [{ratios[0]:.2f}-{ratios[-1]:.2f}]" if len(ratios) > 1 else ""
            cells.append(f"{median(ratios):.2f}{spread}")
    return cells


def _memory(found: Measurements) -> list[str]:
    return [f"{median(one[toolkit]['extra_mb'] for one in found):.0f}" for toolkit in TOOLKITS]


def _breakdown_row(cell: Cell, found: Measurements) -> list[str]:
    def parts(one: dict[str, Any]) -> str:
        reward = fmean(seconds for seconds, _ in warm(one["rewards"]))
        rollout = fmean(warm(one["rollout_seconds"]))
        # llmrl scores while it samples, so that its rollouts contain the reward.
        rollout -= reward if one is found[0]["llmrl"] else 0.0
        return f"{rollout:.2f} / {reward:.4f} / {per_step(one, 0) - rollout - reward:.2f}"

    return [f"{cell.what}, {cell.name}", *(parts(found[0][toolkit]) for toolkit in TOOLKITS)]


if __name__ == "__main__":
    main()
