"""CPL as a run: phases, segments of different starts, DPO as its limit, resuming in either phase, refusals."""

import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.forked import finish, signalled
from support.recipe_run import final_weights, metrics, run_method, write_config
from support.words import FIRST, WORDS

from llmrl.trainers import cpl
from llmrl.trainers.offline.run import OfflineRun

OTHERS = WORDS[6:]


def configured(tmp: Path, **settings: Any) -> Path:
    """As `recipe_run.write_config`, with the name that CPL has for what makes a step."""
    file = write_config(tmp, **settings)
    written = yaml.safe_load(file.read_text())
    written["comparisons_per_step"] = written.pop("pairs_per_step")
    file.write_text(yaml.safe_dump(written))
    return file


run = partial(run_method, "cpl")


def make_segments(file: Path, count: int = 40) -> Path:
    """Two turns of dialogues that have nothing in common, the second also with a history; who says the first words of
    the vocabulary is preferred, one pair in four is a tie."""
    draw = random.Random(0)

    def said(words: list[str]) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 3)))

    def segment(words: list[str], history: int) -> dict[str, Any]:
        opening = [{"role": role, "content": said(WORDS)} for _ in range(history) for role in ("user", "assistant")]
        turns = [("assistant", words), ("user", WORDS), ("assistant", words)]
        return {
            "prompt": [*opening, {"role": "user", "content": said(WORDS)}],
            "completion": [{"role": role, "content": said(own)} for role, own in turns],
        }

    rows = []
    for number in range(count):
        label = 0.5 if number % 4 == 3 else number % 2
        words = (OTHERS, FIRST) if label == 1 else (FIRST, OTHERS)
        rows.append({"first": segment(words[0], 0), "second": segment(words[1], 1), "label": label})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_scored(file: Path, count: int = 30) -> Path:
    """Three samples of a prompt: the more of the vocabulary's first words, the higher the reward."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        samples = [draw.choices(FIRST, k=n) + draw.choices(OTHERS, k=3 - n) for n in draw.sample(range(4), 3)]
        rewards = [sum(word in FIRST for word in words) / 3 for words in samples]
        prompt = " ".join(draw.choices(WORDS, k=3))
        rows.append({"prompt": prompt, "completions": [" " + " ".join(s) for s in samples], "rewards": rewards})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_cpl_kl_with_lambda_1_is_dpo_where_segments_start_alike(tmp_path: Path) -> None:
    dpo_config = write_config(tmp_path, output_dir=str(tmp_path / "dpo"), max_steps=5, warmup_ratio=0.2)
    assert run_method("dpo", dpo_config) == 0
    config = configured(tmp_path, max_steps=5, warmup_ratio=0.2, variant="cpl_kl", lam=1, alpha=0.1, bc_steps=0)
    assert run(config) == 0
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "dpo"), strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "dpo"))
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, atol=1e-6), name
    evals = [json.loads((tmp_path / name / "evals.json").read_text()) for name in ("run", "dpo")]
    for one, other in zip(*evals, strict=True):
        assert one["metrics"]["rewards/accuracies"] == other["metrics"]["rewards/accuracies"]


def test_turns_of_different_dialogues_are_compared_after_cloning_and_every_phase_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPL-KL: the reference is the policy after the cloning, which no later run could make again; it can be stopped
    while it takes it."""
    data = make_segments(tmp_path / "segments.jsonl")
    settings = {"variant": "cpl_kl", "step": "turn", "max_steps": 12, "bc_steps": 4, "warmup_ratio": 0.25}
    config = configured(
        tmp_path, dataset_name=str(data), save_steps=1, save_total_limit=None, eval_rows=8, pairs_per_step=8, **settings
    )  # fmt: skip
    assert run(config) == 0
    lines = metrics(tmp_path / "run")
    assert ["bc_loss" in line for line in lines] == [True] * 4 + [False] * 8
    assert lines[3]["bc_loss"] < lines[0]["bc_loss"]
    assert [line["learning_rate"] for line in lines[:6]] == pytest.approx(
        [1e-2] * 4 + [0, 5e-4]
    )  # anew: 2 of 8 warm up
    assert lines[4]["rewards/margins"] == 0  # what was cloned is the reference
    assert lines[-1]["rewards/margins"] > 0.1
    assert sum(line["cpl/ties"] for line in lines[4:]) > 0
    evals = json.loads((tmp_path / "run" / "evals.json").read_text())
    assert evals[0]["metrics"]["rewards/accuracies"] == 0.5
    assert evals[-1]["metrics"]["rewards/accuracies"] > 0.8
    weights = final_weights(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (10, 5, 2):
        assert run(config, "--resume_from_checkpoint", str(checkpoints / f"step_{step}")) == 0
        assert metrics(tmp_path / "run") == lines
        assert final_weights(tmp_path / "run") == weights
    with monkeypatch.context() as patched:
        patched.setattr(OfflineRun, "scored_rows", signalled(OfflineRun.scored_rows, 1))
        assert run(config, "--resume_from_checkpoint", str(checkpoints / "step_2")) == 75
    stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (stopped["steps"], "scored by the reference" in stopped["reason"]) == (4, True)
    assert run(config, "--resume_from_checkpoint", "latest") == 0
    assert metrics(tmp_path / "run") == lines
    assert final_weights(tmp_path / "run") == weights


@pytest.mark.parametrize("mode", ["dense", "sparse", "across"])
def test_scored_samples_are_learned_from(tmp_path: Path, mode: str) -> None:
    data = make_scored(tmp_path / "scored.jsonl", 60)
    settings = {"comparisons": mode, "bc_steps": 0, "lam": 1, "max_steps": 15, "learning_rate": 3e-3}
    assert run(configured(tmp_path, dataset_name=str(data), **settings)) == 0
    first, last = (entry["metrics"] for entry in json.loads((tmp_path / "run" / "evals.json").read_text()))
    assert last["rewards/accuracies"] > max(0.75, first["rewards/accuracies"] + 0.1)


@pytest.mark.parametrize(("settings", "steps"), [({}, 1), ({"variant": "cpl_kl", "lam": 1}, 10)])
def test_a_saturated_loss_is_said_with_the_alpha_that_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], steps: int
) -> None:
    """At once, or where all scores begin at 0 (CPL-KL), after some steps."""
    assert run(configured(tmp_path, bc_steps=0, max_steps=steps, alpha=20, **settings)) == 0
    said = re.search(r"warning: .* alpha 20 is too large .*; about ([\d.]+) would make it 1", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) == pytest.approx(20 / metrics(tmp_path / "run")[-1]["cpl/logit_abs"], rel=0.05)


def test_nothing_but_ties_trains_and_claims_no_accuracy(tmp_path: Path) -> None:
    data = make_segments(tmp_path / "segments.jsonl", 20)
    rows = [{**json.loads(line), "label": 0.5} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(configured(tmp_path, dataset_name=str(data), max_steps=2, bc_steps=0)) == 0
    assert all(line["cpl/ties"] == 1 and "rewards/accuracies" not in line for line in metrics(tmp_path / "run"))
    assert all(set(e["metrics"]) == {"loss", "n"} for e in json.loads((tmp_path / "run" / "evals.json").read_text()))


def test_choosing_the_method_alone_is_the_published_algorithm(tmp_path: Path) -> None:
    """Two fifths of the steps clone; then CPL's own alpha and lambda, at a rate that starts anew."""
    assert run(configured(tmp_path, max_steps=5)) == 0
    lines = metrics(tmp_path / "run")
    assert ["cpl_loss" in line for line in lines] == [False, False, True, True, True]
    line = lines[-1]
    assert line["rewards/chosen"] == pytest.approx(0.1 * line["logps/chosen"], rel=1e-5)
    assert line["learning_rate"] == pytest.approx(1e-3 / 3)


@pytest.mark.slow
def test_over_two_processes_under_zero3_both_phases_follow_the_curve_of_one(tmp_path: Path) -> None:
    """Weights, gradients and the moments that are forgotten between the phases are split."""
    config = configured(tmp_path, max_steps=5, bc_steps=3, variant="cpl_kl", save_steps=4)
    finish("cpl", config)
    finish("cpl", config, "--output_dir", str(tmp_path / "spread"), launcher="cpu_zero3")
    compare(tmp_path)
    checkpoint = tmp_path / "spread" / "checkpoints" / "step_4"
    finish(
        "cpl", tmp_path / "spread" / "config.yaml", "--resume_from_checkpoint", str(checkpoint), launcher="cpu_zero3"
    )
    compare(tmp_path)


def compare(tmp_path: Path) -> None:
    for one, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "spread"), strict=True):
        for name in ("loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-6), (one["step"], name)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "an unknown variant": (["--variant", "cpl_x"], ["variant", "cpl_bc"]),
    "lambda above 1": (["--lam", "1.5"], ["lam"]),
    "cloning only": (["--bc_steps", "8"], ["bc_steps 8 of 8 steps leave none", "max_steps"]),
    "a side that is not cloned": (["--bc_on", "preferred"], ["bc_on would be ignored", "cpl_bc"]),
    "a rate without cloning": (["--bc_steps", "0", "--bc_learning_rate", "1"], ["bc_learning_rate would be ignored"]),
    "a reference that is not used": (["--reference", "frozen"], ["variant cpl has none", "cpl_kl"]),
    "the wrong reference": (["--variant", "cpl_kl", "--reference", "frozen"], ["before it was cloned", "bc_steps 0"]),
    "a mistyped key": (["--comparisons_per_stp", "4"], ["comparisons_per_step"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_configuration_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, words = REFUSALS[case]
    assert run(configured(tmp_path), *arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_data_problems_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.loads(line) for line in make_segments(tmp_path / "segments.jsonl", 6).read_text().splitlines()]
    one = {"prompt": "red", "completions": [" dog"], "rewards": [1.0]}
    cases: dict[str, tuple[list[dict[str, Any]], list[str], list[str]]] = {
        "label": ([*good[:2], {**good[2], "label": 7}], [], ["row 3, column `label`"]),
        "empty": ([{**good[0], "first": {**good[0]["first"], "completion": []}}], [], ["row 1", "an empty segment"]),
        "alone": ([one], [], ["row 1, column `rewards`"]),
        "preferred": ([{**one, "completions": [" dog", " cat"], "rewards": [1.0, 0.0]}] * 12,
                      ["--variant", "cpl_bc", "--bc_on", "preferred"], ["bc_on preferred", "comparisons sparse"]),
        "few": ([good[0]] * 12, ["--max_steps", "-1", "--bc_steps", "3"], ["bc_steps 3 of 3 steps"]),
    }  # fmt: skip
    for name, (rows, arguments, words) in cases.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run(configured(tmp_path, dataset_name=str(file), eval_rows=0), *arguments) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message
        assert not (tmp_path / "run").exists()


def test_the_dry_run_says_how_the_steps_are_divided() -> None:
    def configuration(**settings: Any) -> cpl.CPLConfig:
        return cpl.CPLConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **settings)

    config = configuration(max_steps=50, variant="cpl_kl", lam=0.9)
    told = cpl.describe(config, 1)
    assert told["phases"] == "20 steps of cloning, then 30 of comparisons"
    assert told["algorithm"] == "cpl_kl, lam 0.9"
    assert config.cloning_rate == pytest.approx(1e-5)
    assert cpl.describe(configuration(), 1)["algorithm"] == "cpl, as published"
    own = configuration(gamma=0.5, step="turn", mean_per_step=True, bc_steps=0)
    assert cpl.describe(own, 1)["algorithm"] == "cpl, gamma 0.5, step turn, mean_per_step true, bc_steps 0"
