"""What only a GPU can show: the tree attention's kernel against the dense mask and padded rows, in numbers and in time.

    python benchmarks/gpu_check.py [--sections compile,right,attention,update,head,generate,more] [--seconds 215]

One JSON object a line, printed and written to `gpu_check.jsonl` in --out ($OUT, or the current folder). A section or a
case that fails is reported as a line with `error`, and the others go on; cases that no longer fit into --seconds are
reported as `skipped`. --small runs everything in miniature, also on a CPU (no kernel there, so forward passes only are
compared), to try the script itself. Models are random: nothing is read from a hub.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.learner import attention, block_attention, forms, head
from llmrl.learner.learner import Learner, LearnerOptions
from llmrl.learner.prefix_tree import TreeLayout, pack
from llmrl.learner.sequences import Group, completion
from llmrl.objectives.dpo import DPO
from llmrl.objectives.scored import Objective

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
QWEN_1_5B = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
QWEN_0_5B = QWEN_1_5B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
MINIATURE = {
    "vocab_size": 503,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def seconds_since_start() -> float:
    """Of the process: imports count, too."""
    return time.time() - Path(f"/proc/{os.getpid()}").stat().st_ctime


class Report:
    """Lines of JSON, and what to do with the time that is left."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.seconds = seconds

    def line(self, section: str, **values: Any) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        text = json.dumps({"t": round(seconds_since_start(), 1), "section": section, **rounded})
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def case(self, section: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run one case; its failure or its being late is a line too."""
        if seconds_since_start() > self.seconds:
            self.line(section, case=name, skipped="no time left")
            return
        begin, said = time.perf_counter(), []
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                values = work()
            ours = sorted({str(w.message)[:300] for w in said if "block-sparse" in str(w.message)})
            took = {"case_seconds": time.perf_counter() - begin}
            self.line(section, case=name, **values, **({"warned": ours} if ours else {}), **took)
        except Exception as error:
            where = traceback.format_exc().strip().splitlines()[-6:]
            self.line(section, case=name, error=f"{type(error).__name__}: {str(error)[:600]}", where=where)
        finally:
            clear()


# -- measuring -------------------------------------------------------------------------------------------------------


def clear() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def measured(work: Callable[[], Any], repeats: int = 5, warm_ups: int = 2) -> dict[str, float]:
    """Mean milliseconds of calls in a row, as a training step makes them, and the peak of memory they add, in GiB."""
    for _ in range(warm_ups):
        work()
    synchronize()
    before = torch.cuda.memory_allocated() if GPU else 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if GPU else 0
    return {"ms": seconds / repeats * 1e3, "extra_gib": (peak - before) / 2**30}


@contextlib.contextmanager
def patched(place: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


def without_kernel() -> Any:
    """Trees get the dense mask."""
    return patched(block_attention, _works=lambda kind: False)


# -- data and models -------------------------------------------------------------------------------------------------


def random_group(draw: np.random.Generator, vocabulary: int, prompt: int, answers: list[int]) -> Group:
    """`answers`: how many tokens each completion has."""
    ids = draw.integers(3, vocabulary, prompt)
    return tuple(completion(ids, draw.integers(3, vocabulary, n)) for n in answers)


def branching_groups(draw: np.random.Generator, vocabulary: int, scale: int) -> list[Group]:
    """Two prompts whose completions branch once more; about 12 x scale tokens."""
    groups = []
    for _ in range(2):
        prompt, middle = draw.integers(3, vocabulary, 3 * scale), draw.integers(3, vocabulary, scale)
        tails = [draw.integers(3, vocabulary, n) for n in (scale // 2, scale // 3, scale, scale // 4)]
        groups.append(
            tuple(
                completion(prompt, np.concatenate([m, t]))
                for m, t in zip((middle, middle, middle[:0], middle[:0]), tails, strict=True)
            )
        )
    return groups


def random_model(kind: str, dtype: torch.dtype, scale: float = 1.0, **shape: Any) -> Any:
    """On the device, from a seed; weights times `scale`, so that a wrong mask shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def learner_for(model: Any, said: list[str], **options: Any) -> Learner:
    return Learner(model, LearnerOptions(**options), Accelerator(cpu=not GPU), said.append)


# -- sections --------------------------------------------------------------------------------------------------------


def compile_section(report: Report, small: bool) -> None:
    """The trial of a kind of attention: does it compile, how far is it from the dense mask, how long does it take."""
    kinds = [("bf16 12/2 x 128", (torch.bfloat16, 12, 2, 128, False, 128**-0.5, None))]

    def trial(values: tuple[Any, ...]) -> dict[str, Any]:
        return {"error_of_largest": block_attention._trial_error(block_attention.Kind(DEVICE, *values))}

    for name, values in kinds if GPU else []:
        report.case("compile", name, partial(trial, values))
        report.case("compile", f"{name}, again", partial(trial, values))


RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": 100}),
    (
        "gemma2",
        {
            "sliding_window": 100,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
        },
    ),
]
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


def scores_and_gradient(model: Any, form: str, groups: list[Group], cast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities by Learner.logprobs [N], and a weighted sum's gradient by all parameters, as one vector."""
    said: list[str] = []
    learner = learner_for(copy.deepcopy(model), said, form=form, tokens_per_microbatch=8192)
    if learner.form != form:
        raise RuntimeError(f"got {learner.form}: {said}")
    autocast = contextlib.nullcontext() if cast is None else torch.autocast(DEVICE.type, cast)
    inputs = forms.inputs(form, groups, DEVICE)
    with autocast:
        logprobs = np.concatenate([part for group in learner.logprobs(groups) for part in group])
        again = learner.policy(inputs).logprobs_N
    weights = torch.linspace(-1, 1, len(again), device=DEVICE)
    (again.float() * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in learner.policy.parameters() if p.grad is not None])
    return torch.from_numpy(logprobs), gradient


def right_case(kind: str, settings: dict[str, Any], dtype: torch.dtype, cast: torch.dtype | None) -> dict[str, Any]:
    """Errors of the tree's two ways and of padded rows against padded rows in float32 with transformers' eager code."""
    groups = branching_groups(np.random.default_rng(0), SHAPE["vocab_size"], scale=120)
    model = random_model(kind, dtype, scale=3.0, **SHAPE, **settings)
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    true_logprobs, true_gradient = scores_and_gradient(exact, "padded", groups, None)
    del exact
    if kind == "gemma2":  # the padded form must not be transformers' sdpa, which drops the soft-cap
        model.set_attn_implementation(attention.NAME)
    found: dict[str, Any] = {}
    for way in ("tree", "dense", "padded"):
        with without_kernel() if way == "dense" else contextlib.nullcontext():
            logprobs, gradient = scores_and_gradient(model, "padded" if way == "padded" else "tree", groups, cast)
        found[f"{way}_logprob"] = float((logprobs - true_logprobs).abs().max())
        found[f"{way}_gradient"] = float((gradient - true_gradient).norm() / true_gradient.norm())
    return found


def checkpointing_case() -> dict[str, Any]:
    """One update with and without gradient checkpointing: the same gradient norm."""
    groups = branching_groups(np.random.default_rng(0), SHAPE["vocab_size"], scale=120)
    objective = Objective(lambda logprobs, scored: (-logprobs.sum() / scored.totals.tokens, {}))
    norms = []
    for spares in (False, True):
        model = random_model("llama", torch.bfloat16, scale=3.0, **SHAPE)
        learner = learner_for(model, [], gradient_checkpointing=spares, form="tree")
        norms.append(learner.update(groups, objective)["grad_norm"])
    return {"grad_norm": norms[0], "grad_norm_checkpointed": norms[1]}


def right_section(report: Report, small: bool, more: bool = False) -> None:
    """Learner.logprobs and gradients against the model's own forward. `more`: the rarer precisions and models."""
    name = "more" if more else "right"
    wanted = [
        *((kind, settings, torch.bfloat16, None, False) for kind, settings in RIGHT[1:]),
        (*RIGHT[0], torch.float32, None, False),
        (*RIGHT[0], torch.bfloat16, None, False),
        (*RIGHT[0], torch.float32, torch.bfloat16, True),
        *((kind, settings, torch.float32, None, True) for kind, settings in RIGHT[2:]),
        (*RIGHT[0], torch.float32, torch.float16, True),
        (*RIGHT[1], torch.float32, None, True),
    ]
    for kind, settings, dtype, cast, is_more in wanted:
        if is_more == more:
            label = f"{kind} {str(dtype)[6:]}" + (f" autocast {str(cast)[6:]}" if cast else "")
            report.case(name, label, partial(right_case, kind, settings, dtype, cast))
    if not more:
        report.case(name, "gradient checkpointing", checkpointing_case)


def attention_section(report: Report, small: bool) -> None:
    """Attention alone, forward and backward, bf16, 12 heads over 2 of 128: kernel, dense mask, causal padded rows."""
    draw = np.random.default_rng(0)
    for length in (512,) if small else (4096, 16_384, 32_768):
        many = [(512, [64] * 8)] * (length // 1024) if not small else [(128, [16] * 8)]
        for label, shapes in (
            ("N x (512 + 8x64)", many),
            ("1 x (T/2, 8 answers)", [(length // 2, [length // 16] * 8)]),
        ):
            groups = [random_group(draw, 1000, prompt, answers) for prompt, answers in shapes]
            for way in ("kernel", "kernel, unknown length", "dense", "padded"):
                report.case(
                    "attention",
                    f"{way}, T {length}, {label}",
                    partial(attention_case, way, groups),
                )


def attention_case(way: str, groups: list[Group]) -> dict[str, Any]:
    layout = pack(groups, DEVICE).layout
    lengths = [len(s.token_ids) for group in groups for s in group]
    batch, tokens = (len(lengths), max(lengths)) if way == "padded" else (1, len(layout.positions))
    dtype = torch.bfloat16 if GPU else torch.float32
    query, key, value = (
        torch.randn(batch, tokens, n, 128, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (12, 2, 2)
    )
    upstream = torch.randn_like(query)
    begin, found = time.perf_counter(), {}
    if way.startswith("kernel") and GPU:
        mask = block_attention.block_mask(layout)
        synchronize()
        found = {"mask_ms": (time.perf_counter() - begin) * 1e3, "blocks_skipped_percent": float(mask.sparsity())}

    def once() -> None:
        torch.autograd.grad(attended(way, query, key, value, layout), (query, key, value), upstream)

    options = {} if way.endswith("unknown length") else block_attention.KERNEL_OPTIONS
    with patched(block_attention, KERNEL_OPTIONS=options):
        return found | {"slots": batch * tokens, **measured(once, repeats=10 if GPU else 1)}


def attended(way: str, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout) -> Tensor:
    if way == "padded":
        key, value = attention._repeated(query, key, value)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    if way == "dense" or not GPU:
        return attention._ungrouped(query, *attention._repeated(query, key, value), layout, 128**-0.5, None, None)
    out = block_attention.block_attention(query, key, value, layout, 128**-0.5)
    if out is None:
        raise RuntimeError("no kernel")
    return out


def update_section(report: Report, small: bool) -> None:
    """Whole updates of a Qwen2.5-1.5B-shaped model with LoRA: DPO on pairs, and groups of 8 answers."""
    from peft import LoraConfig, get_peft_model

    draw, vocabulary = np.random.default_rng(0), (MINIATURE if small else QWEN_1_5B)["vocab_size"]
    prompt, answer, count = (24, 8, 2) if small else (512, 256, 1)
    pairs = [random_group(draw, vocabulary, prompt, [answer] * 2) for _ in range(24 * count)]
    eights = [random_group(draw, vocabulary, prompt, [answer] * 8) for _ in range(6 * count)]
    nll = Objective(lambda logprobs, scored: (-logprobs.sum() / scored.totals.tokens, {}))
    base = random_model("qwen2", torch.bfloat16 if GPU else torch.float32, **(MINIATURE if small else QWEN_1_5B))
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def updates(way: str, groups: list[Group], objective: Objective, spares: bool) -> dict[str, Any]:
        said: list[str] = []
        form = "padded" if way == "padded" else "tree"
        options = {"tokens_per_microbatch": 8192, "gradient_checkpointing": spares, "learning_rate": 1e-5}
        with without_kernel() if way == "dense" else contextlib.nullcontext():
            learner = learner_for(model, said, form=form, total_steps=10, **options)
            if learner.form != form:
                raise RuntimeError(f"got {learner.form}: {said}")
            metrics: dict[str, float] = {}

            def once() -> None:
                metrics.update(learner.update(groups, objective))

            found = measured(once, repeats=2, warm_ups=1)
        tokens = metrics["num_tokens"]
        return {
            "tokens_per_second": tokens / found["ms"] * 1e3,
            "tokens": tokens,
            "computed_tokens": metrics["num_computed_tokens"],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            **found,
        }

    dpo, policy_gradient = (pairs, DPO().objective()), (eights, nll)
    cases: list[tuple[Any, ...]] = [
        *((f"DPO pairs, {way}", way, *dpo, False) for way in ("tree", "dense", "padded")),
        *((f"groups of 8, {way}", way, *policy_gradient, False) for way in ("tree", "dense", "padded")),
        # Checkpointing cannot be switched off again: it comes last.
        *((f"groups of 8, {way}, checkpointed", way, *policy_gradient, True) for way in ("tree", "padded")),
    ]
    for name, *arguments in cases:
        report.case("update", name, partial(updates, *arguments))


def head_section(report: Report, small: bool) -> None:
    """The output layer at a vocabulary of 152k, forward and backward: chunks of several sizes, and whole logits."""
    rows, hidden_size, vocabulary = (64, 64, 503) if small else (8192, 1536, 151_936)
    dtype = torch.bfloat16 if GPU else torch.float32
    layer = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=DEVICE, dtype=dtype)
    head.install(layer)
    hidden = torch.randn(rows, hidden_size, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)

    def whole() -> Tensor:
        logits = torch.nn.functional.linear(hidden, layer.weight).float()
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def case(name: str, trainable: bool, with_entropy: bool, elements: int) -> dict[str, Any]:
        layer.weight.requires_grad_(trainable)

        def once() -> None:
            layer.weight.grad = hidden.grad = None
            if name == "whole":
                whole().mean().backward()
            else:
                logprobs, entropies = layer(hidden, targets, None, with_entropy)
                (logprobs.mean() + (entropies.mean() if with_entropy else 0.0)).backward()

        with patched(
            head, CHUNK_ELEMENTS={"cpu": elements, "cuda": elements}, MAX_CHUNK_ROWS={"cpu": 2**20, "cuda": 2**20}
        ):
            return {"chunk_rows": max(1, elements // vocabulary), **measured(once, repeats=3, warm_ups=1)}

    for trainable in (False, True):
        kind = "trainable" if trainable else "frozen"
        for power in (23, 25, 26, 27, 28):
            report.case("head", f"chunks of 2^{power}, {kind}", partial(case, "chunked", trainable, False, 2**power))
        report.case("head", f"whole, {kind}", partial(case, "whole", trainable, False, 1))
    report.case("head", "chunks of 2^26, frozen, with entropy", partial(case, "chunked", False, True, 2**26))


def generate_section(report: Report, small: bool) -> None:
    """Sampling from a Qwen2.5-0.5B-shaped model: the engine twice, and model.generate."""
    from llmrl.rollout.huggingface import HuggingFaceEngine
    from llmrl.rollout.protocol import SamplingParams

    draw, shape = np.random.default_rng(0), MINIATURE if small else QWEN_0_5B
    count, new = (4, 8) if small else (64, 128)
    prompts = [draw.integers(3, shape["vocab_size"], draw.integers(new, 2 * new)).tolist() for _ in range(count)]
    model = random_model("qwen2", torch.bfloat16 if GPU else torch.float32, **shape).eval()
    engine = HuggingFaceEngine(model, SimpleNamespace(eos_token_id=2))
    outputs: list[list[list[int]]] = []

    def ours() -> dict[str, Any]:
        synchronize()
        begin = time.perf_counter()
        found = engine.generate(prompts, SamplingParams(max_tokens=new, temperature=1.0, seed=1))
        seconds = time.perf_counter() - begin
        outputs.append([one.token_ids for samples in found for one in samples])
        tokens = sum(map(len, outputs[-1]))
        same = sum(a == b for a, b in zip(outputs[0], outputs[-1], strict=True)) / count
        return {"tokens": tokens, "tokens_per_second": tokens / seconds, "same_as_first": same}

    def theirs() -> dict[str, Any]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        synchronize()
        begin = time.perf_counter()
        found = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new
        )
        synchronize()
        tokens = (found.shape[1] - width) * count
        return {"tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - begin)}

    report.case("generate", "engine", ours)
    report.case("generate", "engine, the same again", ours)
    report.case("generate", "model.generate", theirs)


SECTIONS: dict[str, Callable[[Report, bool], None]] = {
    "compile": compile_section,
    "right": right_section,
    "attention": attention_section,
    "update": update_section,
    "head": head_section,
    "generate": generate_section,
    "more": lambda report, small: right_section(report, small, more=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=215.0, help="cases are not begun after that")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.out / "gpu_check.jsonl", arguments.seconds)
    device = torch.cuda.get_device_name() if GPU else "CPU"
    report.line("machine", device=device, torch=torch.__version__, threads=torch.get_num_threads())
    for name in arguments.sections.split(","):
        try:
            SECTIONS[name](report, arguments.small)
        except Exception as error:
            report.line(name, error=f"{type(error).__name__}: {error}", where=traceback.format_exc().splitlines()[-6:])
        clear()
    report.line("end")


if __name__ == "__main__":
    main()
