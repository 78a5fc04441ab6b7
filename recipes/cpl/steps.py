"""python recipes/cpl/steps.py [--model starter] [--pairs data/arithmetic/pairs] [--output runs/cpl-steps-data]

Single steps of solutions as segments that start in different states: what steps.yaml trains on.

In the bundled pairs a right and a wrong solution part at a known line. Here the right line of one problem is compared
with the wrong line of another, each behind its own question and the lines before it. A line is cut out of a longer
answer, so it is given as text, written as the model's chat template writes it, and has no end (`ends: false`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from llmrl import models
from llmrl.learner.loading import load_tokenizer


def segment(template: Any, row: dict[str, Any], column: str) -> dict[str, Any]:
    """The line at which a row's two solutions part, in the `chosen` or the `rejected` one."""
    lines = row[column][0]["content"].splitlines(keepends=True)
    place = row["wrong_step"] - 1
    before = template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return {"prompt": before + "".join(lines[:place]), "completion": lines[place], "ends": False}


def compared(template: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row's right line against the next row's wrong one; in turn the first and the second is the right one."""
    found = []
    for number, (row, other) in enumerate(zip(rows, [*rows[1:], rows[0]], strict=True)):
        both = [segment(template, row, "chosen"), segment(template, other, "rejected")]
        first, second = both if number % 2 == 0 else both[::-1]
        found.append({"first": first, "second": second, "label": number % 2})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--pairs", type=Path, default=Path("data/arithmetic/pairs"))
    parser.add_argument("--output", type=Path, default=Path("runs/cpl-steps-data"))
    given = parser.parse_args()
    template = load_tokenizer(models.resolve(given.model)).apply_chat_template
    given.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (given.pairs / f"{split}.jsonl").read_text().splitlines()]
        file = given.output / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in compared(template, rows)))
        print(f"{file}: {len(rows)} comparisons")


if __name__ == "__main__":
    main()
