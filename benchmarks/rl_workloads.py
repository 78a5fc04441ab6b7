"""Models, prompts and completions of the online methods' benchmarks: made with fixed seeds, the same for every toolkit.

Models are random: what they say means nothing, but it costs what it would cost. So that answers end, one token id in
`ENDS_EVERY` ends them, which makes their lengths as ragged as chance does.
"""

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from workloads import SEED, synthetic_model

SAMPLES = 8
ENDS_EVERY = 54
MEAN_LOG, SPREAD_LOG = 3.75, 0.7  # log-normal lengths with a mean of 54
BODIES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "256 x 4": {},
    "512 x 8": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One comparison. `what`: `update` (of given rollouts), `grpo` or `rloo` (whole steps). `body`: hidden units x
    layers. Each step has `prompts` prompts of about `prompt_tokens` tokens with 8 samples each, of at most
    `longest` tokens."""

    what: str
    body: str
    prompt_tokens: int
    prompts: int
    steps: int
    rounds: int = 1
    vocabulary: int = 32768
    longest: int = 128

    @property
    def name(self) -> str:
        return f"{self.body}, prompts of {self.prompt_tokens}, {self.prompts} x {SAMPLES}"

    @property
    def learning_rate(self) -> float:
        """Large enough that a second step's loss says whether the first step's update was the same."""
        return 1e-4


class Step(NamedTuple):
    """Given rollouts of one step: prompt ids by prompt, completion ids and advantages by prompt and sample."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    advantages: list[list[float]]


def build(cell: Cell, folder: Path) -> Path:
    """The cell's model with its tokenizer, in `folder`/model."""
    from transformers import GenerationConfig

    model = folder / "model"
    synthetic_model(model, cell.vocabulary, **BODIES[cell.body])
    ends = [2, *range(3, cell.vocabulary, ENDS_EVERY)]
    GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=ends).save_pretrained(model)
    return model


def given_steps(cell: Cell) -> list[Step]:
    """What the updates of an `update` cell learn from: ragged prompts, log-normal completions."""
    draw = random.Random(f"{SEED} {cell.name}")

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, cell.vocabulary) for _ in range(count)]

    def length() -> int:
        return min(max(round(draw.lognormvariate(MEAN_LOG, SPREAD_LOG)), 4), cell.longest)

    steps = []
    for _ in range(cell.steps):
        prompts = [ids(_prompt_length(draw, cell)) for _ in range(cell.prompts)]
        completions = [[ids(length()) for _ in range(SAMPLES)] for _ in prompts]
        steps.append(Step(prompts, completions, [[draw.gauss(0, 1) for _ in range(SAMPLES)] for _ in prompts]))
    return steps


def prompt_rows(cell: Cell) -> list[dict[str, str]]:
    """One prompt a row, as many as the cell's steps ask for."""
    draw = random.Random(f"{SEED} {cell.name}")
    lengths = [_prompt_length(draw, cell) for _ in range(cell.prompts * cell.steps)]
    return [{"prompt": " ".join(f"w{draw.randrange(3, cell.vocabulary)}" for _ in range(n))} for n in lengths]


def write_prompts(cell: Cell, folder: Path) -> None:
    """`prompt_rows` as `folder`/prompts.jsonl."""
    lines = [json.dumps(row) + "\n" for row in prompt_rows(cell)]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def _prompt_length(draw: random.Random, cell: Cell) -> int:
    return round(cell.prompt_tokens * draw.uniform(0.85, 1.15))


@dataclass
class Rewarded:
    """What the reward function saw since the last step, and what it saw by step: seconds in it, sampled tokens."""

    seconds: float = 0.0
    tokens: int = 0
    by_step: list[tuple[float, int]] = field(default_factory=list)

    def end_step(self) -> None:
        self.by_step.append((self.seconds, self.tokens))
        self.seconds, self.tokens = 0.0, 0


REWARDED = Rewarded()


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Share of even token ids; both toolkits call it, each with its own arguments."""
    began = time.perf_counter()
    scores = [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]
    REWARDED.tokens += sum(map(len, completion_ids))
    REWARDED.seconds += time.perf_counter() - began
    return scores
