"""One measurement of an online method with one toolkit in this process.

    python benchmarks/rl_worker.py SPECIFICATION.json RESULT.json

`update` cells hand the same rollouts to both toolkits and measure the learning alone: forward, backward, optimizer
step, logging. The others are whole steps as a user of each toolkit would call them: sampling from the model that is
trained, reward, update. Loading, tokenisation and saving are not measured.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import Meter
from rl_workloads import REWARDED, SAMPLES, Cell, Step, given_steps, prompt_rows, reward
from worker import MeasuredError, select_rows_on_cpu
from workloads import SEED


def main(specification: Path, result: Path) -> None:
    wanted = json.loads(specification.read_text())
    cell, folder, toolkit = Cell(**wanted["cell"]), Path(wanted["folder"]), wanted["toolkit"]
    meter = Meter()
    if toolkit == "trl_selecting":
        select_rows_on_cpu()
    if cell.what == "update":
        found = update_llmrl(cell, folder, meter) if toolkit == "llmrl" else update_trl(cell, folder, meter)
    else:
        found = steps_llmrl(cell, folder, meter) if toolkit == "llmrl" else steps_trl(cell, folder, meter)
        found["rewards"] = REWARDED.by_step
    found |= {"laps": meter.laps, "extra_mb": meter.extra_mb}
    result.write_text(json.dumps(found))


# -- llmrl -------------------------------------------------------------------------------------------------------


def llmrl_config(cell: Cell, folder: Path) -> Any:
    """GRPO as TRL has it by default (no KL), or RLOO as published."""
    from llmrl.trainers.loop import LOOPConfig

    algorithm: dict[str, Any] = {"algorithm": "rloo"} if cell.what == "rloo" else {"algorithm": "grpo", "beta": 0.0}
    return LOOPConfig(
        model_name_or_path=str(folder / "model"), dataset_name=str(folder / "prompts.jsonl"), eval_rows=0,
        output_dir=str(folder / "llmrl"), prompts_per_step=cell.prompts, samples_per_prompt=SAMPLES,
        max_completion_length=cell.longest, max_steps=cell.steps, learning_rate=cell.learning_rate, seed=SEED,
        rewards=["rl_workloads:reward"], **algorithm,
    )  # fmt: skip


def update_llmrl(cell: Cell, folder: Path, meter: Meter) -> dict[str, Any]:
    from llmrl.trainers.online.run import sampled_learner

    config = llmrl_config(cell, folder)
    algorithm = config.resolve()
    learner = sampled_learner(config, algorithm.needs_reference, cell.steps, print, value_head=algorithm.needs_critic)
    objective = algorithm.policy_gradient().objective()
    batches = [token_groups(step) for step in given_steps(cell)]
    logged = []
    meter.start()
    for groups in batches:
        logged.append(learner.update(groups, objective))
        meter.lap()
    meter.stop()
    return {
        "losses": [line["loss"] for line in logged],
        "grad_norms": [line["grad_norm"] for line in logged],
        "computed_tokens": sum(line["num_computed_tokens"] for line in logged),
    }


def token_groups(step: Step) -> list[Any]:
    """The samples of each prompt as a group of sequences, with their advantages."""
    from dataclasses import replace

    import numpy as np

    from llmrl.learner.sequences import completion

    def sequence(prompt: list[int], ids: list[int], advantage: float) -> Any:
        return replace(completion(prompt, ids), token_values={"advantages": np.full(len(ids), advantage, np.float32)})

    return [
        tuple(sequence(prompt, ids, a) for ids, a in zip(completions, advantages, strict=True))
        for prompt, completions, advantages in zip(*step, strict=True)
    ]


def steps_llmrl(cell: Cell, folder: Path, meter: Meter) -> dict[str, Any]:
    from transformers import TrainerCallback

    from llmrl.runs import Run
    from llmrl.trainers import loop
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun

    logged: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            meter.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logged.append(logs)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.lap()
            REWARDED.end_step()
            if state.global_step == cell.steps:
                meter.stop()
                raise MeasuredError

    config = llmrl_config(cell, folder)
    with timed(PolicyGradientRun, "collect") as rollout, contextlib.suppress(MeasuredError):
        loop.train(config, Run.open(config), callbacks=[Watch()])
    return {
        "rollout_seconds": rollout,
        "losses": [line["loss"] for line in logged],
        "grad_norms": [line["grad_norm"] for line in logged],
    }


@contextlib.contextmanager
def timed(owner: Any, method: str) -> Iterator[list[float]]:
    """The wall seconds of each call of a method."""
    found: list[float] = []
    own: Callable[..., Any] = getattr(owner, method)

    def measured(*arguments: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return own(*arguments, **kwargs)
        finally:
            found.append(time.perf_counter() - began)

    setattr(owner, method, measured)
    try:
        yield found
    finally:
        setattr(owner, method, own)


# -- TRL ---------------------------------------------------------------------------------------------------------


def trl_trainer(cell: Cell, folder: Path, meter: Meter) -> Any:
    """The trainer as a user with a CPU would set it up; one prompt's samples make a micro-batch."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    if cell.what == "rloo":
        from trl import RLOOConfig as Arguments
        from trl import RLOOTrainer as Trainer
    else:
        from trl import GRPOConfig as Arguments
        from trl import GRPOTrainer as Trainer

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            meter.start()

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            meter.lap()
            REWARDED.end_step()

        def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
            meter.stop()

    own = {} if cell.what == "rloo" else {"loss_type": "grpo"}
    arguments = Arguments(
        output_dir=str(folder / "trl"), max_steps=cell.steps, per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=cell.prompts, num_generations=SAMPLES, max_completion_length=cell.longest,
        learning_rate=cell.learning_rate, lr_scheduler_type="constant", seed=SEED, shuffle_dataset=False,
        logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
        **own,
    )  # fmt: skip
    return Trainer(
        str(folder / "model"), reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(prompt_rows(cell)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[Watch()],
    )  # fmt: skip


def update_trl(cell: Cell, folder: Path, meter: Meter) -> dict[str, Any]:
    trainer = trl_trainer(cell, folder, meter)
    batches = [padded_batch(step) for step in given_steps(cell)]
    slots = sum(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in batches)
    real = sum(int(batch["prompt_mask"].sum() + batch["completion_mask"].sum()) for batch in batches)
    rollouts = iter(batches)
    trainer._generate_and_score_completions = lambda rows: next(rollouts)
    trainer.train()
    return logged_by_trl(trainer) | {"slots": slots, "real_tokens": real}


def padded_batch(step: Step) -> dict[str, Any]:
    """What TRL's sampling hands to its update: prompts padded on the left, completions on the right."""
    import torch

    prompts = [prompt for prompt in step.prompts for _ in range(SAMPLES)]
    completions = [ids for samples in step.completions for ids in samples]
    longest_prompt, longest = max(map(len, prompts)), max(map(len, completions))

    def rows(parts: list[list[int]]) -> Any:
        return torch.tensor(parts)

    lengths = [len(ids) for ids in completions]
    return {
        "prompt_ids": rows([[0] * (longest_prompt - len(p)) + p for p in prompts]),
        "prompt_mask": rows([[0] * (longest_prompt - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": rows([c + [0] * (longest - len(c)) for c in completions]),
        "completion_mask": rows([[1] * n + [0] * (longest - n) for n in lengths]),
        "advantages": torch.tensor([a for advantages in step.advantages for a in advantages]),
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }


def steps_trl(cell: Cell, folder: Path, meter: Meter) -> dict[str, Any]:
    trainer = trl_trainer(cell, folder, meter)
    with timed(trainer, "_generate") as rollout:
        trainer.train()
    return logged_by_trl(trainer) | {"rollout_seconds": rollout}


def logged_by_trl(trainer: Any) -> dict[str, Any]:
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {"losses": [line["loss"] for line in logged], "grad_norms": [line["grad_norm"] for line in logged]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
