"""Where rollouts come from: rows in their order, refills of what teaches nothing, shares of ranks, checkpoints."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.online_run import REWARD, run_online, write_online_config
from support.recipe_run import final_weights, metrics

import llmrl.runs.report
from llmrl.errors import RunFailedError
from llmrl.rollout.collector import Collected
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn
from llmrl.trainers.experience import Experience
from llmrl.trainers.sampling import MOST_REFILLS, _Ahead, _restored, added, beside


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than these runs."""
    monkeypatch.setattr(llmrl.runs.report, "write_report", lambda directory: directory)


def group(place: int, *rewards: float) -> RolloutGroup:
    turn = Turn(0, 1, 2, [-0.5], "stop", 3, {"won": 1.0})
    rollouts = [
        Rollout(place + 1, s, 7, [[5, 6]], [turn], [{"role": "user", "content": "x"}], 1, "completed", reward=reward)
        for s, reward in enumerate(rewards)
    ]
    return RolloutGroup(place + 1, {"prompt": "x"}, rollouts, place)


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()]


def test_collections_one_after_the_other_and_beside_each_other() -> None:
    first = Collected([group(0, 1.0)], {"rollouts": 1, "completed": 1}, 2.0, 10)
    second = Collected([group(2, 2.0)], {"rollouts": 2}, 3.0, 5)
    third = Collected([group(1, 3.0)], {}, 1.0, 0)
    after = added(first, second)
    assert ([g.place for g in after.groups], after.seconds, after.num_sampled) == ([0, 2], 5.0, 15)
    assert after.counts == {"rollouts": 3, "completed": 1}
    whole = beside([first, second, third])
    assert ([g.place for g in whole.groups], whole.seconds, whole.num_sampled) == ([0, 1, 2], 3.0, 15)


def test_rollouts_come_out_of_a_checkpoint_as_they_went_in() -> None:
    collected = Collected([group(0, 1.0, 2.0), group(1, 0.5)], {"rollouts": 3}, 1.5, 3)
    assert _restored(asdict(collected)) == collected


def test_what_was_sampled_ahead_and_failed_is_not_kept_and_raises_when_it_is_wanted() -> None:
    failing = _Ahead(3, lambda: [Collected([]), RunFailedError("no server")])
    assert failing.sound() is None
    broken = _Ahead(3, lambda: [][0])
    assert broken.sound() is None
    with pytest.raises(IndexError):
        broken.result()
    assert _Ahead(3, lambda: [Collected([])]).sound() == [Collected([])]


def test_each_epoch_asks_every_row_once_and_each_row_as_often_as_it_should_be(tmp_path: Path) -> None:
    """58 rows to train on, 20 a step: the third step ends the epoch and begins the next one."""
    config = write_online_config(tmp_path, prompts_per_step=20, samples_per_prompt=2, max_steps=3)
    assert run_online("loop", config) == 0
    asked = [record["row"] for step in (1, 2, 3) for record in rollouts(tmp_path / "run", step)]
    assert len(asked) == 3 * 20 * 2
    assert Counter(Counter(asked).values()) == {2: 56, 4: 2}
    seeds = [(record["row"], record["sample"]) for record in rollouts(tmp_path / "run", 1)]
    assert len(set(seeds)) == 40


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


def test_dynamic_sampling_replaces_prompts_that_teach_nothing(tmp_path: Path) -> None:
    config = picky(tmp_path)
    teaching = {i + 1 for i in range(12) if i % 4 == 0}
    assert run_online("loop", config) == 0
    for step, line in enumerate(metrics(tmp_path / "run"), 1):
        records = rollouts(tmp_path / "run", step)
        assert {record["row"] for record in records} <= teaching
        assert 3 * 4 <= len(records) <= 4 * 4  # of a prompt of which all rollouts happen to be equal there is none
        assert line["frac_reward_zero_std"] == 0
        assert line["updates"] >= 1


def test_dynamic_sampling_gives_up_where_nothing_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = picky(tmp_path, "equal", max_empty_steps=1)
    assert run_online("loop", config) == 1
    assert "nothing could be learned in 1 steps in a row" in capsys.readouterr().err
    tried = metrics(tmp_path / "run")[0]
    assert (tried["rollouts"], tried["updates"]) == (0, 0)
    assert MOST_REFILLS == 10


def test_a_resumed_run_with_dynamic_sampling_goes_on_at_the_right_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = picky(tmp_path, save_steps=1)
    assert run_online("loop", config, "--output_dir", str(tmp_path / "reference")) == 0
    train, calls = Experience.train, 0

    def fails_at_3(*arguments: Any, **named: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RunFailedError("no luck")
        return train(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Experience, "train", fails_at_3)
        assert run_online("loop", config) == 1
    assert run_online("loop", config, "--resume_from_checkpoint", "latest") == 0
    for step in (3, 4):
        assert rollouts(tmp_path / "run", step) == rollouts(tmp_path / "reference", step)
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "reference")


def test_one_step_ahead_does_not_share_random_numbers_with_dropout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = {"engine": {"kind": "vllm"}, "use_peft": True, "lora_dropout": 0.1}
    config = write_online_config(tmp_path, max_staleness=1, **vllm)
    assert run_online("loop", config) == 2
    assert "lora_dropout; set it to 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
