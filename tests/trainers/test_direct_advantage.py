"""Direct Advantage's stages against numbers worked out by hand, its critic in a folder, and runs that are killed."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file
from support.forked import finish, launched, signalled
from support.models import make_tiny_model
from support.online_run import write_online_config
from support.recipe_run import final_weights, metrics, run_method
from support.rollouts import rollout, turn

from llmrl.config import ModelKeys
from llmrl.data.steps import by_delimiter, segmenter
from llmrl.errors import RefusedError, RunFailedError
from llmrl.learner.learner import Learner
from llmrl.learner.loading import load_model
from llmrl.learner.options import LearnerOptions
from llmrl.objectives.direct_advantage import DirectAdvantage
from llmrl.rollout.trajectory import Rollout, RolloutGroup
from llmrl.trainers.direct_advantage import critic as critics
from llmrl.trainers.direct_advantage import method as direct_advantage
from llmrl.trainers.direct_advantage import rounds, stage_files, stages
from llmrl.trainers.direct_advantage.method import DirectAdvantageConfig

NEWLINE = by_delimiter("\n")
END, NEW = 0, 9
"""Token 0 ends an answer and has no text, token 9 is a newline; the others are digits."""


def decode(ids: Sequence[int]) -> str:
    return "".join({END: "", NEW: "\n"}.get(i, str(i)) for i in ids)


def config(**settings: Any) -> DirectAdvantageConfig:
    base = {"model_name_or_path": "m", "output_dir": "o", "rewards": ["correct_number"], "kept_per_prompt": 4}
    return DirectAdvantageConfig.model_validate({**base, **settings})


def answer(ids: list[int], reward: float, row: int = 1, given: int = 0) -> Rollout:
    logprobs = [math.nan] * given + [-1.0] * (len(ids) - given)
    return rollout([[7, 7, *ids]], [turn(2, 2 + len(ids), logprobs=logprobs, given=given)], reward, row=row)


# -- A.1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "count", "kept"),
    [
        ("rrrrwwww", 4, [0, 1, 4, 5]),
        ("rrrrrrrw", 4, [0, 1, 2, 7]),
        ("wwwwwwrw", 4, [0, 1, 2, 6]),
        ("rrrr", 3, [0, 1, 2]),
        ("wrwr", 3, [0, 1, 2]),
        ("rw", 6, [0, 1]),
        ("", 2, []),
    ],
)
def test_answers_are_kept_as_evenly_right_and_wrong_as_they_come(right: str, count: int, kept: list[int]) -> None:
    assert stages.balanced([kind == "r" for kind in right], count) == kept


def test_equal_answers_are_kept_once_in_the_order_in_which_they_came() -> None:
    x, y, z = [1, NEW, 2, END], [3, NEW, 4, END], [5, NEW, 6, END]
    group = RolloutGroup(1, {}, [answer(ids, 1) for ids in (x, y, x, z)])
    kept = stages.kept_answers(group, config(kept_per_prompt=2))
    assert [list(answer.ids) for answer in kept] == [x, y]
    assert [(answer.prompt_ids, answer.right) for answer in kept] == [([7, 7], True)] * 2


def test_states_are_spread_over_an_answer() -> None:
    assert stages.spread_over(4, None) == [0, 1, 2, 3]
    assert stages.spread_over(9, 3) == [0, 4, 8]
    assert stages.spread_over(9, 1) == [0]
    for num_steps in range(1, 40):
        for most in range(2, 12):
            found = stages.spread_over(num_steps, most)
            assert len(found) == min(num_steps, most)
            assert (found[0], found[-1]) == (0, num_steps - 1)


def test_states_are_the_beginnings_of_kept_answers_at_token_boundaries() -> None:
    first = [1, NEW, 2, NEW, 3, END]
    group = RolloutGroup(5, {}, [
        answer(first, 1, 5), answer(first, 1, 5), answer([1, NEW, 4, END], 0, 5), answer([6, END], 0, 5),
    ])  # fmt: skip
    lines, counts = stages.states_of([group], config(kept_per_prompt=3), NEWLINE, decode)
    assert [(line["answer_ids"], line["step"], line["steps"], line["right"]) for line in lines] == [
        ([], 0, 3, True), ([1, NEW], 1, 3, True), ([1, NEW, 2, NEW], 2, 3, True),
    ]  # fmt: skip
    assert [line["state"] for line in lines] == [0, 1, 2]
    assert {line["row"] for line in lines} == {5}
    assert lines[2]["prompt_ids"] == [7, 7]
    assert lines[2]["text"] == "1\n2\n"
    # The equal answer is kept once; [] comes again with both others, [1, NEW] with one.
    assert counts == {"answers": 4, "right": 0.5, "kept": 3, "of_one_step": 1, "states": 3, "states_again": 3}


def test_answers_without_any_step_are_refused_with_the_longest_as_an_example() -> None:
    group = RolloutGroup(3, {}, [answer([4, END], 0, 3), answer([1, 2, END], 1, 3)])
    with pytest.raises(RefusedError, match=r"none of 2 answers .*step_delimiter '\\n'; the longest, of row 3: '12'"):
        stages.states_of([group], config(), NEWLINE, decode)


def test_answers_are_divided_by_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def words(text):\n    return [text[i : i + 2] for i in range(0, len(text), 2)]\n")
    split = segmenter(config(step_function=f"{file}:words"))
    lines, _ = stages.states_of([RolloutGroup(1, {}, [answer([1, 2, 3, 4, 5, END], 1)])], config(), split, decode)
    assert [line["text"] for line in lines] == ["", "12", "1234"]
    with pytest.raises(RefusedError, match=r"step_function: .*mine.py:sentences.*did you mean `words`"):
        segmenter(config(step_function=f"{file}:sentences"))
    with pytest.raises(RefusedError, match="step_function: `words` names no function"):
        segmenter(config(step_function="words"))
    for name, says in (("lossy", "[text.split()[0]]"), ("none", "None"), ("raises", "1 / 0")):
        file = tmp_path / f"{name}.py"
        file.write_text(f"def steps(text):\n    return {says}\n")
        with pytest.raises(RefusedError, match=rf"step_function .*{name}.py:steps (raised|must give)"):
            segmenter(config(step_function=f"{file}:steps"))


def test_success_needs_rewards_of_0_and_1_or_a_threshold() -> None:
    half = answer([1, NEW, 2, END], 0.5, row=8)
    with pytest.raises(RefusedError, match=r"row 8, answer 1: the reward is 0.5.*success_threshold"):
        stages.is_right(half, None)
    assert stages.is_right(half, 0.5)
    assert not stages.is_right(half, 0.6)
    assert [stages.is_right(answer([1], reward), None) for reward in (0.0, 1.0)] == [False, True]


# -- A.2 and A.3 -----------------------------------------------------------------------------------------------------

STATES = [
    {"state": i, "row": row, "answer": 0, "step": i, "prompt_ids": [7, 7], "answer_ids": [1, NEW][: 2 * i], "text": ""}
    for i, row in enumerate((1, 1, 2))
]


def test_a_success_rate_is_the_share_of_right_completions() -> None:
    group = RolloutGroup(1, {}, [answer([1, NEW, 3, END], r, given=2) for r in (1, 0, 1, 1)])
    line = stages.completion_line(STATES[1], group, None, decode)
    assert line is not None
    assert (line["state"], line["rate"]) == (1, 0.75)
    assert [one["ids"] for one in line["completions"]] == [[3, END]] * 4  # without the state's own tokens
    assert stages.completion_line(STATES[1], RolloutGroup(1, {}, []), None, decode) is None


def test_what_is_asked_goes_on_from_each_state_with_numbers_of_its_own() -> None:
    rows = {1: {"prompt": "a"}, 2: {"prompt": "b"}}
    tasks = stages.tasks_from(STATES, rows, config(completions_per_state=3), 0)
    assert [(t.number, t.row, t.samples, t.given) for t in tasks] == [
        (1, rows[1], 3, ()), (1, rows[1], 3, (1, NEW)), (2, rows[2], 3, (1, NEW)),
    ]  # fmt: skip
    again = stages.tasks_from(STATES, rows, config(completions_per_state=3), 1)
    assert len({task.seed for task in tasks + again}) == 6


def test_the_critic_is_judged_on_prompts_that_it_was_not_trained_on() -> None:
    states = [{**STATES[0], "state": i, "row": i // 3, "answer": i % 3 // 2} for i in range(60)]
    completions = [{"state": i, "row": i // 3, "rate": i / 60} for i in range(60)]
    found = stages.critic_groups(states, completions, END, 0.25, 0)

    def rates(groups: Sequence[Any]) -> list[int]:
        return [round(60 * float(s.token_values["success_rate"][0])) for group in groups for s in group]

    trained, held = rates(found.train), rates(found.validation)
    assert sorted(trained + held) == list(range(60))
    assert len({i // 3 for i in held}) == 5
    assert not {i // 3 for i in trained} & {i // 3 for i in held}
    assert {len(group) for group in found.train} == {1, 2}  # the states of one answer are together
    with pytest.raises(RefusedError, match="none of the completions from 3 states has a reward"):
        stages.critic_groups([{}, {}, {}], [], 0, 0.5, 0)
    with pytest.raises(RefusedError, match="more prompts_per_round"):
        stages.critic_groups(states[:3], completions[:3], END, 0.1, 0)


# -- B.1 and B.2 -----------------------------------------------------------------------------------------------------


def candidate(ids: list[int], ends: bool = False, right: bool = False) -> stages.Candidate:
    return stages.Candidate(tuple(ids), ends, right)


def test_candidates_are_the_first_steps_of_completions() -> None:
    line = {"completions": [
        {"ids": [1, NEW, 2, END], "right": True}, {"ids": [3, END], "right": False}, {"ids": [4, NEW], "right": True},
    ]}  # fmt: skip
    assert stages.candidates_of(line, NEWLINE, decode) == [
        candidate([1, NEW], right=True), candidate([3, END], ends=True), candidate([4, NEW], ends=True, right=True),
    ]  # fmt: skip


def test_advantages_are_those_worked_out_by_hand() -> None:
    """T1 of the paper's page: values .8, .8, .5, .1 with the first action twice; base .55, not the .4667 of three."""
    found = [candidate([1, NEW]), candidate([1, NEW]), candidate([2, NEW]), candidate([3, NEW])]
    values = {(1, NEW): 0.8, (2, NEW): 0.5, (3, NEW): 0.1}
    line = stages.action_line(STATES[1], found, values, 0.1, decode)
    assert line["value"] == pytest.approx(0.55)
    assert [a["advantage"] for a in line["actions"]] == pytest.approx([0.25, -0.05, -0.45])
    assert [a["value"] for a in line["actions"]] == pytest.approx([0.8, 0.5, 0.1])
    assert [a["count"] for a in line["actions"]] == [2, 1, 1]
    assert line["spread"] == pytest.approx(0.7)
    assert line["kept"]
    assert not stages.action_line(STATES[1], found, values, 0.71, decode)["kept"]


def test_an_action_that_ends_the_answer_is_worth_its_outcome() -> None:
    found = [candidate([1, END], ends=True, right=True), candidate([2, END], ends=True), candidate([3, NEW])]
    line = stages.action_line(STATES[1], found, {(3, NEW): 0.2}, 0.1, decode)
    assert [a["value"] for a in line["actions"]] == pytest.approx([1.0, 0.0, 0.2])
    assert [a["advantage"] for a in line["actions"]] == pytest.approx([0.6, -0.4, -0.2])
    assert [a["ends"] for a in line["actions"]] == [True, True, False]
    assert stages.going_on(found) == [(3, NEW)]


def test_a_state_with_one_action_is_left_out() -> None:
    line = stages.action_line(STATES[0], [candidate([1, NEW])] * 3, {(1, NEW): 0.9}, 0.0, decode)
    assert not line["kept"]


def test_rows_of_the_actor_are_scored_on_the_action_alone() -> None:
    found = [candidate([1, NEW]), candidate([2, 2, END], ends=True, right=True)]
    line = stages.action_line(STATES[1], found, {(1, NEW): 0.0}, 0.1, decode)
    line["actions"][0]["reference_logprobs"] = [-1.0, -2.0]
    first, second = stages.actor_group(line)
    assert first.token_ids.tolist() == [7, 7, 1, NEW, 1, NEW]
    assert first.scored.tolist() == [False] * 4 + [True] * 2
    assert second.num_scored == 3
    assert first.reference_logprobs is not None
    assert first.reference_logprobs.tolist() == [-1.0, -2.0]
    assert (first.values["advantage"], second.values["advantage"]) == pytest.approx((-0.5, 0.5))


# -- the critic ------------------------------------------------------------------------------------------------------


def actor(folder: Path, use_peft: bool) -> tuple[Learner, ModelKeys]:
    if not folder.exists():
        make_tiny_model().save_pretrained(folder)
    keys = ModelKeys(model_name_or_path=str(folder), use_peft=use_peft, lora_r=4)
    options = LearnerOptions(learning_rate=1e-2, reference="precomputed", total_steps=9)
    torch.manual_seed(0)
    model = load_model(str(folder), keys, torch.float32, lambda text: None)
    return Learner(model, options, Accelerator(cpu=True), lambda text: None), keys


def groups_of_states(count: int = 6) -> list[Any]:
    draw = np.random.default_rng(0)
    rates = [0.1, 0.5, 0.9]
    return [critics.state_group([draw.integers(3, 90, n).tolist() for n in (3, 5, 8)], 2, rates) for _ in range(count)]


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_a_critic_learns_apart_and_is_the_same_when_loaded_again(tmp_path: Path, use_peft: bool) -> None:
    learner, keys = actor(tmp_path / "model", use_peft)
    before = {name: tensor.clone() for name, tensor in learner.weights()}
    groups, losses = groups_of_states(), []
    training = critics.CriticTraining(epochs=8, states_per_step=6, learning_rate=1e-2)
    critic = critics.fit(learner, groups, training, lambda done, total, line: losses.append(line["critic_loss"]))
    assert len(losses) == 8 * 3
    assert losses[0] == pytest.approx(math.log(2))  # a head at zero says one half of everything
    assert losses[-1] < 0.6
    assert all(torch.equal(before[name], now) for name, now in learner.weights())
    trained = critics.success(critic, groups, lambda done, total: None)
    folder = tmp_path / "critic"
    folder.mkdir()
    critics.save(critic, folder)
    loaded = critics.load(folder, keys, learner)
    again = critics.success(loaded, groups, lambda done, total: None)
    np.testing.assert_allclose(again, trained, atol=1e-5 if use_peft else 0)  # an adapter is merged on its way back
    assert np.ptp(again) > 0.1


def test_what_is_no_critic_is_refused(tmp_path: Path) -> None:
    learner, keys = actor(tmp_path / "model", False)
    with pytest.raises(RefusedError, match=r"holds no value_head.safetensors"):
        critics.load(tmp_path / "model", keys, learner)
    critic = critics.fit(learner, groups_of_states(1), critics.CriticTraining(), lambda done, total, line: None)
    other = tmp_path / "other"
    make_tiny_model(hidden_size=64).save_pretrained(other)
    critics.save_value_head(critic, other)
    with pytest.raises(RefusedError, match=r"value_head.safetensors: .*\(1, 32\).*\(1, 64\).*train it again"):
        critics.load(other, keys, learner)


def test_zero_3_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(critics.ranks, "zero_stage", lambda: 3)
    monkeypatch.setattr("llmrl.trainers.online.run.SampledRun.__init__", deadly(lambda *given, **named: None, 1))
    assert run(write_config(tmp_path, engine={"kind": "vllm_server"})) == 2
    assert "launch with ZeRO-2 or DDP" in " ".join(capsys.readouterr().err.split())


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_steps": 10, "rounds": 3}, "set it to 9 or 12"),
        ({"completions_per_state": 1}, "completions_per_state"),
        ({"kept_per_prompt": 40}, "keep fewer, or sample more"),
        ({"num_train_epochs": 2}, "set max_steps"),
        ({"reference": "frozen"}, "reference frozen has no meaning"),
        ({"rollout": {"max_turns": 2}}, "it must be 1"),
        ({"step_function": "mine.py:steps", "step_delimiter": "x"}, "leave step_delimiter out"),
    ],
)
def test_keys_that_make_no_run_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**settings)


def test_the_description_counts_steps_over_all_rounds() -> None:
    described = direct_advantage.describe(config(max_steps=12, rounds=3), 2)
    assert described["optimizer steps"] == "12 of the actor: 3 rounds x 4"
    assert "not decoupled-clip DAPO" in str(described["method"])
    with pytest.raises(RefusedError, match="states_per_step 1 over 2 processes"):
        direct_advantage.describe(config(states_per_step=1), 2)


# -- runs ------------------------------------------------------------------------------------------------------------

REWARD = """
from llmrl.rewards.texts import text_of

def paid(completions, **columns):
    said = [text_of(completion).split() for completion in completions]
    return [WORTH * float(sum(word in ("red", "green", "blue", "one") for word in words) >= 2) for words in said]
"""
WHOLE = ["states.jsonl", "completions.jsonl", "critic", "actions.jsonl"]


def write_config(tmp_path: Path, worth: float = 1.0, **settings: Any) -> Path:
    """Every word is a step of an answer."""
    reward = tmp_path / f"worth_{worth:g}.py".replace("0.", "")
    reward.write_text(REWARD.replace("WORTH", str(worth)))
    own = {
        "rounds": 2, "kept_per_prompt": 2, "completions_per_state": 4, "max_states_per_response": 3,
        "step_delimiter": r"\w+", "critic_states_per_step": 8, "critic_learning_rate": 1e-2, "min_spread": 0.001,
        "states_per_step": 4, "eval_rows": 0, "beta": 0.1, "prompts_per_step": None, "prompts_per_round": 4,
        "rewards": [f"{reward}:paid"],
    }  # fmt: skip
    return write_online_config(tmp_path, **{**own, **settings})


run = partial(run_method, "direct_advantage")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class KilledError(BaseException):
    """As kill -9: nobody catches it."""


def deadly(work: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`work`, after whose `number`th call the process is gone."""
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = work(*arguments, **named)
        calls += 1
        if calls == number:
            raise KilledError
        return result

    return counted


@pytest.mark.slow
def test_a_run_and_its_files_and_the_same_run_killed_after_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "STATES_AT_ONCE", 5)  # completions in a few parts
    file = write_config(tmp_path, save_steps=1)
    assert run(file, "--output_dir", str(tmp_path / "whole")) == 0
    for number in (1, 2):
        folder = tmp_path / "whole" / "rounds" / f"round_{number}"
        assert_consistent(folder)
    logged = metrics(tmp_path / "whole")
    assert [line["round"] for line in logged] == [1, 1, 2, 2]
    assert logged[0]["step/log_ratio"] == pytest.approx(0, abs=1e-5)  # the reference is the round's own start
    assert logged[2]["step/log_ratio"] == pytest.approx(0, abs=1e-5)
    assert logged[1]["step/log_ratio"] != pytest.approx(0, abs=1e-5)
    evaluations = json.loads((tmp_path / "whole" / "evals.json").read_text())
    assert [(e["step"], e["name"]) for e in evaluations] == [(0, "critic"), (2, "critic")]

    kept: dict[Path, int] = {}
    resume = ("--resume_from_checkpoint", "latest")
    attempt = 0
    while len(kept) < 8:  # each attempt does one stage more, or a part of one, and finds those before it
        if len(kept) == 7:  # only the second round's actions are missing
            with monkeypatch.context() as patched:
                patched.setattr(rounds.critics, "success", signalled(rounds.critics.success, 1))
                assert run(file, *resume) == 75
            stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
            assert "round 2, states whose actions are valued" in stopped["reason"]
        with monkeypatch.context() as patched:
            patched.setattr(stage_files.StageFolder, "_note", deadly(stage_files.StageFolder._note, 1))
            with pytest.raises(KilledError):
                run(file, *(resume if attempt else ()))
        for name in WHOLE:
            for done in (tmp_path / "run" / "rounds").glob(f"*/{name}"):
                kept.setdefault(done, done.stat().st_mtime_ns)
        attempt += 1
    assert attempt > 8 + 2  # completions in parts
    with monkeypatch.context() as patched:  # within the second round's updates
        patched.setattr(Learner, "update", deadly(Learner.update, 1))
        with pytest.raises(KilledError):
            run(file, *resume)
    assert run(file, *resume) == 0
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == logged
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "run" / "evals.json").read_text()) == evaluations


def assert_consistent(folder: Path) -> None:
    """Success rates, values and advantages as the files themselves have them."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*WHOLE, "stages.json"])
    states, completions, actions = (lines(folder / name) for name in WHOLE if name != "critic")
    assert len(states) == len(completions) == len(actions)
    for state, line, judged in zip(states, completions, actions, strict=True):
        assert state["state"] == line["state"] == judged["state"]
        assert line["rate"] == np.mean([one["right"] for one in line["completions"]])
        assert len(line["completions"]) == 4
        assert sum(action["count"] for action in judged["actions"]) == 4
        values = [a["value"] for a in judged["actions"] for _ in range(a["count"])]
        base = np.mean(values)
        assert [a["advantage"] for a in judged["actions"]] == pytest.approx(
            [a["value"] - base for a in judged["actions"]]
        )
        firsts = {tuple(a["ids"]) for a in judged["actions"]}
        for one in line["completions"]:
            assert any(tuple(one["ids"][: len(first)]) == first for first in firsts)
        if judged["kept"]:
            assert len(judged["actions"]) > 1
            assert all(len(a["reference_logprobs"]) == len(a["ids"]) for a in judged["actions"])
    assert any(judged["kept"] for judged in actions)
    names = {path.name for path in (folder / "critic").iterdir()}
    assert {"model.safetensors", "value_head.safetensors", "training.jsonl", "reliability.json"} <= names


def test_what_cannot_be_divided_or_judged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text("def mute(completions, **columns):\n    return [None] * len(completions)\n")
    assert run(write_config(tmp_path, rewards=[f"{silent}:mute"], reward_max_failures=99)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no answer of the round has a reward" in said
    assert "the reward function mute gave none a number" in said
    assert run(write_config(tmp_path, step_delimiter="\n")) == 2
    assert "answers has more than one step by step_delimiter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # the same command can be given again
    assert run(write_config(tmp_path, worth=0.5)) == 2
    assert "success_threshold" in capsys.readouterr().err
    assert run(write_config(tmp_path, worth=0.5, success_threshold=0.5, min_spread=2)) == 1
    said = capsys.readouterr().err
    assert "no state of" in said
    assert "lower min_spread" in said


@pytest.mark.slow
def test_a_late_refusal_keeps_the_files_for_the_same_command_but_not_for_a_mended_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RefusedError("step_function gave no steps")

    file = write_config(tmp_path, rounds=1, max_steps=2, save_steps=1)
    folder = tmp_path / "run" / "rounds" / "round_1"
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "candidates_of", refuse)
        assert run(file) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "step_function gave no steps" in said
    assert f"takes up what is done in {folder}: states.jsonl, completions.jsonl, critic" in said
    resume = ("--resume_from_checkpoint", "latest")
    made = completions_of(folder)
    with monkeypatch.context() as patched:  # before the first checkpoint
        patched.setattr(Learner, "update", deadly(Learner.update, 1))
        with pytest.raises(KilledError):
            run(file, *resume)
    assert completions_of(folder) == made
    reward = tmp_path / "worth_1.py"
    reward.write_text(reward.read_text() + "# mended\n")
    with monkeypatch.context() as patched:  # after it
        patched.setattr(rounds.Rounds, "states_of", deadly(rounds.Rounds.states_of, 2))
        with pytest.raises(KilledError):
            run(file, *resume)
    assert "other weights, data, keys or functions" in capsys.readouterr().out
    assert completions_of(folder.with_name("round_1.superseded")) == made
    made = completions_of(folder)
    reward.write_text(reward.read_text() + "# mended again\n")
    assert run(file, *resume) == 0  # what is trained on is made already
    assert completions_of(folder) == made


def completions_of(folder: Path) -> int:
    """When they were made."""
    return (folder / "completions.jsonl").stat().st_mtime_ns


@pytest.mark.slow
def test_a_round_of_another_run_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path, rounds=1, save_steps=1, max_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", deadly(Learner.update, 3))  # one of the critic, two of the actor
        with pytest.raises(KilledError):
            run(file)
    notes = tmp_path / "run" / "rounds" / "round_1" / "stages.json"
    stored = json.loads(notes.read_text())
    notes.write_text(json.dumps({**stored, "identity": {**stored["identity"], "weights": "others"}}))
    assert run(file, "--resume_from_checkpoint", "latest") == 1
    assert "is not there as the checkpoint knows it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "2"], ids=["ddp", "zero2"])
def test_two_processes_make_the_round_of_one(tmp_path: Path, stage: str | None) -> None:
    """They share sampling, critic, values and the actor's updates, under DDP and ZeRO-2."""
    file = write_config(tmp_path, rounds=1, max_steps=2)
    assert run(file, "--output_dir", str(tmp_path / "alone")) == 0
    split = launched("cpu_zero3", "--zero_stage", stage) if stage else {}
    finish("direct_advantage", file, launcher="cpu_ddp", environment=split)
    alone, spread = (tmp_path / name / "rounds" / "round_1" for name in ("alone", "run"))
    assert_consistent(spread)
    for name in ("states.jsonl", "completions.jsonl"):
        assert lines(spread / name) == lines(alone / name)
    values = [
        [a["value"] for line in lines(folder / "actions.jsonl") for a in line["actions"]] for folder in (alone, spread)
    ]
    np.testing.assert_allclose(values[1], values[0], atol=1e-4)
    mine, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "alone"))
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=1e-3)  # Adam's first steps are the rate, 1e-3
    assert metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(metrics(tmp_path / "alone")[-1]["loss"], rel=1e-2)


def test_a_stage_is_made_once_and_holds_any_text(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    own: Any = SimpleNamespace(directory=tmp_path, note=lambda text: None)

    def folder(weights: str) -> stage_files.StageFolder:
        return stage_files.StageFolder(tmp_path / "rounds" / "round_1", {"weights": weights}, True, own, accelerator)

    made = [{"text": "a\u2028b\x85\n'\"é", "value": 0.1 + 0.2}]
    assert folder("a").lines("x.jsonl", lambda: (made, {"n": 1})) == made
    assert folder("a").lines("x.jsonl", lambda: ([], {})) == made
    assert folder("a").tallies() == {"x.jsonl": {"n": 1}}
    assert folder("b").lines("x.jsonl", lambda: ([], {})) == []  # from other weights: made anew
    asked: list[int] = []

    def part(first: int) -> list[dict[str, Any]]:
        asked.append(first)
        if len(asked) == 3:
            raise KilledError
        return [{"first": first}]

    for _ in range(2):
        try:
            found = folder("b").lines("y.jsonl", lambda: (folder("b").parts("y.jsonl", (0, 5, 10), part), {}))
        except KilledError:
            continue
    assert asked == [0, 5, 10, 10]
    assert found == [{"first": 0}, {"first": 5}, {"first": 10}]
    assert sorted(path.name for path in folder("b").path.iterdir()) == ["stages.json", "x.jsonl", "y.jsonl"]


def test_what_is_not_as_it_was_written_is_made_anew_or_ends_the_run(tmp_path: Path) -> None:
    accelerator, said = Accelerator(cpu=True), list[str]()
    own: Any = SimpleNamespace(directory=tmp_path, note=said.append)

    def folder(fresh: bool) -> stage_files.StageFolder:
        return stage_files.StageFolder(tmp_path / "round_1", {"weights": "a"}, fresh, own, accelerator)

    def critic(path: Path) -> dict[str, float]:
        (path / "model").write_text("weights")
        return {}

    folder(True).lines("x.jsonl", lambda: ([{"a": 1}, {"a": 2}], {}))
    model = folder(True).folder("critic", critic) / "model"
    for file, half in ((tmp_path / "round_1" / "x.jsonl", '{"a": 1}\n'), (model, "wei")):
        file.write_text(half)
        assert folder(True).tallies() == {}
        assert f"{file.relative_to(tmp_path / 'round_1').parts[0]} is not as it was written" in said.pop()
        folder(True).lines("x.jsonl", lambda: ([{"a": 1}, {"a": 2}], {}))
        folder(True).folder("critic", critic)
    (tmp_path / "round_1" / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(RunFailedError, match="not as it was written, and what was trained on it"):
        folder(False).lines("x.jsonl", lambda: ([], {}))


def test_the_objective_pushes_a_state_as_its_file_says(tmp_path: Path) -> None:
    """One update on a file's line moves the probability of each action the way of its advantage."""
    learner, _ = actor(tmp_path / "model", False)
    found = [candidate([11, 12]), candidate([13, 14]), candidate([15, 16])]
    values = {(11, 12): 0.9, (13, 14): 0.5, (15, 16): 0.1}
    line = stages.action_line(STATES[1], found, values, 0.1, decode)
    groups = [stages.actor_group(line)]
    for action, known in zip(line["actions"], learner.logprobs(groups)[0], strict=True):
        action["reference_logprobs"] = known.tolist()
    groups = [stages.actor_group(line)]
    objective = DirectAdvantage(beta=0.1).objective()
    first = learner.update(groups, objective)
    assert first["step/log_ratio"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx((0.5 * 4.0**2 + 0.0 + 0.5 * 4.0**2) / 3, rel=1e-4)
    after = learner.logprobs(groups)[0]
    moved = [float(now.sum() - sum(a["reference_logprobs"])) for now, a in zip(after, line["actions"], strict=True)]
    assert moved[0] > 0 > moved[2]
