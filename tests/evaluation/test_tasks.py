"""Greedy accuracy on problems, with an engine that says what the test wants it to say."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator
from support.words import word_tokenizer

from llmrl.config import TaskEvaluationKeys
from llmrl.errors import RefusedError
from llmrl.evaluation.samples import KeptSamples
from llmrl.evaluation.tasks import TaskEvaluation, TaskResult, accuracy_metrics, answer, samples_of
from llmrl.rollout.protocol import Completion, SamplingParams


class Script:
    """Answers the prompts with given texts, one a prompt."""

    def __init__(self, tokenizer, texts: list[str], reasons: list[str]) -> None:
        self.tokenizer, self.texts, self.reasons = tokenizer, texts, reasons

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        assert sampling.temperature == 0
        ids = [self.tokenizer(text)["input_ids"] for text in self.texts]
        return [
            [Completion(i, [0.0] * len(i), reason, 0)]
            for i, reason, _ in zip(ids, self.reasons, prompt_ids, strict=True)
        ]


class Numbers:
    """Decodes ids as the numbers that they are."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


def problems(*answers: str) -> list[dict]:
    return [{"prompt_ids": [1], "prompt": f"problem {i}", "answer": a, "row": i} for i, a in enumerate(answers, 1)]


def result_of(texts: list[str], *answers: str, reasons: list[str] | None = None):
    engine = Script(Numbers(), texts, reasons or ["stop"] * len(texts))
    answered = answer(engine, Numbers(), problems(*answers), 8)
    return TaskResult(accuracy_metrics(answered), answered)


class Echo:
    """Says its prompt again."""

    def __init__(self, model: object, tokenizer: object, max_rows: int) -> None:
        self.max_rows = max_rows

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        assert len(prompt_ids) <= self.max_rows
        return [[Completion(list(ids), [0.0] * len(ids), "stop", 0)] for ids in prompt_ids]


def test_answers_come_in_the_order_of_the_problems_and_it_is_said_how_far_it_is(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("llmrl.evaluation.tasks.HuggingFaceEngine", Echo)
    monkeypatch.setattr("llmrl.evaluation.progress.SAID_EVERY_SECONDS", 0.0)
    task = TaskEvaluation.__new__(TaskEvaluation)
    task.keys = TaskEvaluationKeys(dataset_name="nowhere", batch_size=2)
    task.tokenizer = Numbers()
    task.problems = problems("1", "2", "3", "4", "5")
    for number, problem in enumerate(task.problems, 1):
        problem["prompt_ids"] = [7] * (number % 3) + [number]
    result = task(None, Accelerator(cpu=True), said.append)
    assert result.metrics["accuracy"] == 1.0
    assert [a.prompt for a in result.answered] == [f"problem {i}" for i in range(1, 6)]
    assert said == ["answering problems: 2 of 5", "answering problems: 4 of 5"]


def test_accuracy_interval_and_lengths():
    result = result_of(["1 2", "3", "5 5 5", "7"], "2", "3", "4", "7", reasons=["stop", "stop", "length", "stop"])
    assert result.metrics["accuracy"] == 0.75
    assert result.metrics["n"] == 4
    assert result.metrics["truncated"] == 0.25
    assert result.metrics["mean_length"] == 1.75
    assert result.metrics["accuracy_interval_low"] == pytest.approx(0.3006, abs=1e-4)
    assert result.metrics["accuracy_interval_high"] == pytest.approx(0.9544, abs=1e-4)
    assert [a.correct for a in result.answered] == [True, True, False, True]
    assert result.answered[2].truncated


def test_the_first_and_the_latest_samples_stand_beside_each_other(tmp_path):
    file = tmp_path / "samples.json"
    KeptSamples(file, "other", begun=False).keep([{"prompt": "problem 1", "completions": []}])
    kept = KeptSamples(file, "task", begun=False)
    for said in (["1", "2", "3"], ["9", "1", "1"]):
        kept.keep(samples_of(result_of(said, "1", "1", "1")))
    KeptSamples(file, "task", begun=True).keep(samples_of(result_of(["1", "1", "1"], "1", "1", "1")))
    assert json.loads(file.read_text()) == [
        {"evaluation": "other", "prompt": "problem 1", "completions": []},
        *(
            {
                "evaluation": "task",
                "prompt": f"problem {i}",
                "answer": "1",
                "completions": [
                    {"label": "before", "text": str(i), "correct": i == 1},
                    {"label": "after", "text": "1", "correct": True},
                ],
            }
            for i in (1, 2, 3)
        ),
    ]


def test_answers_without_a_number_are_refused_before_training(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "cat", "answer": "7"}\n{"prompt": "dog", "answer": "many"}\n')
    keys = TaskEvaluationKeys(dataset_name=str(file), dataset_test_split="train")
    with pytest.raises(RefusedError, match=r"row 2, column `answer`: 'many' holds no number"):
        TaskEvaluation(keys, word_tokenizer(), lambda text: None)


def test_a_problem_that_leaves_no_room_for_an_answer_is_named_by_its_row(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "cat", "answer": "7"}\n{"prompt": "cat dog cat dog", "answer": "8"}\n')
    keys = TaskEvaluationKeys(dataset_name=str(file), dataset_test_split="train", max_new_tokens=6)
    longest = max(len(p["prompt_ids"]) for p in TaskEvaluation(keys, word_tokenizer(), print).problems)
    TaskEvaluation(keys, word_tokenizer(), print, max_positions=longest + 6)
    with pytest.raises(RefusedError, match=r"row 2, column `prompt`: \d+ tokens and task_evaluation.max_new_tokens 6"):
        TaskEvaluation(keys, word_tokenizer(), print, max_positions=longest + 5)


RANK = """
import json, sys
from types import SimpleNamespace
import torch.distributed as dist
from pathlib import Path
from support.models import make_tiny_model
from support.words import word_tokenizer
from llmrl.config import TaskEvaluationKeys
from llmrl.evaluation.tasks import TaskEvaluation

folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
tokenizer = word_tokenizer()
keys = TaskEvaluationKeys(
    dataset_name=str(folder / "problems.jsonl"), dataset_test_split="train", max_new_tokens=6, batch_size=2
)
accelerator = SimpleNamespace(process_index=rank, num_processes=world)
result = TaskEvaluation(keys, tokenizer, lambda text: None)(make_tiny_model(vocab_size=len(tokenizer)), accelerator)
answered = [[a.prompt, a.text] for a in result.answered]
(folder / f"result_{rank}_{world}.json").write_text(json.dumps([result.metrics, answered]))
"""


@pytest.mark.slow
def test_two_processes_share_the_problems_and_both_know_all_answers(tmp_path):
    words = ["red cat", "blue", "one dog sees", "two", "the a"]
    rows = [json.dumps({"prompt": text, "answer": str(i)}) for i, text in enumerate(words)]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows) + "\n")
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])

    def run(world: int) -> list:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(world)],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
            for rank in range(world)
        ]
        assert [process.wait(timeout=120) for process in ranks] == [0] * world
        return [json.loads((tmp_path / f"result_{rank}_{world}.json").read_text()) for rank in range(world)]

    (alone,) = run(1)
    assert run(2) == [alone, alone]
    assert [prompt for prompt, _ in alone[1]] == words
