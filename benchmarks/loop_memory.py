"""Peak memory of a LOOP step against supervised fine-tuning of the same model on the same tokens.

    python benchmarks/loop_memory.py            two models, all weights and LoRA, a few minutes on two cores
    python benchmarks/loop_memory.py --quick    one miniature model

First the rollouts of a step are sampled and kept. Then each way of learning from them runs in a process of its own:
LOOP with and without the sampling, llmrl's learner with cross-entropy on the sampled tokens, and TRL's SFTTrainer on
the same sequences. Memory is the peak of the resident set above the loaded model.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import document
import measuring
import rl_workloads
import workloads
from measuring import Meter
from processes import in_own_process
from rl_workloads import SAMPLES, Cell
from worker import LORA, MeasuredError
from workloads import SEED

WAYS = {
    "loop": "LOOP, with sampling",
    "loop_update": "LOOP, without sampling",
    "nll": "llmrl, cross-entropy",
    "trl": "TRL, SFTTrainer",
}
QUICK = [Cell("loop", "tiny", 24, 4, 1, vocabulary=4096, longest=32)]
FULL = [Cell("loop", "256 x 4", 115, 8, 1), Cell("loop", "512 x 8", 115, 8, 1)]
ROWS_PER_PASS = 8
"""Of SFTTrainer: its default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one miniature model")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each way")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the table goes")
    arguments = parser.parse_args()
    rows = []
    for cell in QUICK if arguments.quick else FULL:
        for use_peft in (False, True):
            with tempfile.TemporaryDirectory(prefix="llmrl_benchmark_") as scratch:
                rl_workloads.build(cell, Path(scratch))
                rl_workloads.write_prompts(cell, Path(scratch))
                wanted = {"cell": asdict(cell), "folder": scratch, "use_peft": use_peft}
                found = measured(wanted, Path(scratch), arguments.rounds, arguments.threads)
            rows.append(_row(cell, use_peft, found))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = report(rows)
    document.write_section(arguments.document, "loop_memory", text)
    print(text)


def measured(wanted: dict[str, Any], folder: Path, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """What each way found, by way and round; ends the benchmark unless all learned from the same tokens."""
    in_own_process("loop_memory.py", wanted | {"way": "sample"}, folder, threads)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(in_own_process("loop_memory.py", wanted | {"way": way}, folder, threads))
            workloads.clear(folder)
    if len({one["scored_tokens"] for ones in found.values() for one in ones}) != 1:
        sys.exit(f"{wanted}: not the same tokens: {found}")
    return found


# -- one measurement ---------------------------------------------------------------------------------------------


def measure(specification: Path, result: Path) -> None:
    wanted = json.loads(specification.read_text())
    cell, folder, way, use_peft = Cell(**wanted["cell"]), Path(wanted["folder"]), wanted["way"], wanted["use_peft"]
    rollouts, meter = folder / "rollouts.json", Meter()
    if way == "trl":
        found = fine_tune_trl(cell, folder, json.loads(rollouts.read_text()), use_peft, meter)
    else:
        found = run_llmrl(cell, folder, way, use_peft, meter)
    result.write_text(json.dumps({**found, "extra_mb": meter.extra_mb}))


def loop_config(cell: Cell, folder: Path, way: str, use_peft: bool) -> Any:
    from llmrl.trainers.loop import LOOPConfig

    settings: dict[str, Any] = LORA if use_peft else {}
    return LOOPConfig(
        model_name_or_path=str(folder / "model"), dataset_name=str(folder / "prompts.jsonl"), eval_rows=0,
        output_dir=str(folder / way), prompts_per_step=cell.prompts, samples_per_prompt=SAMPLES, seed=SEED,
        max_completion_length=cell.longest, max_steps=1, learning_rate=cell.learning_rate, use_peft=use_peft,
        min_advantage=0.0, rewards=["rl_workloads:reward"], **settings,
    )  # fmt: skip


def run_llmrl(cell: Cell, folder: Path, way: str, use_peft: bool, meter: Meter) -> dict[str, Any]:
    """A step of LOOP as its command runs it: `sample` keeps the rollouts and `loop` makes them again, the same; the
    others take those that were kept. `nll` learns from them by cross-entropy, in as many and as large updates."""
    from transformers import TrainerCallback

    from llmrl.runs import Run
    from llmrl.trainers import loop
    from llmrl.trainers.online.experience import Experience
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun

    found: dict[str, Any] = {}
    file = folder / "rollouts.json"

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            meter.start()

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            meter.stop()
            raise MeasuredError

    own_collect, own_experience, own_improve = (
        PolicyGradientRun.collect,
        PolicyGradientRun.experience,
        PolicyGradientRun.improve,
    )

    def collect(run: PolicyGradientRun, step: int) -> Any:
        if way not in ("sample", "loop"):
            return kept_rollouts(file)
        collected = own_collect(run, step)
        if way == "sample":
            file.write_text(json.dumps([asdict(group) for group in collected.groups]))
        return collected

    def experience(run: PolicyGradientRun, collected: Any) -> Experience:
        return Experience(collected.groups) if way == "nll" else own_experience(run, collected)

    def improve(run: PolicyGradientRun, experience: Experience, step: int) -> dict[str, float]:
        found["scored_tokens"] = sum(sample.num_scored for sample in experience.samples)
        if way == "nll":
            run.objective = cross_entropy()
        return own_improve(run, experience, step)

    config = loop_config(cell, folder, way, use_peft)
    ways = replaced(PolicyGradientRun, collect=collect, experience=experience, improve=improve)
    with ways, contextlib.suppress(MeasuredError):
        loop.train(config, Run.open(config), callbacks=[Watch()])
    return found


@contextlib.contextmanager
def replaced(owner: type, **methods: Any) -> Iterator[None]:
    """Other methods of a class for a while."""
    own = {name: getattr(owner, name) for name in methods}
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(owner, name, method)


def kept_rollouts(file: Path) -> Any:
    """What `sample` has written, as the collector hands it over."""
    from llmrl.rollout.collector import Collected
    from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn

    def rollout(record: dict[str, Any]) -> Rollout:
        return Rollout(**{**record, "turns": [Turn(**turn) for turn in record["turns"]]})

    groups = json.loads(file.read_text())
    return Collected([RolloutGroup(**{**g, "rollouts": [rollout(r) for r in g["rollouts"]]}) for g in groups])


def cross_entropy() -> Any:
    """The mean negative log-likelihood of the scored tokens: supervised fine-tuning, in llmrl's learner."""
    from llmrl.objectives.scored import Objective

    return Objective(lambda logprobs_N, scored: (-logprobs_N.sum() / scored.totals.tokens, {}))


def fine_tune_trl(
    cell: Cell, folder: Path, groups: list[dict[str, Any]], use_peft: bool, meter: Meter
) -> dict[str, Any]:
    """One pass over the kept rollouts, as many in an update as LOOP takes."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            meter.start()

        def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
            meter.stop()

    rows = []
    for record in (rollout for group in groups for rollout in group["rollouts"]):
        (ids,), (turn,) = record["pieces"], record["turns"]
        rows.append(
            {"input_ids": ids, "completion_mask": [int(turn["start"] <= i < turn["end"]) for i in range(len(ids))]}
        )
    config = loop_config(cell, folder, "trl", use_peft)
    per_update = config.resolve().rollouts_in_update(len(rows))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=-(-len(rows) // per_update), seed=SEED,
        per_device_train_batch_size=ROWS_PER_PASS, gradient_accumulation_steps=per_update // ROWS_PER_PASS,
        learning_rate=cell.learning_rate, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        report_to=[], logging_steps=1,
    )  # fmt: skip
    lora = LoraConfig(
        r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        str(folder / "model"), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[Watch()],
        peft_config=lora if use_peft else None,
    )  # fmt: skip
    trainer.train()
    return {"scored_tokens": sum(sum(row["completion_mask"]) for row in rows)}


# -- the table ---------------------------------------------------------------------------------------------------

HEADER = [
    "model, tuning", "sampled tokens", *(f"{name}: MB" for name in WAYS.values()), "LOOP / cross-entropy",
    "LOOP without sampling / cross-entropy", "LOOP / SFTTrainer",
]  # fmt: skip
EXPLANATION = """\
One step of LOOP (two epochs of updates of 32 rollouts, 8 samples a prompt) and fine-tuning on the very same sampled
tokens, in updates of the same size: by cross-entropy in llmrl's learner, which shares prompts as LOOP does, and in
TRL's SFTTrainer (float32, no gradient checkpointing, 8 rows in a forward pass, its default). Gradients and the
optimizer's state are part of every figure. LOOP keeps one copy of the model and no critic, and its sampling is over
when the update begins, so that the peaks do not add up."""


def _row(cell: Cell, use_peft: bool, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    mb = {way: [one["extra_mb"] for one in ones] for way, ones in found.items()}

    def ratio(above: str, below: str) -> str:
        return f"{median(a / b for a, b in zip(mb[above], mb[below], strict=True)):.2f}"

    return [
        f"{cell.body}, {'LoRA' if use_peft else 'full'}",
        str(found["loop"][0]["scored_tokens"]),
        *(f"{median(mb[way]):.0f}" for way in WAYS),
        ratio("loop", "nll"),
        ratio("loop_update", "nll"),
        ratio("loop", "trl"),
    ]


def report(rows: list[list[str]]) -> str:
    """The section of the document."""
    conditions = (
        f"`{document.command()}`, {measuring.today()}. {measuring.hardware()}. "
        f"{measuring.versions('torch', 'transformers', 'trl')}."
    )
    return "\n\n".join(
        [
            "## Memory of LOOP against supervised fine-tuning",
            conditions,
            EXPLANATION,
            document.table(HEADER, rows),
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
