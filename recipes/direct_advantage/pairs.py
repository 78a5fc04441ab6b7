"""Preference pairs from what a round of Direct Advantage has sampled: DPO given the same answers.

python recipes/direct_advantage/pairs.py RUN_DIR --output FILE.jsonl [--round 1] [--completions]

A right answer is preferred to a wrong one to the same prompt; of each kind different ones alone, and right ones are
used again where they are fewer. `--completions`: among all answers that the round has judged, also those from states.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from llmrl.data.sources import find_source
from llmrl.runs.files import read_lines


def answers(run: Path, number: int, config: dict[str, Any], completions: bool) -> Iterator[tuple[int, str, bool]]:
    """(row, text, whether it is right) of the round's answers."""
    threshold = 1.0 if config["success_threshold"] is None else config["success_threshold"]
    first_step = (number - 1) * (config["max_steps"] // config["rounds"]) + 1
    for line in read_lines(run / "rollouts" / f"step_{first_step}.jsonl"):
        yield line["row"], line["messages"][0]["content"], line["reward"] >= threshold
    folder = run / "rounds" / f"round_{number}"
    begun = {line["state"]: line["text"] for line in read_lines(folder / "states.jsonl")}
    for line in read_lines(folder / "completions.jsonl") if completions else ():
        for one in line["completions"]:
            yield line["row"], begun[line["state"]] + one["text"], one["right"]


def pairs(run: Path, number: int, completions: bool) -> Iterator[dict[str, Any]]:
    """Rows `prompt, chosen, rejected`."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    prompts = find_source(config["dataset_name"]).rows(config["dataset_train_split"], "dataset_train_split")
    found: dict[int, tuple[dict[str, None], dict[str, None]]] = {}
    for row, text, right in answers(run, number, config, completions):
        found.setdefault(row, ({}, {}))[not right][text] = None
    for row, (right, wrong) in found.items():
        for chosen, rejected in zip(cycle(right), wrong, strict=False):
            said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            yield {"prompt": prompts[row - 1]["prompt"], "chosen": said[0], "rejected": said[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--completions", action="store_true")
    args = parser.parse_args()
    rows = list(pairs(args.run, args.round, args.completions))
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs in {args.output}")


if __name__ == "__main__":
    main()
