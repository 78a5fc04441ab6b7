"""Preference pairs from what a round of Direct Advantage has sampled: DPO given the same answers.

python recipes/direct_advantage/pairs.py RUN_DIR --output FILE.jsonl [--round 1] [--completions]

A right answer is preferred to a wrong one to the same prompt; of each kind different ones alone that ended by
themselves, and right ones are used again where they are fewer. `--completions`: among all answers that the round has
judged, also those from states.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrl import models
from llmrl.data.scored_rows import right_and_wrong
from llmrl.errors import LlmrlError
from llmrl.evaluation.sampling.making import config_of_run, rows_of_run
from llmrl.files import read_lines, write_lines
from llmrl.learner.loading import load_tokenizer, stop_token_ids


def answers(run: Path, number: int, completions: bool) -> Iterator[dict[str, Any]]:
    """The round's answers as scored samples, with reward 1 where they are right."""
    config = config_of_run(run)
    threshold = 1.0 if config["success_threshold"] is None else config["success_threshold"]
    first_step = (number - 1) * (config["max_steps"] // config["rounds"]) + 1
    further = from_states(run, number, config) if completions else {}
    for row in rows_of_run(run, [first_step]):
        more = further.get(row["row"], [])
        yield {
            **row,
            "completions": [*row["completions"], *([{"role": "assistant", "content": text}] for text, _, _ in more)],
            "rewards": [
                *(None if reward is None else float(reward >= threshold) for reward in row["rewards"]),
                *(float(right) for _, right, _ in more),
            ],
            "ended": [*row["ended"], *(ended for _, _, ended in more)],
        }


def from_states(run: Path, number: int, config: dict[str, Any]) -> dict[int, list[tuple[str, bool, bool]]]:
    """By row: (text, whether it is right, whether it ended by itself) of what followed a state, the state before it."""
    path = models.resolve(config["model_name_or_path"])
    stops = {load_tokenizer(path).eos_token_id, *stop_token_ids(path)}
    folder = run / "rounds" / f"round_{number}"
    begun = {line["state"]: line["text"] for line in read_lines(folder / "states.jsonl")}
    found: dict[int, list[tuple[str, bool, bool]]] = {}
    for line in read_lines(folder / "completions.jsonl"):
        for one in line["completions"]:
            ended = bool(one["ids"]) and one["ids"][-1] in stops
            found.setdefault(line["row"], []).append((begun[line["state"]] + one["text"], one["right"], ended))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--completions", action="store_true")
    args = parser.parse_args()
    rows = answers(args.run, args.round, args.completions)
    pairs = (pair for row in rows for pair in right_and_wrong(row, len(row["completions"])))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{write_lines(args.output, pairs, ensure_ascii=False, allow_nan=False)} pairs in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except LlmrlError as error:
        sys.exit(f"{error}")
