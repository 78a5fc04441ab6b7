"""Reward functions as TRL's documentation has them written run unchanged, on text and on messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.online_run import write_online_config
from support.recipe_run import metrics, run_method

FUNCTIONS = '''
import asyncio, re

def by_length(completion_ids, **kwargs):
    """The longer the better."""
    return [float(len(ids)) for ids in completion_ids]

def begins_with_a_word(completions, **kwargs):
    """Of text."""
    return [1.0 if re.match(r"^\\s*\\w+", completion) else 0.0 for completion in completions]

def message_begins_with_a_word(completions, **kwargs):
    """Of messages."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^\\s*\\w+", content) else 0.0 for content in contents]

def same_as_the_truth(prompts, completions, ground_truth, **kwargs):
    assert len(prompts) == len(completions) == len(ground_truth)
    return [1.0 if str(c) == t else 0.0 for c, t in zip(completions, ground_truth)]

def of_one_task(completions, task, **kwargs):
    """Rows of other tasks have no score."""
    return [1.0 if t == "colours" else None for t in task]

async def slow(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)

def logs(completions, ground_truth, trainer_state, log_extra=None, log_metric=None, **kwargs):
    if log_extra:
        log_extra("truth", list(ground_truth))
    if log_metric:
        log_metric("step_of_trainer", trainer_state.global_step)
    return [0.0] * len(completions)

def of_text(prompts, completions, **kwargs):
    assert all(isinstance(p, str) and " " in p for p in prompts), prompts
    assert all(isinstance(c, str) for c in completions), completions
    return [0.0] * len(completions)

def of_messages(prompts, completions, **kwargs):
    assert all([m["role"] for m in p] == ["system", "user"] for p in prompts), prompts
    assert all([m["role"] for m in c] == ["assistant"] for c in completions), completions
    return [0.0] * len(completions)
'''


def rows(as_messages: bool) -> list[dict[str, Any]]:
    texts = ["red blue", "one two", "the cat"] * 4
    system = {"role": "system", "content": "red"}
    return [
        {
            "prompt": [system, {"role": "user", "content": text}] if as_messages else text,
            "ground_truth": "red",
            "task": "colours" if number % 3 == 0 else "numbers",
        }
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_they_run_unchanged(tmp_path: Path, kind: str) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind == "messages")))
    of_kind = {"text": ["begins_with_a_word", "of_text"], "messages": ["message_begins_with_a_word", "of_messages"]}
    names = [*of_kind[kind], "by_length", "same_as_the_truth", "of_one_task", "slow", "logs"]
    config = write_online_config(
        tmp_path, rewards=[f"{tmp_path / 'functions.py'}:{name}" for name in names], reward_max_failures=1, max_steps=2,
        eval_rows=0, prompts_per_step=6, save_steps=1,
    )  # fmt: skip
    assert run_method("loop", config) == 0
    first, second = metrics(tmp_path / "run")
    for name in names:
        assert first[f"rewards/{name}/failures"] == second[f"rewards/{name}/failures"] == 0
    assert first["rewards/slow/mean"] == 0.5
    assert first["rewards/by_length/mean"] == pytest.approx(first["completions/mean_length"])
    assert 0 < first[f"rewards/{of_kind[kind][0]}/mean"] <= 1
    # Eight of the twelve rows, each of which comes once, are of another task.
    assert first["rewards/of_one_task/no_score"] + second["rewards/of_one_task/no_score"] == 8 * 4
    assert first["rewards/of_one_task/mean"] == 1
    assert (first["step_of_trainer"], second["step_of_trainer"]) == (0, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert all(line["extra"] == {"truth": "red"} for line in lines)
    assert run_method("loop", config, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoints" / "step_1")) == 0
    assert [line["step_of_trainer"] for line in metrics(tmp_path / "run")] == [0, 1]


def test_a_function_for_messages_fails_on_text_in_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it does with TRL."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    rewards = [f"{tmp_path / 'functions.py'}:message_begins_with_a_word"]
    assert run_method("loop", write_online_config(tmp_path, rewards=rewards, reward_max_failures=1, eval_rows=0)) == 1
    assert 'completion[0]["content"]' in capsys.readouterr().err
