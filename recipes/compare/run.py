"""The offline methods side by side: one model, the same samples of it, as many updates of as many completions, several
seeds; one table and one picture at the end.

    python recipes/compare/run.py [--methods dpo brain ...] [--seeds 0 1 2] [--output_dir DIR]

For each seed the model answers the prompts (llmrl sample), the answers become what each method takes, and every
method is trained by its own recipe's command. Given again, it goes on where it was stopped.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figure
from rich.console import Console
from rich.table import Table

from llmrl.errors import LlmrlError
from llmrl.evaluation.intervals import student_interval
from llmrl.evaluation.sampling.keys import Form, SampleKeys
from llmrl.evaluation.sampling.making import make
from llmrl.files import read_json, write_json
from llmrl.runs.commands import is_done, launch, run_shown

ROOT = Path(__file__).resolve().parents[2]
SAMPLES_PER_PROMPT, COMPLETIONS_PER_STEP, PAIRS_PER_PROMPT = 8, 64, 2


@dataclass(frozen=True)
class Method:
    """A recipe in the comparison. script, config: below recipes/. data: which form of the samples it takes, None where
    it samples by itself. arguments: a step of `COMPLETIONS_PER_STEP` completions, and what else is not as in config."""

    label: str
    script: str
    config: str
    data: Form | None
    arguments: tuple[str, ...] = ()


PAIRS = str(COMPLETIONS_PER_STEP // 2)
MAX_TOKENS = "64"  # of an answer
COMPARED = ("model", "problems", "rewards", "max_prompts", "heldout", "steps")
"""What all runs of a comparison have in common."""
OF_PAIRS = ("--learning_rate", "5e-5")  # that of all three alike: their presets' are for other pairs
METHODS = {
    "sft_best": Method(
        "SFT on the best", "sft/run.py", "sft/tiny.yaml", "best",
        ("--sequences_per_step", str(COMPLETIONS_PER_STEP), "--learning_rate", "3e-4"),
    ),
    "dpo": Method("DPO", "dpo/run.py", "dpo/tiny.yaml", "pairs", ("--pairs_per_step", PAIRS, *OF_PAIRS)),
    "vpo": Method("VPO", "vpo/run.py", "vpo/tiny.yaml", "pairs", ("--pairs_per_step", PAIRS, *OF_PAIRS)),
    "cpl": Method("CPL", "cpl/run.py", "cpl/tiny.yaml", "pairs", ("--comparisons_per_step", PAIRS, *OF_PAIRS)),
    "brain": Method(
        "BRAIn", "brain/run_offline.py", "brain/offline.yaml", "scored",
        ("--prompts_per_step", str(COMPLETIONS_PER_STEP // SAMPLES_PER_PROMPT)),
    ),
    # It needs completions from within answers: about as many sampled tokens as the others' answers, of fewer prompts.
    "direct_advantage": Method(
        "Direct Advantage", "direct_advantage/run.py", "direct_advantage/tiny.yaml", None,
        ("--rounds", "1", "--prompts_per_round", "256", "--kept_per_prompt", "2", "--completions_per_state", "6",
         "--states_per_step", "16", "--max_completion_length", MAX_TOKENS),
    ),
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    args = parsed(words)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    console, out = Console(), args.output_dir
    claim(args)
    results: dict[str, dict[str, Any]] = read_json(out / "results.json", {})
    for seed in args.seeds:
        folder = out / f"seed_{seed}"
        shared_samples(console, args, folder, seed)
        for name in args.methods:
            results[f"{name} {seed}"] = trained(console, args, METHODS[name], folder, seed)
            write_json(out / "results.json", results)
            conclude(args, results)
    show(console, args, results)
    return 0


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--problems", default="data/arithmetic/problems", help="with the splits train and validation")
    parser.add_argument("--rewards", nargs="+", default=["correct_number"])
    parser.add_argument("--max_prompts", type=int, default=1000)
    parser.add_argument("--heldout", type=int, default=400, help="held-out problems that are answered greedily")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each method")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "compare")
    args = parser.parse_args(words)
    if len(args.seeds) > 10 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds}: one to ten different ones")
    args.output_dir = args.output_dir.resolve()
    return args


def claim(args: argparse.Namespace) -> None:
    """Make the output directory this comparison's; refuse one in which another was made: its runs would count here."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    mine = {name: getattr(args, name) for name in COMPARED}
    there = read_json(args.output_dir / "settings.json", None)
    if there is None:
        write_json(args.output_dir / "settings.json", mine)
    for name in COMPARED if there is not None else ():
        if there.get(name) != mine[name]:
            sys.exit(
                f"{args.output_dir} holds a comparison with --{name} {there.get(name)}, and here it is {mine[name]}: "
                "what is done there would be taken for this one's. Remedy: another --output_dir"
            )


# -- one seed ----------------------------------------------------------------------------------------------------


def shared_samples(console: Console, args: argparse.Namespace, folder: Path, seed: int) -> None:
    """The samples that the methods learn from, in each form that one of them takes."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = folder / "scored.jsonl"
    if not samples.exists():
        words = [
            "-m", "llmrl.cli", "sample", "--model", args.model, "--prompts", args.problems, "--seed", str(seed),
            "--max_prompts", str(args.max_prompts), "--samples_per_prompt", str(SAMPLES_PER_PROMPT),
            "--max_new_tokens", MAX_TOKENS, "--output", str(samples), "--rewards", json.dumps(args.rewards),
        ]  # fmt: skip
        run_shown(console, f"seed {seed}: {SAMPLES_PER_PROMPT} samples of each prompt", words, ROOT)
    for form in dict.fromkeys(METHODS[method].data for method in args.methods):
        if form is None or (file := folder / f"{form}.jsonl").exists():
            continue
        keys = {"from_samples": str(samples), "form": form, "pairs_per_prompt": PAIRS_PER_PROMPT, "output": str(file)}
        try:
            make(SampleKeys.model_validate(keys), console.print)
        except LlmrlError as error:
            sys.exit(f"{samples}: {error}")


def trained(console: Console, args: argparse.Namespace, method: Method, folder: Path, seed: int) -> dict[str, Any]:
    """One method's run with this seed, made or found done: its accuracies, steps, tokens and seconds."""
    out = folder / method.label.lower().replace(" ", "_")
    if not is_done(out):
        run_shown(console, f"seed {seed}: {method.label}", command(args, method, folder, out, seed), ROOT)
    summary = read_json(out / "summary.json", {})
    return {
        "before": summary["eval_before"]["task"]["accuracy"],
        "after": summary["eval_after"]["task"]["accuracy"],
        "steps": summary["steps"],
        "num_tokens": summary["num_tokens"],
        "seconds": summary["seconds"],
    }


def command(args: argparse.Namespace, method: Method, folder: Path, out: Path, seed: int) -> list[str]:
    if method.data is None:
        data = ["--dataset_name", args.problems, "--rewards", json.dumps(args.rewards)]
    else:
        data = ["--dataset_name", str(folder / f"{method.data}.jsonl")]
    judged = {"dataset_name": args.problems, "dataset_test_split": "validation", "limit": args.heldout}
    return launch(
        ROOT, method.script, ROOT / "recipes" / method.config, "--model_name_or_path", args.model,
        "--output_dir", str(out), "--resume_from_checkpoint", "latest", "--seed", str(seed),
        "--max_steps", str(args.steps), "--eval_rows", "0", *data, *method.arguments,
        *(word for key, value in judged.items() for word in (f"--task_evaluation.{key}", str(value))),
    )  # fmt: skip


# -- the end -----------------------------------------------------------------------------------------------------


def by_method(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each method's runs, seed after seed: those of earlier calls, too."""
    keys = sorted(results, key=lambda key: int(key.rsplit(" ", 1)[1]))
    found = {name: [results[key] for key in keys if key.rsplit(" ", 1)[0] == name] for name in METHODS}
    return {name: runs for name, runs in found.items() if runs}


def conclude(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """The table and the picture of what is done so far."""
    found = by_method(results)
    start = next(iter(found.values()))[0]["before"]
    lines = list(rows_of(found))
    text = "\n".join(["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)])
    text += "".join("\n| " + " | ".join(line) + " |" for line in lines) + "\n"
    (args.output_dir / "table.md").write_text(text, encoding="utf-8")
    labels = {METHODS[name].label: [run["after"] for run in runs] for name, runs in found.items()}
    title = f"{Path(args.model).name} on {args.problems}: {args.steps} updates of {COMPLETIONS_PER_STEP} completions"
    figure.draw(args.output_dir / "comparison.png", labels, start, title)


def show(console: Console, args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    found = by_method(results)
    table = Table(*HEADER)
    for line in rows_of(found):
        table.add_row(*line)
    console.rule("[bold]held-out problems, answered greedily")
    console.print(f"start: {next(iter(found.values()))[0]['before']:.1%} of {args.heldout}")
    console.print(table)
    console.print(f"table: {args.output_dir / 'table.md'}\npicture: {args.output_dir / 'comparison.png'}")


HEADER = ["method", "after, by seed", "mean [95% interval]", "gain over the start", "updates", "tokens trained on", "s"]


def rows_of(found: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """A line of the table for each method, in the order in which they were run."""
    for name, runs in found.items():
        after = [run["after"] for run in runs]
        mean, low, high = student_interval(after)
        around = "" if low != low else f" [{low:.1%}, {min(high, 1.0):.1%}]"
        gain = mean - runs[0]["before"]
        yield [
            METHODS[name].label,
            ", ".join(f"{each:.1%}" for each in after),
            f"{mean:.1%}{around}",
            f"{100 * gain:+.1f} points",
            str(runs[0]["steps"]),
            f"{sum(run['num_tokens'] for run in runs) / len(runs):,.0f}",
            f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
        ]


if __name__ == "__main__":
    sys.exit(main())
