"""One measurement: DPO training with one toolkit in this process, called as its user would call it.

    python benchmarks/worker.py SPECIFICATION.json RESULT.json

Measured is everything from the loaded model to the last optimizer step: data loader, reference log-probabilities
(ahead of training or within it, as the toolkit does it), forward, backward, update, logging. Loading, tokenisation
and saving are not.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from measuring import Meter
from workloads import SEED, Cell

LORA = {"lora_r": 16, "lora_alpha": 32}
Ids = list[list[int]]


class MeasuredError(Exception):
    """Ends a training run after its last step: what is saved afterwards is not part of the comparison."""


def main(specification: Path, result: Path) -> None:
    wanted = json.loads(specification.read_text())
    cell, folder, toolkit = Cell(**wanted["cell"]), Path(wanted["folder"]), wanted["toolkit"]
    meter = Meter()
    if toolkit == "llmrl":
        found = train_llmrl(cell, folder, meter)
    else:
        if toolkit == "trl_selecting":
            select_rows_on_cpu()
        found = train_trl(cell, folder, meter)
    found |= {"wall_seconds": meter.wall_seconds, "cpu_seconds": meter.cpu_seconds}
    found["extra_mb"] = meter.extra_mb + found.pop("reference_copy_mb")
    result.write_text(json.dumps(found))


def train_llmrl(cell: Cell, folder: Path, meter: Meter) -> dict[str, Any]:
    from transformers import TrainerCallback

    from llmrl.runs import Run
    from llmrl.trainers import dpo, setup

    logged: list[dict[str, float]] = []
    trained: list[Ids] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logged.append(logs)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.stop()
            raise MeasuredError

    build_learner = setup.build_learner

    def watched(*arguments: Any, **options: Any) -> Any:
        """The measurement starts when the model stands, before the reference is computed."""
        learner = build_learner(*arguments, **options)
        update = learner.update

        def seen(groups: Any, objective: Any) -> dict[str, float]:
            trained.extend([s.token_ids.tolist() for s in group] for group in groups)
            return update(groups, objective)

        learner.update = seen
        meter.start()
        return learner

    setup.build_learner = watched
    config = dpo.DPOConfig(
        model_name_or_path=str(folder / "model"), dataset_name=str(folder / "llmrl.jsonl"), eval_rows=0,
        output_dir=str(folder / "llmrl"), pairs_per_step=cell.pairs_per_step, max_steps=cell.steps, seed=SEED,
        learning_rate=cell.learning_rate, use_peft=cell.use_peft, **LORA,
    )  # fmt: skip
    with contextlib.suppress(MeasuredError):
        dpo.train(config, Run.open(config), callbacks=[Watch()])
    return {
        "losses": [line["loss"] for line in logged],
        "grad_norms": [line["grad_norm"] for line in logged],
        "pairs": _digest(trained),
        "computed_tokens": sum(int(line["num_computed_tokens"]) for line in logged),
        "reference_copy_mb": 0.0,
    }


def select_rows_on_cpu() -> None:
    """Let TRL's fused head project only the rows that have a label, as it does on a GPU.

    TRL asks one function whether its Triton kernels run on the device, and selects rows only if so; the kernels
    themselves ask a function of the same name in another module, which stays as it is.
    """
    from trl.trainer import utils

    if not hasattr(utils, "_use_triton"):
        raise RuntimeError("this TRL has no `trl.trainer.utils._use_triton`: its row selection cannot be forced on")
    utils._use_triton = lambda device: True


def train_trl(cell: Cell, folder: Path, meter: Meter) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            meter.start()

        def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
            meter.stop()

    arguments = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=cell.steps, per_device_train_batch_size=cell.pairs_per_step,
        learning_rate=cell.learning_rate, train_sampling_strategy="sequential", seed=SEED, logging_steps=1,
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
    )  # fmt: skip
    lora = LoraConfig(
        r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    lines = (folder / "trl.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = DPOTrainer(
        str(folder / "model"), args=arguments, train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=lora if cell.use_peft else None, callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    rows = trainer.train_dataset
    trained = [[r["prompt_ids"] + r["chosen_ids"], r["prompt_ids"] + r["rejected_ids"]] for r in rows]
    copied = [] if trainer.ref_model is None else list(trainer.ref_model.parameters())
    return {
        "losses": [line["loss"] for line in logged],
        "grad_norms": [line["grad_norm"] for line in logged],
        "pairs": _digest(trained),
        "real_tokens": sum(len(ids) for pair in trained for ids in pair),
        "slots": _padded_slots(trained, cell.pairs_per_step),
        "reference_copy_mb": sum(p.numel() * p.element_size() for p in copied) / 1e6,
    }


def _padded_slots(trained: list[Ids], per_step: int) -> int:
    steps = [trained[start : start + per_step] for start in range(0, len(trained), per_step)]
    return sum(2 * len(step) * max(len(ids) for pair in step for ids in pair) for step in steps)


def _digest(trained: list[Ids]) -> str:
    """Of the token ids of all pairs in the order of training: equal when both toolkits trained on the same."""
    return hashlib.sha256(json.dumps(trained).encode()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
