"""Several completions of each prompt from one model, with their rewards: the data that offline methods share.

python recipes/compare/sample.py --model MODEL --prompts data/arithmetic/sums --output FILE.jsonl
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from llmrl import models
from llmrl.data.sources import find_source
from llmrl.data.splits import whole
from llmrl.errors import LlmrlError
from llmrl.learner.loading import load_tokenizer
from llmrl.rewards.keys import RewardKeys
from llmrl.rewards.scored_samples import ScoringTally, sample_scored, write_rows
from llmrl.rewards.scoring import Scorer
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a hub id, starter or smollm2")
    parser.add_argument("--prompts", required=True, help="folder, file or hub id with a column prompt")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rewards", nargs="+", default=["correct_number"], help="reward functions, summed")
    parser.add_argument("--samples_per_prompt", type=int, default=8)
    parser.add_argument("--max_prompts", type=int, help="the first so many only")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 where log-probabilities are to be exact")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    keys = RewardKeys.model_validate({"rewards": args.rewards})
    source = find_source(args.prompts)
    rows = whole(source.rows(args.split, "--split"), source.names.get(args.split, args.prompts))
    rows = rows.select(range(min(len(rows), args.max_prompts or len(rows))))
    path = models.resolve(args.model)
    tokenizer = load_tokenizer(path)
    scorer = Scorer(keys, print)
    try:
        tally = ScoringTally()
        sampling = SamplingParams(args.max_new_tokens, args.temperature, args.samples_per_prompt, args.seed)

        def show(tally: ScoringTally) -> None:
            print(
                f"{tally.prompts} of {len(rows)} prompts, {tally.samples} samples, mean reward "
                f"{tally.total / max(tally.scored, 1):.3f} of {tally.scored} with one; {tally.cut_off} cut off; "
                f"{tally.mixed} prompts with better and worse ones",
                flush=True,
            )

        write_rows(args.output, sample_scored(engine(path, tokenizer), tokenizer, rows, sampling, scorer, tally, show))
    finally:
        scorer.close()


def engine(path: str, tokenizer: PreTrainedTokenizerBase) -> HuggingFaceEngine:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16" if device == "cuda" else "float32")
    return HuggingFaceEngine(model.to(device).eval(), tokenizer)


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except LlmrlError as error:
        sys.exit(f"{error}")
