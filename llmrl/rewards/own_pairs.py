"""Preference pairs from a model's own samples: a right answer preferred to a wrong one to the same problem."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmrl.rewards.answers import is_correct
from llmrl.rollout.protocol import Completion, Engine, SamplingParams, row_seed

PROBLEMS_AT_ONCE = 16


@dataclass
class SamplingTally:
    """What came out of sampling: problems asked, samples drawn, right ones, problems with both kinds, pairs made."""

    problems: int = 0
    samples: int = 0
    right: int = 0
    mixed: int = 0
    pairs: int = 0


def own_pairs(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    sampling: SamplingParams,
    pairs_per_problem: int,
    tally: SamplingTally,
    progress: Callable[[SamplingTally], None] = lambda tally: None,
) -> Iterator[dict[str, Any]]:
    """Rows `prompt, chosen, rejected` (conversational), at most `pairs_per_problem` each, as they come.

    `problems` have `prompt_ids`, `answer` and `messages`. Each of a problem's pairs has another wrong answer; right
    ones are used again where they are fewer. Only samples that ended by themselves are used. `tally` is kept up to
    date.
    """
    for start in range(0, len(problems), PROBLEMS_AT_ONCE):
        asked = problems[start : start + PROBLEMS_AT_ONCE]
        # A seed of its own for each call: the engine numbers its prompts from 0 every time.
        seeded = replace(sampling, seed=row_seed(sampling.seed, start, 0))
        groups = engine.generate([p["prompt_ids"] for p in asked], seeded)
        for problem, samples in zip(asked, groups, strict=True):
            right, wrong = _sorted_out(tokenizer, problem, samples, tally)
            # A model that knows the form repeats its right answers to the letter, so they take turns.
            for chosen, rejected in islice(zip(cycle(right), wrong, strict=False), pairs_per_problem):
                tally.pairs += 1
                yield {"prompt": problem["messages"], "chosen": _said(chosen), "rejected": _said(rejected)}
        progress(tally)


def _sorted_out(
    tokenizer: PreTrainedTokenizerBase, problem: dict[str, Any], samples: list[Completion], tally: SamplingTally
) -> tuple[list[str], list[str]]:
    """Different right and different wrong texts among the samples, in the order in which they were drawn."""
    right: dict[str, None] = {}
    wrong: dict[str, None] = {}
    for sample in samples:
        text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        correct = is_correct(text, problem["answer"])
        tally.right += correct
        if sample.finish_reason == "stop" and text.strip():
            (right if correct else wrong)[text] = None
    tally.problems += 1
    tally.samples += len(samples)
    tally.mixed += bool(right) and bool(wrong)
    return list(right), list(wrong)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
