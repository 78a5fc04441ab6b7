"""Where rollouts come from: rows in their order, refills of what teaches nothing, shares of ranks, checkpoints."""

import asyncio
import copy
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.online_run import REWARD, evals, write_online_config
from support.recipe_run import final_weights, metrics, run_method
from support.rollouts import rollout, turn

import llmrl.trainers.online.sampler
from llmrl.errors import RunFailedError
from llmrl.rollout.collector import Collected
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.trajectory import RolloutGroup
from llmrl.trainers.loop import LOOPConfig
from llmrl.trainers.online.ahead import Ahead
from llmrl.trainers.online.collected import added, beside, restored
from llmrl.trainers.online.experience import Experience
from llmrl.trainers.online.run import keep_rollouts
from llmrl.trainers.online.sampler import MOST_REFILLS
from llmrl.trainers.online.task import OnlineTask


def group(place: int, *rewards: float) -> RolloutGroup:
    turns = [turn(1, 2, logprobs=[-0.5], policy_version=3, rewards={"won": 1.0})]
    said = {"messages": [{"role": "user", "content": "x"}], "opening": 1}
    rollouts = [
        rollout([[5, 6]], turns, reward, row=place + 1, sample=s, seed=7, **said) for s, reward in enumerate(rewards)
    ]
    return RolloutGroup(place + 1, {"prompt": "x"}, rollouts, place)


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()]


def test_collections_one_after_the_other_and_beside_each_other() -> None:
    first = Collected([group(0, 1.0)], {"rollouts": 1, "completed": 1}, 2.0, 10, {"length": [1.0]}, {"failures": 1.0})
    second = Collected([group(2, 2.0)], {"rollouts": 2}, 3.0, 5, {"length": [2.0, 6.0]}, {"failures": 2.0, "late": 0.5})
    third = Collected([group(1, 3.0)], {}, 1.0, 0)
    after = added(first, second)
    assert ([g.place for g in after.groups], after.seconds, after.num_sampled) == ([0, 2], 5.0, 15)
    assert after.counts == {"rollouts": 3, "completed": 1}
    assert after.of_judging == {"length": 3.0, "failures": 3.0, "late": 0.5}
    whole = beside([first, second, third])
    assert ([g.place for g in whole.groups], whole.seconds, whole.num_sampled) == ([0, 1, 2], 3.0, 15)
    assert whole.of_judging == after.of_judging
    assert first.of_judging == {"length": 1.0, "failures": 1.0}


def test_rollouts_come_out_of_a_checkpoint_as_they_went_in() -> None:
    collected = Collected(
        [group(0, 1.0, 2.0), group(1, 0.5)], {"rollouts": 3}, 1.5, 3, {"length": [1.0]}, {"failures": 1}
    )
    assert restored(asdict(collected)) == collected


def test_what_was_sampled_ahead_and_failed_is_not_kept_and_raises_when_it_is_wanted() -> None:
    failing = Ahead(3, lambda: [Collected([]), RunFailedError("no server")])
    assert failing.sound() is None
    broken = Ahead(3, lambda: [][0])
    assert broken.sound() is None
    with pytest.raises(IndexError):
        broken.result()
    assert Ahead(3, lambda: [Collected([])]).sound() == [Collected([])]


def test_each_epoch_asks_every_row_once_and_each_row_as_often_as_it_should_be(tmp_path: Path) -> None:
    """58 rows to train on, 20 a step: the third step ends the epoch and begins the next one."""
    config = write_online_config(tmp_path, prompts_per_step=20, samples_per_prompt=2, max_steps=3)
    assert run_method("loop", config) == 0
    asked = [record["row"] for step in (1, 2, 3) for record in rollouts(tmp_path / "run", step)]
    assert len(asked) == 3 * 20 * 2
    assert Counter(Counter(asked).values()) == {2: 56, 4: 2}
    seeds = [(record["row"], record["sample"]) for record in rollouts(tmp_path / "run", 1)]
    assert len(set(seeds)) == 40


NUMBERED = (
    REWARD
    + """
calls = 0

def numbered(completions, log_metric, **columns):
    global calls
    calls += 1
    log_metric("call", calls)
    return [None, *paid(completions)[1:]]
"""
)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_reward_functions_note_is_the_metric_of_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Four prompts a step and six held-out rows after each: every collection has its own numbers of calls, whoever
    sampled it and when."""
    (tmp_path / "reward.py").write_text(NUMBERED)
    settings: dict[str, Any] = {"max_staleness": 1, "engine": {"kind": "vllm"}} if ahead else {}
    if ahead:
        monkeypatch.setattr(llmrl.trainers.online.sampler, "build_engine", engine_of_its_own)
    rewards = [f"{tmp_path / 'reward.py'}:numbered"]
    config = write_online_config(tmp_path, rewards=rewards, eval_steps=1, max_steps=3, **settings)
    assert run_method("loop", config) == 0
    lines = metrics(tmp_path / "run")
    asked_first = [7, 11, 21] if ahead else [7, 17, 27]
    assert [line["call"] for line in lines] == [first + 1.5 for first in asked_first]
    assert [line["rewards/numbered/no_score"] for line in lines] == [4, 4, 4]


def engine_of_its_own(config: Any, learner: Any, tokenizer: Any, max_length: int | None) -> HuggingFaceEngine:
    """One that may sample while the learner trains."""
    return HuggingFaceEngine(copy.deepcopy(learner.causal_lm), tokenizer)


def test_an_episode_that_nobody_judged_has_no_reward_and_one_that_was_cut_has_0(tmp_path: Path) -> None:
    settings = {"dataset_name": None, "rewards": [], "environment": "number_guessing", "environment_weight": 0.5}
    settings["rollout"] = {"max_turns": 4}
    config = LOOPConfig(**yaml.safe_load(write_online_config(tmp_path, **settings).read_text()))
    task = OnlineTask(config, print)
    judged, silent, cut = (group(0, 0.0).rollouts[0] for _ in range(3))
    silent.turns = cut.turns = [replace(judged.turns[0], rewards={})]
    cut.end_state = "truncated-turns"
    asyncio.run(task.score(RolloutGroup(1, {}, [judged, silent, cut])))
    assert [judged.reward, silent.reward, cut.reward] == [0.5, None, 0.0]


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4]), (0, [])])
def test_rollouts_are_kept_of_as_many_steps_as_asked_for(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    assert run_method("loop", write_online_config(tmp_path, save_rollouts=limit, eval_rows=0)) == 0
    found = sorted(file.name for file in (tmp_path / "run").glob("rollouts/*"))
    assert found == [f"step_{step}.jsonl" for step in kept]


def test_files_of_steps_to_come_are_of_an_earlier_attempt_and_go(tmp_path: Path) -> None:
    for name in ("step_1.jsonl", "step_2.jsonl", "step_10.jsonl", "step_3.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    keep_rollouts(tmp_path, 2, [group(0, 1.0)], str, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "notes.txt", "step_1.jsonl", "step_2.jsonl", "step_3.jsonl.gz",
    ]  # fmt: skip
    assert json.loads((tmp_path / "step_2.jsonl").read_text())["reward"] == 1.0


def test_a_rollout_is_kept_with_its_answer_and_the_very_tokens_that_were_sampled(tmp_path: Path) -> None:
    one = group(0, 1.0)
    one.row["answer"], one.rollouts[0].pieces = 7, [[5, 6, 8, 9]]
    one.rollouts[0].turns.append(turn(3, 4, logprobs=[-0.5], policy_version=3))
    keep_rollouts(tmp_path, 1, [one], str, None)
    kept = json.loads((tmp_path / "step_1.jsonl").read_text())
    assert (kept["completions"], kept["answer"]) == (["[6]", "[9]"], 7)


PICKY = (
    REWARD
    + """
def picky(completions, answer, **columns):
    return [score if own == "0" else 0.5 for score, own in zip(paid(completions), answer, strict=True)]

def equal(completions, **columns):
    return [0.5] * len(completions)
"""
)


def picky(tmp_path: Path, function: str = "picky", **settings: Any) -> Path:
    """One in four prompts can teach. A fifth of 4 tokens is none, so that no answer is punished for its length."""
    (tmp_path / "reward.py").write_text(PICKY)
    prompts = [f"red {word} {other}" for word in ("one", "two", "three") for other in ("cat", "dog", "the", "a")]
    rows = [{"prompt": prompt, "answer": str(i % 4)} for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"rewards": [f"{tmp_path / 'reward.py'}:{function}"], "algorithm": "dapo_clip", "eval_rows": 0}
    return write_online_config(tmp_path, **{**given, "max_completion_length": 4, **settings})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("loop", {}),
        ("loop", {"algorithm": "loop", "dynamic_sampling": True}),
        ("loop", {"algorithm": "grpo", "dynamic_sampling": True, "max_staleness": 1, "engine": {"kind": "vllm"}}),
        ("pf_ppo", {"algorithm": None, "dynamic_sampling": True, "eval_rows": 4, "eval_steps": 2}),
    ],
)
def test_dynamic_sampling_replaces_prompts_that_teach_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any]
) -> None:
    """Of any algorithm that compares a prompt's rollouts; held-out rows are never left out."""
    if "engine" in settings:
        monkeypatch.setattr(llmrl.trainers.online.sampler, "build_engine", engine_of_its_own)
    config = picky(tmp_path, **settings)
    teaching = {i + 1 for i in range(12) if i % 4 == 0}
    assert run_method(method, config) == 0
    if "eval_rows" in settings:  # by their hashes there is one, and all its answers are worth the same
        assert [entry["metrics"]["reward"] for entry in evals(tmp_path / "run")] == [0.5] * 3
    for step, line in enumerate(metrics(tmp_path / "run"), 1):
        records = rollouts(tmp_path / "run", step)
        assert {record["row"] for record in records} <= teaching
        assert 3 * 4 <= len(records) <= 4 * 4  # of a prompt of which all rollouts happen to be equal there is none
        assert line["frac_reward_zero_std"] == 0
        assert line["updates"] >= 1
        discarded, stayed = line["dynamic_sampling/prompts_discarded"], len(records) / 4
        assert line["dynamic_sampling/frac_reward_zero_std"] == discarded / (discarded + stayed)


def test_dynamic_sampling_gives_up_where_nothing_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = picky(tmp_path, "equal", max_empty_steps=1)
    assert run_method("loop", config) == 1
    said = capsys.readouterr()
    assert "nothing could be learned in 1 steps in a row" in said.err
    assert "only 0 prompts for a step of 4: with 44 others, in 10 refills too, all rollouts are equally" in said.out
    tried = metrics(tmp_path / "run")[0]
    assert (tried["rollouts"], tried["updates"], tried["dynamic_sampling/prompts_discarded"]) == (0, 0, 44)
    assert tried["dynamic_sampling/reward"] == 0.5
    assert MOST_REFILLS == 10


@pytest.mark.parametrize("algorithm", ["dapo_clip", "loop"])
def test_a_resumed_run_with_dynamic_sampling_goes_on_at_the_right_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    config = picky(tmp_path, save_steps=1, algorithm=algorithm, dynamic_sampling=True, overlong_buffer=0.5)
    assert run_method("loop", config, "--output_dir", str(tmp_path / "reference")) == 0
    train, calls = Experience.train, 0

    def fails_at_3(*arguments: Any, **named: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RunFailedError("no luck")
        return train(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Experience, "train", fails_at_3)
        assert run_method("loop", config) == 1
    assert run_method("loop", config, "--resume_from_checkpoint", "latest") == 0
    for step in (3, 4):
        assert rollouts(tmp_path / "run", step) == rollouts(tmp_path / "reference", step)
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "reference")


def test_one_step_ahead_does_not_share_random_numbers_with_dropout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = {"engine": {"kind": "vllm"}, "use_peft": True, "lora_dropout": 0.1}
    config = write_online_config(tmp_path, max_staleness=1, **vllm)
    assert run_method("loop", config) == 2
    assert "lora_dropout; set it to 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
