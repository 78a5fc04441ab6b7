"""Greedy accuracy on problems with known answers: what a recipe shows beside its loss.

task = TaskEvaluation(config.task_evaluation, tokenizer, run.note)     # refuses bad problems before training
result = task(model, accelerator, run.console.say)                     # every rank gets the whole result
run.evaluation(step, "task", result.metrics)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmrl.config import TaskEvaluationKeys
from llmrl.data.problems import prepare_problems
from llmrl.errors import RefusedError
from llmrl.evaluation.intervals import wilson_interval
from llmrl.evaluation.progress import Ticker
from llmrl.evaluation.samples import Sample
from llmrl.learner.together import gather
from llmrl.rewards.answers import final_number, is_correct
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import Completion, Engine, SamplingParams


@dataclass(frozen=True)
class Answered:
    """One problem and what the model said to it; `truncated`: it ran into the limit of new tokens."""

    prompt: str
    answer: str
    text: str
    correct: bool
    truncated: bool
    num_tokens: int


@dataclass(frozen=True)
class TaskResult:
    """`metrics` for evals.json, and every problem with its answer, in the order of the data."""

    metrics: dict[str, float]
    answered: list[Answered]


class TaskEvaluation:
    """The problems of a `task_evaluation` section, answered by whatever model is given.

    Under several processes each answers its share and all get the whole result; the model must be whole on each.
    """

    def __init__(
        self,
        keys: TaskEvaluationKeys,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
        max_positions: int | None = None,
    ) -> None:
        """`max_positions`: of the model that will answer, where it has a limit.

        Raises RefusedError for a problem that no answer could be right for, or that leaves no room for one.
        """
        self.keys, self.tokenizer = keys, tokenizer
        self.problems = list(prepare_problems(keys, tokenizer, say))
        for problem in self.problems:
            if final_number(problem["answer"]) is None:
                raise RefusedError(
                    f"{keys.dataset_name}, row {problem['row']}, column `{keys.answer_column}`: "
                    f"{problem['answer']!r} holds no number, so no answer could be right. Mend the row, or name "
                    "another column in task_evaluation.answer_column"
                )
            if max_positions and len(problem["prompt_ids"]) + keys.max_new_tokens > max_positions:
                raise RefusedError(
                    f"{keys.dataset_name}, row {problem['row']}, column `{keys.prompt_column}`: "
                    f"{len(problem['prompt_ids'])} tokens and task_evaluation.max_new_tokens {keys.max_new_tokens} "
                    f"exceed the model's {max_positions} positions. Lower max_new_tokens, or shorten the row"
                )

    def __call__(
        self, model: nn.Module, accelerator: Accelerator, say: Callable[[str], None] = lambda text: None
    ) -> TaskResult:
        """Answer all problems greedily with `model` as it is; `say` hears now and then how far it is."""
        engine = HuggingFaceEngine(model, self.tokenizer, max_rows=self.keys.batch_size)
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = gather(accelerator, self._answers(engine, self.problems[rank::world], say))
        whole = [shares[i % world][i // world] for i in range(len(self.problems))]
        return TaskResult(accuracy_metrics(whole), whole)

    def _answers(
        self, engine: Engine, problems: Sequence[dict[str, Any]], say: Callable[[str], None]
    ) -> list[Answered]:
        """A batch at a time, prompts of similar length together."""
        order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt_ids"]), reverse=True)
        answered: dict[int, Answered] = {}
        ticker = Ticker(say, "answering problems")
        for start in range(0, len(order), self.keys.batch_size):
            batch = order[start : start + self.keys.batch_size]
            found = answer(engine, self.tokenizer, [problems[i] for i in batch], self.keys.max_new_tokens)
            answered.update(zip(batch, found, strict=True))
            ticker(len(answered), len(problems))
        return [answered[i] for i in range(len(problems))]


def answer(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, problems: Sequence[dict[str, Any]], max_new_tokens: int
) -> list[Answered]:
    """One greedy completion a problem, its final number compared with the problem's."""
    found = engine.generate([p["prompt_ids"] for p in problems], SamplingParams(max_new_tokens, temperature=0))
    return [_answered(tokenizer, problem, only) for problem, (only,) in zip(problems, found, strict=True)]


def accuracy_metrics(answered: Sequence[Answered]) -> dict[str, float]:
    """`accuracy` with its 95% Wilson interval, `n`, `truncated` (share of answers), `mean_length` (tokens)."""
    n = len(answered)
    right = sum(a.correct for a in answered)
    low, high = wilson_interval(right, n)
    return {
        "accuracy": right / max(n, 1),
        "accuracy_interval_low": low,
        "accuracy_interval_high": high,
        "n": float(n),
        "truncated": sum(a.truncated for a in answered) / max(n, 1),
        "mean_length": sum(a.num_tokens for a in answered) / max(n, 1),
    }


def samples_of(result: TaskResult) -> list[Sample]:
    """All problems with their answers, as samples.json has them."""
    return [
        {"prompt": a.prompt, "answer": a.answer, "completions": [{"text": a.text, "correct": a.correct}]}
        for a in result.answered
    ]


def _answered(tokenizer: PreTrainedTokenizerBase, problem: dict[str, Any], completion: Completion) -> Answered:
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    return Answered(
        prompt=problem["prompt"],
        answer=problem["answer"],
        text=text,
        correct=is_correct(text, problem["answer"]),
        truncated=completion.finish_reason == "length",
        num_tokens=len(completion.token_ids),
    )
