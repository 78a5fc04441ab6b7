"""The quickstart: SFT, then DPO on the tuned model's own answers, and what each brought on held-out problems.

    launch/quickstart [--preset laptop|tiny] [--output_dir DIR]

It only runs the project's own commands, one after the other, and shows them; given again, it goes on where it was
stopped.
"""

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmrl import models
from llmrl.errors import RefusedError
from llmrl.evaluation.intervals import paired_difference_interval
from llmrl.files import read_json, write_json
from llmrl.runs.commands import is_done, launch, run_shown
from llmrl.runs.report import write_report

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROBLEMS = ["--tables", "problems", "sft", "--levels", "1", "--scale", "5"]
"""Two-digit sums only: a short training on one kind of problem brings a small model from little to much."""
SAMPLING = {
    "laptop": ["--max_prompts", "160", "--max_rows", "112", "--max_new_tokens", "48"],
    "tiny": ["--max_prompts", "800", "--max_rows", "960", "--max_new_tokens", "64"],
}
LEAST_PAIRS = "32"
SHOWN = 3
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What one of the three models did: the metrics of its answers, and which of the problems it had right."""

    label: str
    metrics: Metrics
    correct: list[bool]

    def gain_interval(self, before: "Stage") -> tuple[float, float]:
        """95% interval of the gain in accuracy over an earlier stage, on the same problems."""
        return paired_difference_interval(self.correct, before.correct)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=("laptop", "tiny"), default="laptop", help="SmolLM2-135M, or a small starter"
    )
    parser.add_argument("--output_dir", type=Path, help="default: runs/quickstart-PRESET")
    args = parser.parse_args()
    # It trains on the CPU: DeepSpeed need not look for anything else, nor warn that it found nothing.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    console, began = Console(), time.monotonic()

    preset = available_preset(args.preset, console)
    out = output_directory(args.output_dir or ROOT / "runs" / f"quickstart-{preset}", console)
    data, sft, pairs, dpo = out / "data", out / "sft", out / "pairs.jsonl", out / "dpo"
    if not data.exists():
        unfinished = out / ".tmp_data"
        generator = [str(ROOT / "data/arithmetic/generate.py"), "--output", str(unfinished)]
        run_shown(console, "problems and worked answers", [*generator, *PROBLEMS], ROOT)
        unfinished.rename(data)
    judge = ["--task_evaluation.dataset_name", str(data / "problems")]
    changes = ["--dataset_name", str(data / "sft" / "train.jsonl"), *judge]
    recipe(console, "1/3 supervised fine-tuning on worked answers", "sft", preset, sft, *changes)
    if not pairs.exists():
        words = sampling(str(sft / "final"), str(data / "problems"), str(pairs), preset)
        run_shown(console, "2/3 the tuned model's own right and wrong answers", words, ROOT)
    changes = ["--model_name_or_path", str(sft / "final"), "--dataset_name", str(pairs), *judge]
    recipe(console, "3/3 DPO on them", "dpo", preset, dpo, *changes)
    return conclude(console, out, sft, dpo, time.monotonic() - began)


def sampling(model: str, problems: str, pairs: str, preset: str) -> list[str]:
    """The words after `python` that have the model answer problems, and pair its right answers with its wrong ones."""
    named = ["--model", model, "--prompts", problems, "--output", pairs, "--form", "pairs", "--least_rows", LEAST_PAIRS]
    return ["-m", "llmrl.cli", "sample", *named, *SAMPLING[preset]]


def available_preset(preset: str, console: Console) -> str:
    """`laptop` where SmolLM2 can be had, else `tiny`, aloud."""
    if preset == "laptop":
        try:
            models.smollm2(console.print)
        except RefusedError as error:
            console.print(f"[bold]SmolLM2 cannot be had here, so the starter model takes its place:[/] {error}")
            return "tiny"
    return preset


def output_directory(out: Path, console: Console) -> Path:
    """The directory itself, or the next free name beside one that holds a finished quickstart."""
    number, chosen = 2, out
    while (chosen / "summary.json").exists():
        chosen, number = out.with_name(f"{out.name}-{number}"), number + 1
    if chosen != out:
        console.print(f"{out} holds a finished quickstart; this one goes to {chosen}")
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def recipe(console: Console, title: str, method: str, preset: str, out: Path, *changes: str) -> None:
    """One training run, by the command that anyone would give; skipped where it is done."""
    if is_done(out):
        console.print(f"{title}: done before, in {out}")
        return
    arguments = ["--output_dir", str(out), "--resume_from_checkpoint", "latest", *changes]
    run_shown(console, title, launch(ROOT, f"{method}/run.py", HERE / f"{preset}_{method}.yaml", *arguments), ROOT)


def conclude(console: Console, out: Path, sft: Path, dpo: Path, seconds: float) -> int:
    """The table, the report, and whether each stage was clearly above the one before."""
    first, second = read_json(sft / "summary.json", {}), read_json(dpo / "summary.json", {})
    answered = merged_samples(sft, dpo)
    stages = [
        Stage("start", first["eval_before"]["task"], correct(answered, "start")),
        Stage("after SFT", first["eval_after"]["task"], correct(answered, "after SFT")),
        Stage("after DPO", second["eval_after"]["task"], correct(answered, "after DPO")),
    ]
    shutil.copyfile(dpo / "metrics.jsonl", out / "metrics.jsonl")
    write_json(out / "stages.json", [{"label": stage.label, "metrics": stage.metrics} for stage in stages])
    write_json(out / "evals.json", read_json(dpo / "evals.json", {}))
    # Those that tell the stages apart first.
    telling = sorted(answered, key=lambda item: len({c["correct"] for c in item["completions"]}), reverse=True)
    write_json(out / "samples.json", telling[:SHOWN])
    clear = all(after.gain_interval(before)[0] > 0 for before, after in pairwise(stages))
    tokens = first["num_tokens"] + second["num_tokens"]
    reason = None if clear else "a stage was not clearly above the one before"
    summary = {
        "status": "completed" if clear else "failed",
        "reason": reason,
        "steps": first["steps"] + second["steps"],
    }
    write_json(
        out / "summary.json",
        {
            **summary,
            "seconds": round(seconds, 1),
            "num_tokens": tokens,
            "stages": {stage.label: stage.metrics for stage in stages},
        },
    )

    console.rule("[bold]held-out problems, answered greedily")
    console.print(table(stages))
    console.print(
        f"report: {write_report(out)}\nmodels: {sft / 'final'} and {dpo / 'final'}\ntime: {seconds / 60:.1f} minutes"
    )
    if not clear:
        console.print(f"[bold red]This is a failed quickstart:[/] {reason} (95% interval of the difference).")
    return 0 if clear else 1


def table(stages: list[Stage]) -> Table:
    shown = Table("stage", "accuracy", "95% interval", "gain", "95% interval of the gain")
    before: Stage | None = None
    for stage in stages:
        metrics = stage.metrics
        interval = f"{metrics['accuracy_interval_low']:.1%} to {metrics['accuracy_interval_high']:.1%}"
        gain = bounds = ""
        if before is not None:
            gain = f"{100 * (metrics['accuracy'] - before.metrics['accuracy']):+.1f} points"
            low, high = stage.gain_interval(before)
            bounds = f"{100 * low:+.1f} to {100 * high:+.1f} points"
        shown.add_row(stage.label, f"{metrics['accuracy']:.1%}", interval, gain, bounds)
        before = stage
    return shown


def correct(answered: list[dict[str, Any]], label: str) -> list[bool]:
    """Of each problem, whether the model of that stage had it right."""
    return [
        completion["correct"] for item in answered for completion in item["completions"] if completion["label"] == label
    ]


def merged_samples(sft: Path, dpo: Path) -> list[dict[str, Any]]:
    """Every problem with what each of the three models answered."""
    merged = []
    for item, later in zip(read_json(sft / "samples.json", []), read_json(dpo / "samples.json", []), strict=True):
        if item["prompt"] != later["prompt"]:
            raise RefusedError(f"{sft} and {dpo} answered different problems: take another --output_dir")
        stages = [(item, "before", "start"), (item, "after", "after SFT"), (later, "after", "after DPO")]
        completions = [
            {**completion, "label": name}
            for source, label, name in stages
            for completion in source["completions"]
            if completion["label"] == label
        ]
        merged.append({**item, "completions": completions})
    return merged


if __name__ == "__main__":
    sys.exit(main())
