"""Stage 2 of the quickstart: preference pairs from a model's own right and wrong answers to problems.

python recipes/quickstart/sample_pairs.py --model FOLDER --problems data/arithmetic/problems --output FILE.jsonl
"""

import argparse
import json
import os
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmrl.config import TaskEvaluationKeys
from llmrl.data.problems import prepare_problems
from llmrl.learner.loading import load_tokenizer
from llmrl.rewards.own_pairs import SamplingTally, own_pairs
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams

LEAST_PAIRS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", required=True, help="folder or file with the columns prompt and answer")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_pairs", type=int, default=240, help="stop when there are so many pairs")
    parser.add_argument("--max_problems", type=int, default=400, help="or when so many problems were asked")
    parser.add_argument("--samples_per_prompt", type=int, default=8)
    parser.add_argument("--pairs_per_problem", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.model)
    keys = TaskEvaluationKeys(dataset_name=args.problems, dataset_test_split=args.split, limit=args.max_problems)
    problems = list(prepare_problems(keys, tokenizer, print))
    for problem in problems:
        problem["messages"] = [{"role": "user", "content": problem["prompt"]}]
    engine = HuggingFaceEngine(AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval(), tokenizer)
    sampling = SamplingParams(args.max_new_tokens, args.temperature, args.samples_per_prompt, args.seed)

    def show(tally: SamplingTally) -> None:
        print(
            f"{tally.problems} problems, {tally.samples} samples, {100 * tally.right / tally.samples:.0f}% right; "
            f"{tally.mixed} problems with right and wrong ones, {tally.pairs} pairs",
            flush=True,
        )

    tally = SamplingTally()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pending = args.output.with_name(f".tmp_{args.output.name}")
    with open(pending, "w", encoding="utf-8") as file:
        for row in own_pairs(engine, tokenizer, problems, sampling, args.pairs_per_problem, tally, show):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if tally.pairs >= args.num_pairs:
                break
    if tally.pairs < LEAST_PAIRS:
        pending.unlink()
        raise SystemExit(
            f"only {tally.pairs} pairs: of {tally.problems} problems {tally.mixed} had right and wrong answers. "
            "Ask more problems, draw more samples, or take a model that is neither always right nor always wrong."
        )
    os.replace(pending, args.output)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
