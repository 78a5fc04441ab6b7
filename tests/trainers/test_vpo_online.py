"""Online VPO: how samples become pairs, and whole runs of a tiny model: optimism, its guard, resumed bit for bit."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from support.online_run import write_online_config
from support.recipe_run import final_weights, metrics, run_method
from support.rollouts import answer
from support.words import FIRST, WORDS

from llmrl.config.parse import parse
from llmrl.rollout.trajectory import RolloutGroup
from llmrl.runs import checkpoints
from llmrl.trainers.vpo import online as vpo_online
from llmrl.trainers.vpo import rounds
from llmrl.trainers.vpo.calibration import FILE, read_answers
from llmrl.trainers.vpo.rounds import labelled


def run(tmp: Path, *arguments: str, code: int = 0, **settings: Any) -> Path:
    """A run; its directory. Several words end an answer, for a random model seldom says the one that does."""
    base = {
        "samples_per_prompt": 2, "prompts_per_step": 8, "updates_per_step": 2, "eval_rows": 0,
        "stop_tokens": WORDS[len(FIRST) :], "max_completion_length": 16,
    }  # fmt: skip
    output = str(tmp / settings.pop("name", "run"))
    config = write_online_config(tmp, **{**base, **settings}, output_dir=output)
    assert run_method("vpo_online", config, *arguments) == code
    return Path(output)


@pytest.mark.parametrize(
    ("scores", "pairing", "expected", "ties"),
    [
        ([0.0, 1.0], "in_order", [(1, 0)], 0),
        ([1.0, 1.0], "in_order", [], 1),
        ([1.0, None], "in_order", [], 0),
        ([1.0, 0.0, 0.5, 0.75], "in_order", [(0, 1), (3, 2)], 0),
        ([0.5, None, 0.5, 0.25, 1.0], "in_order", [(4, 3)], 1),  # the last two stand beside each other, the first tie
        ([0.5, 1.0, 0.0, 0.75], "best_worst", [(1, 2)], 0),
        ([0.5, 0.5, 0.5], "best_worst", [], 1),
        ([0.5], "best_worst", [], 0),
    ],
)
def test_the_better_of_two_samples_is_chosen_and_ties_are_counted(
    scores: list[float | None], pairing: Literal["in_order", "best_worst"], expected: list[tuple[int, int]], ties: int
) -> None:
    rollouts = [answer([10 + i, 3], score) for i, score in enumerate(scores)]
    found = labelled(RolloutGroup(1, {}, rollouts), pairing)
    assert [(rollouts.index(c), rollouts.index(r)) for c, r in found.pairs] == expected
    assert found.ties == ties


def test_equal_answers_are_a_tie_and_a_penalty_counts() -> None:
    said_twice = [answer([5, 3], 1.0), answer([5, 3], 0.0)]
    assert labelled(RolloutGroup(1, {}, said_twice), "in_order") == ([], 1, 0)
    long = [answer([5, 3], 1.0, penalty=-0.5), answer([6, 3], 0.75)]
    assert labelled(RolloutGroup(1, {}, long), "in_order").pairs == [(long[1], long[0])]


@pytest.mark.parametrize("pairing", ["in_order", "best_worst"])
def test_an_answer_that_was_cut_off_is_in_no_pair_and_counted(pairing: Literal["in_order", "best_worst"]) -> None:
    cut, good, bad = answer([5, 4], 1.0, finish="length"), answer([6, 3], 0.5), answer([7, 3], 0.0)
    assert labelled(RolloutGroup(1, {}, [cut, bad, good]), pairing) == ([(good, bad)], 0, 1)
    assert labelled(RolloutGroup(1, {}, [cut, good]), pairing) == ([], 0, 1)


def test_a_run_without_an_answer_that_ends_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, code=1, max_completion_length=1, stop_tokens=None, max_empty_steps=1, max_steps=2)
    assert "no two answers to a prompt ended by themselves within the limits" in capsys.readouterr().err
    assert (checkpoints.latest(folder) or folder).name == "step_1"


def test_pairs_without_calibration_answers_are_left_out_and_the_cause_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "drawn_once", lambda run, learner, rows, draw, decode: dict.fromkeys(rows, ()))
    folder = run(tmp_path, code=1, max_empty_steps=1, max_steps=2)
    assert "no calibration answer to any prompt whose samples made a pair" in capsys.readouterr().err
    (line,) = metrics(folder)
    assert line["pairs"] == 0
    assert line["pairs/without_calibration"] > 0
    assert "no calibration answer to 16 of 16 prompts" in (folder / "notes.log").read_text()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """The pairs of earlier rounds and the guard's reading are in the checkpoint, calibration answers in the run."""
    settings = {
        "pairs": "aggregated", "pairs_per_update": 6, "alpha": 0.3, "alpha_schedule": "inverse_sqrt", "max_steps": 4,
        "save_steps": 2, "calibration_samples": 2, "least_log_ratio": -0.02,
        "updates_per_step": 1,
    }  # fmt: skip
    whole = run(tmp_path, **settings)
    lines, weights = metrics(whole), final_weights(whole)
    alphas = [line["alpha"] for line in lines]
    assert alphas[:3] == pytest.approx([0.3, 0.3 / 2**0.5, 0.0])  # what step 2 read is below the least
    sizes = [line["pairs"] for line in lines]
    assert [line["pairs/pool"] for line in lines] == [sum(sizes[: i + 1]) for i in range(4)]
    assert all(line["pairs"] + line["pairs/ties"] == 8 for line in lines)
    answers = read_answers(whole / FILE)
    assert len(answers) == 32
    assert {len(group) for group in answers.values()} == {2}

    run(tmp_path, "--resume_from_checkpoint", str(whole / "checkpoints" / "step_2"), **settings)
    assert final_weights(whole) == weights
    timing = {"rollout_seconds", "sampled_tokens_per_second", "rewards/paid/seconds"}
    kept = [[{k: v for k, v in line.items() if k not in timing} for line in each] for each in (metrics(whole), lines)]
    assert kept[0] == kept[1]


def test_the_guard_leaves_the_unbounded_term_out_or_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"alpha": 30.0, "learning_rate": 1e-2, "max_steps": 2, "least_log_ratio": -0.5}
    first, second = metrics(run(tmp_path, name="skip", **settings))
    assert first["alpha"] == 30.0  # both updates
    assert first["calibration/log_ratio"] < -0.3  # the mean of 0, before any, and of the second's: optimism pushes
    assert second["alpha"] < 30.0
    assert "optimistic term is left out" in (tmp_path / "skip" / "notes.log").read_text()

    capsys.readouterr()
    stopped = run(tmp_path, name="stop", below_least="stop", code=1, updates_per_step=3, **settings)
    assert "after which the run ends (below_least: stop)" in (stopped / "notes.log").read_text()
    assert "no lower bound" in capsys.readouterr().err
    assert [line["alpha"] for line in metrics(stopped)] == [pytest.approx(20.0)]  # of three updates the last without
    newest = checkpoints.latest(stopped)
    assert newest is not None
    assert newest.name == "step_1"


def test_a_round_of_ties_teaches_nothing_and_calibration_is_judged_by_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "reward.py").write_text(
        f"""
def paid(completions, **columns):
    with open({str(calls)!r}, "a") as file:
        file.write(f"{{len(completions)}}\\n")
    return [1.0] * len(completions)
"""
    )
    folder = run(tmp_path, max_steps=2, calibration="reference")
    for line in metrics(folder):
        assert (line["pairs"], line["pairs/ties"], line["updates"], line["loss"]) == (0, 8, 0, 0)
    assert "step 2: no pair, no update (8 ties, " in capsys.readouterr().out
    assert sum(map(int, calls.read_text().split())) == 2 * 8 * 2  # the rollouts of two steps and no others


def test_both_needs_no_samples_of_the_reference(tmp_path: Path) -> None:
    folder = run(tmp_path, calibration="both", max_steps=1, alpha=0.1)
    assert not (folder / FILE).exists()
    assert "calibration/log_ratio" in metrics(folder)[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples_per_prompt": 1}, ["samples_per_prompt", "2"]),
        ({"calibration": "both", "calibration_samples": 2}, ["calibration_samples", "both"]),
        ({"samples_per_prompt": 3}, ["samples_per_prompt 3", "even number", "best_worst"]),
        ({"least_log_ratio": 1}, ["least_log_ratio"]),
        ({"calibration_floor": 0}, ["calibration_floor"]),
        ({"rewards": None}, ["rewards"]),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: list[str]
) -> None:
    folder = run(tmp_path, code=2, **settings)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(word in message for word in words), message
    assert not folder.exists()


def test_the_arithmetic_says_what_a_round_is(tmp_path: Path) -> None:
    def described(**settings: Any) -> dict[str, Any]:
        config = parse(vpo_online.Config, ["--config", str(write_online_config(tmp_path, **settings))]).config
        return json.loads(json.dumps(vpo_online.describe(config, 1)))

    assert described()["pairs per step"] == "at most 8, less the ties; trained on with newest pairs"
    best = described(pairing="best_worst", alpha=0.2, alpha_schedule="inverse_sqrt")
    assert best["pairs per step"].startswith("at most 4,")
    assert best["calibration"] == "reference, weight alpha x beta = 0.02 / sqrt(step) a nat"
