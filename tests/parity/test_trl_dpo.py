"""The same pairs, model and settings in TRL's DPOTrainer and here: the same losses and gradient norms, step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from support.models import make_tiny_model
from support.words import WORDS, word_tokenizer
from transformers import PreTrainedTokenizerFast

from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import completion
from llmrl.objectives.dpo import DPO

STEPS, PAIRS_PER_STEP, RATE = 3, 4, 1e-3


def text_pairs() -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def sentence(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    rows = [
        {"prompt": sentence(3, 15), "chosen": " " + sentence(1, 9), "rejected": " " + sentence(2, 12)}
        for _ in range(STEPS * PAIRS_PER_STEP)
    ]
    return Dataset.from_list(rows)


def trl_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **loss: Any) -> tuple[list[dict[str, Any]], Any]:
    from trl import DPOConfig, DPOTrainer

    model_folder = tmp_path / "model"
    make_tiny_model(vocab_size=len(tokenizer)).save_pretrained(model_folder)
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=STEPS, per_device_train_batch_size=PAIRS_PER_STEP,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, max_grad_norm=1.0,
        precompute_ref_log_probs=True, **loss,
    )  # fmt: skip
    trainer = DPOTrainer(str(model_folder), args=arguments, train_dataset=text_pairs(), processing_class=tokenizer)
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], trainer.train_dataset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": ["sigmoid"]}, {"loss_type": "sigmoid"}),
        ({"loss_type": ["robust"], "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
        ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
        ({"loss_type": ["ipo"]}, {"loss_type": "ipo"}),
        ({"loss_type": ["sigmoid_norm"]}, {"loss_type": "sigmoid_norm"}),
    ],
    ids=lambda value: value["loss_type"] if isinstance(value["loss_type"], str) else "trl",
)
def test_losses_equal_trl(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    tokenizer = word_tokenizer()
    expected, rows = trl_run(tmp_path, tokenizer, **theirs)
    options = LearnerOptions(learning_rate=RATE, lr_scheduler_type="constant", reference="frozen", total_steps=STEPS)
    learner = Learner(make_tiny_model(vocab_size=len(tokenizer)), options, Accelerator(cpu=True))
    objective = DPO(**ours).objective()
    for step, line in enumerate(expected):
        batch = rows.select(range(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP))
        groups = [
            (completion(r["prompt_ids"], r["chosen_ids"]), completion(r["prompt_ids"], r["rejected_ids"]))
            for r in batch
        ]
        metrics = learner.update(groups, objective)
        assert metrics["loss"] == pytest.approx(line["loss"], rel=1e-5, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(line["grad_norm"], rel=2e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert metrics[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5), name
