"""BRAIn's trainers: two passes are one, two samples of the prior are DPO, a resumed run is the whole one, refusals."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from support.groups import random_pairs
from support.online_run import write_online_config
from support.recipe_run import make_model, metrics, run_method, write_config
from support.scoring import assert_same_step, tiny_learner
from support.words import WORDS
from torch import Tensor

from llmrl.learner.learner import Learner
from llmrl.learner.sequences import Group
from llmrl.objectives.brain import BRAIn
from llmrl.trainers.brain import iterated as brain
from llmrl.trainers.brain import offline as brain_offline
from llmrl.trainers.brain import update as brain_update
from llmrl.trainers.brain.update import SampleSizeWatch, heldout_metrics, improve, measured


def prompts(learner: Learner, with_prior: bool) -> list[Group]:
    """Four prompts of four samples, in odd ones the first with a piece more; log q' is the learner's, shifted."""
    draw = np.random.default_rng(3)
    groups: list[Group] = [(*random_pairs(draw, 1)[0], *random_pairs(draw, 1)[0]) for _ in range(4)]
    groups = [g if n % 2 else (g[0], replace(g[1], continues=True), *g[2:]) for n, g in enumerate(groups)]
    scored, prior = learner.logprobs(groups), learner.logprobs(groups, of_reference=True)
    return [
        tuple(
            replace(
                piece,
                values={"reward": float(draw.normal())},
                token_values={"old_logprobs": now + draw.normal(0, 0.1, len(now)).astype(np.float32)},
                reference_logprobs=before if with_prior else None,
            )
            for piece, now, before in zip(group, now_of, before_of, strict=True)
        )
        for group, now_of, before_of in zip(groups, scored, prior, strict=True)
    ]


def step(tokens_per_microbatch: int, loss: BRAIn, with_prior: bool) -> tuple[dict[str, float], Tensor, list[str]]:
    """(metrics, gradient, the objectives that were updated with) of the second step; in the first the policy moves."""
    learner = tiny_learner(tokens_per_microbatch)
    groups, taken, used = prompts(learner, with_prior), [], []
    improve(learner, loss, groups[:2])
    apply, update = learner.backend.apply, learner.update

    def spy() -> float:
        taken.append(torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None]))
        return apply()

    def noted(groups: list[Group], objective: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        used.append(type(objective.loss.__self__).__name__)
        return update(groups, objective, *arguments, **named)

    learner.backend.apply, learner.update = spy, noted  # type: ignore[method-assign]
    return improve(learner, loss, groups[2:]), taken[0], used


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("loss", [BRAIn(0.5), BRAIn(0.5, baseline=False), BRAIn(0.5, most_prior_gap=0.4)])
def test_two_passes_are_the_step_of_one(loss: BRAIn, with_prior: bool) -> None:
    whole, divided = step(4096, loss, with_prior), step(40, loss, with_prior)
    assert (whole[2], divided[2]) == (["BRAIn"], ["WeightedLikelihood"])
    assert whole[0].keys() == divided[0].keys()
    assert_same_step(divided[:2], whole[:2])


def test_coefficients_and_the_reward_that_the_samples_tell() -> None:
    """The page's T1: alpha - b, and sum b r."""
    sequences = tuple(
        replace(
            random_pairs(np.random.default_rng(0), 1, longest_completion=1)[0][0],
            values={"reward": reward},
            reference_logprobs=np.array([prior], np.float32),
            token_values={"old_logprobs": np.array([drawn], np.float32)},
        )
        for prior, drawn, reward in zip([-10, -12, -11, -9], [-9.5, -12.5, -11, -9.2], [1, 0.5, 2, -1], strict=True)
    )
    policy = [[np.array([p], np.float32) for p in (-9, -13, -10.5, -9.4)]]
    found = measured(BRAIn(), [sequences], policy)
    assert found.coefficients[0] == pytest.approx([-0.21402393, 0.09428294, 0.25628760, -0.13654661], rel=1e-5)
    told = heldout_metrics([sequences], policy, BRAIn(baseline=False))
    b = [0.34910536, 0.12842869, 0.34910536, 0.17336059]
    assert told["expected_reward"] == pytest.approx(b[0] + 0.5 * b[1] + 2 * b[2] - b[3], rel=1e-5)
    assert told["brain/kl"] == pytest.approx(0.27057249, rel=1e-5)
    assert told["brain/ess"] == pytest.approx(2.29513947, rel=1e-5)


def test_a_target_of_one_sample_is_said_once_with_the_remedy() -> None:
    said: list[str] = []
    watch = SampleSizeWatch(said.append, "Raise beta")
    for size in [1.0] * 4 + [3.0] + [1.1] * 12:
        watch({"brain/ess": size})
    assert len(said) == 1
    assert "effective sample size of a prompt is 1.10" in said[0]
    assert "Raise beta" in said[0]
    for left_out in (0.9, 1.0, 1.0):
        watch({"brain/left_out": left_out})
    assert [line for line in said if "leaves out every sample" in line] == said[1:]
    assert len(said) == 2


# -- offline -----------------------------------------------------------------------------------------------------------


def write_offline(tmp: Path, name: str = "offline", samples: int = 4, **settings: Any) -> Path:
    """A configuration beside its model and its samples, of which the first word of the vocabulary are the better."""
    if not (tmp / "model").exists():
        make_model(tmp / "model")
    draw = random.Random(0)
    rows = []
    for _ in range(40):
        said = [" " + " ".join(draw.choices(WORDS, k=4)) for _ in range(samples)]
        share = [sum(word in WORDS[:6] for word in text.split()) / 4 for text in said]
        prompt = " ".join(draw.choices(WORDS, k=3))
        rows.append({"prompt": prompt, "completions": said, "rewards": share, "logprobs": [-10.0] * samples})
    (tmp / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model_name_or_path": str(tmp / "model"), "dataset_name": str(tmp / "samples.jsonl"),
        "output_dir": str(tmp / name), "learning_rate": 1e-3, "max_steps": 6, "prompts_per_step": 4, "eval_rows": 4,
    }  # fmt: skip
    (tmp / f"{name}.yaml").write_text(yaml.safe_dump({**given, **settings}))
    return tmp / f"{name}.yaml"


def test_two_samples_of_the_prior_and_a_low_temperature_are_dpo(tmp_path: Path) -> None:
    draw = random.Random(1)

    def text(words: list[str]) -> str:
        return " " + " ".join(draw.choices(words, k=4))

    pairs = [{"prompt": text(WORDS), "chosen": text(WORDS[:6]), "rejected": text(WORDS[6:])} for _ in range(24)]
    scored = [{"prompt": p["prompt"], "completions": [p["chosen"], p["rejected"]], "rewards": [1, 0]} for p in pairs]
    for name, rows in (("pairs", pairs), ("scored", scored)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = {"max_steps": 8, "eval_rows": 0}
    config = write_config(
        tmp_path, dataset_name=str(tmp_path / "pairs.jsonl"), output_dir=str(tmp_path / "dpo"), beta=1.0, **same
    )
    assert run_method("dpo", config) == 0
    ours = write_offline(tmp_path, beta=1e-3, **same)
    assert run_method("brain_offline", ours, "--dataset_name", str(tmp_path / "scored.jsonl")) == 0
    for found, expected in zip(metrics(tmp_path / "offline"), metrics(tmp_path / "dpo"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert metrics(tmp_path / "offline")[-1]["loss"] < 0.5 < metrics(tmp_path / "offline")[0]["loss"]
    mine, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("offline", "dpo"))
    start = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in theirs.items():
        assert (mine[name] - weight).norm() <= 1e-2 * (start[name] - weight).norm() + 1e-6


def test_offline_the_divergence_falls_and_the_expected_reward_rises(tmp_path: Path) -> None:
    assert run_method("brain_offline", write_offline(tmp_path, beta=0.2, max_steps=12)) == 0
    before, after = (entry["metrics"] for entry in json.loads((tmp_path / "offline" / "evals.json").read_text()))
    assert before["brain/prior_log_ratio"] == 0
    assert after["loss"] < before["loss"]
    assert after["expected_reward"] > before["expected_reward"] + 0.01
    line = metrics(tmp_path / "offline")[-1]
    assert 1 <= line["brain/ess_min"] <= line["brain/ess"] <= 4
    assert {"brain/kl", "brain/left_out", "brain/prior_log_ratio", "reward"} <= line.keys()


def test_offline_with_the_files_own_proposal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prior gives these samples other probabilities than the file's: the weights see it, and it is said."""
    assert run_method("brain_offline", write_offline(tmp_path, max_steps=1, proposal="behaviour")) == 0
    assert "they are another model's" not in capsys.readouterr().out
    assert run_method("brain_offline", write_offline(tmp_path, "prior", max_steps=1)) == 0
    assert "they are another model's, or of another temperature" in capsys.readouterr().out
    first, other = metrics(tmp_path / "offline")[0], metrics(tmp_path / "prior")[0]
    assert first["brain/ess"] != pytest.approx(other["brain/ess"], rel=1e-3)


def test_offline_in_small_micro_batches_ends_with_the_same_weights(tmp_path: Path) -> None:
    assert run_method("brain_offline", write_offline(tmp_path, max_steps=3)) == 0
    assert run_method("brain_offline", write_offline(tmp_path, "small", max_steps=3, tokens_per_microbatch=24)) == 0
    for line, other in zip(metrics(tmp_path / "offline"), metrics(tmp_path / "small"), strict=True):
        assert line.keys() == other.keys()
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "settings", "words"),
    [
        (
            {"completions": [" red"], "rewards": [1], "logprobs": [-1.0]},
            {},
            ["row 41", "`rewards`: 1 of 1 completions have a reward"],
        ),
        ({"rewards": [1, math.nan]}, {}, ["row 41, column `rewards`: completion 2 has nan"]),
        ({"logprobs": None}, {"proposal": "behaviour"}, ["row 41, column `logprobs`: null", "set proposal: prior"]),
        (
            {"ended": [True, False]},
            {},
            ["row 41", "1 of 2 completions have a reward and ended", "1 were cut off; or", "truncated_samples: keep"],
        ),
        (
            {"completion_ids": [[5], [6]]},
            {},
            ["row 41", "0 of 2 completions", "2 were cut off, as completion_ids without a stop token at their end say"],
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: Any, settings: Any, words: list[str]
) -> None:
    config = write_offline(tmp_path, samples=2, **settings)
    row = {"prompt": "red", "completions": [" one", " two"], "rewards": [1, 0], "logprobs": [-1.0, -1.0], **changed}
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert run_method("brain_offline", config) == 2
    message = capsys.readouterr().err
    assert [word for word in ["samples.jsonl", *words] if word not in message] == []
    assert not (tmp_path / "offline").exists()


def test_samples_without_their_log_probabilities_are_refused_with_both_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_offline(tmp_path, proposal="behaviour")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for renamed, hint in (("drawn_with", "no column `logprobs`, but"), ("log_probs", "did you mean `log_probs`?")):
        changed = [{renamed if name == "logprobs" else name: row[name] for name in row} for row in rows]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        assert run_method("brain_offline", config) == 2
        message = capsys.readouterr().err
        assert [word for word in (hint, "`llmrl sample`", "set proposal: prior") if word not in message] == []


def test_samples_that_are_equally_good_are_counted_and_refused_where_there_are_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_offline(tmp_path, eval_rows=0)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    def write(num_equal: int) -> None:
        alike = [{**row, "rewards": [float(i % 2)] * 4} for i, row in enumerate(rows[:num_equal])]
        apart = [{**row, "rewards": [1, 0, 0, 0]} for row in rows[num_equal:]]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alike + apart))

    write(num_equal=3)
    said = brain_offline.check(brain_offline.Config.model_validate(yaml.safe_load(config.read_text())))
    assert any("3 of 40 prompts to train on have samples that are all equally good" in line for line in said)
    write(num_equal=40)
    assert run_method("brain_offline", config) == 2
    assert "column `rewards`: of all 40 prompts to train on the samples are equally good" in capsys.readouterr().err
    assert not (tmp_path / "offline").exists()


# -- iterated ----------------------------------------------------------------------------------------------------------


def write_iterated(tmp: Path, **settings: Any) -> Path:
    given = {"max_steps": 4, "prompts_per_update": 2, "truncated_samples": "keep", "eval_rows": 4, **settings}
    return write_online_config(tmp, **given)


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    config = write_iterated(tmp_path, save_steps=2, use_peft=True)
    assert run_method("brain", config) == 0
    whole = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    weights = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    step_2 = str(tmp_path / "run" / "checkpoints" / "step_2")
    assert run_method("brain", config, "--resume_from_checkpoint", step_2) == 0
    again = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for line, other in zip(map(json.loads, whole), metrics(tmp_path / "run"), strict=True):
        assert untimed(line) == untimed(other)
        assert (line["updates"], line["rollout/masked"]) == (4.0, 0.0)
        assert {"brain/ess", "brain/ess_min", "brain/kl", "brain/left_out", "brain/prior_log_ratio"} <= line.keys()


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if "second" not in name}


def test_the_first_update_of_a_first_step_is_on_the_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q = q' = p there, so every sample weighs 1/n and log q - log p is 0; by the step's end the policy has moved."""
    seen: list[dict[str, float]] = []
    original = brain_update.improve

    def noted(*arguments: Any, **named: Any) -> dict[str, float]:
        seen.append(original(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(brain_update, "improve", noted)
    assert run_method("brain", write_iterated(tmp_path, max_steps=1)) == 0
    assert len(seen) == 4
    assert seen[0]["brain/prior_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert abs(seen[-1]["brain/prior_log_ratio"]) > 1e-4


def test_steps_of_which_every_sample_is_left_out_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step's policy is the prior; after a long step none of its samples is within the gap."""
    settings = {"most_prior_gap": 1e-4, "max_empty_steps": 2, "learning_rate": 0.05, "eval_rows": 0}
    assert run_method("brain", write_iterated(tmp_path, **settings)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing could be learned in 2 steps in a row: most_prior_gap (0.0001) leaves out every sample" in said
    assert [line["brain/left_out"] for line in metrics(tmp_path / "run")] == [0, 1, 1]


def test_a_reward_model_without_a_scalar_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model")
    assert run_method("brain", write_iterated(tmp_path, rewards=[str(tmp_path / "model")])) == 2
    assert "is no reward model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.7}, "temperature 0.7: samples are weighed by the policy's own probabilities"),
        ({"samples_per_prompt": 1}, "samples_per_prompt 1: the samples of a prompt are weighed against one another"),
        ({"rollout": {"min_per_group": 1}}, "rollout.min_per_group 1"),
        ({"prompts_per_update": 99}, "prompts_per_update 99 is more than a step has"),
        ({"max_staleness": 1, "engine": {"kind": "vllm"}}, "Use proposal behaviour, or max_staleness 0"),
        ({"beta": 0}, "greater than 0"),
    ],
)
def test_keys_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    base = {"model_name_or_path": "starter", "dataset_name": "x", "output_dir": "y", "rewards": ["correct_number"]}
    with pytest.raises(ValidationError, match=words):
        brain.BRAInConfig(**{**base, **settings})


def test_a_gap_without_a_proposal_is_refused() -> None:
    with pytest.raises(ValidationError, match="most_prior_gap would be ignored"):
        brain_offline.BRAInOfflineConfig(
            model_name_or_path="starter", dataset_name="x", output_dir="y", most_prior_gap=3.0
        )


def test_the_dry_run_says_what_a_step_is() -> None:
    config = brain.BRAInConfig(
        model_name_or_path="starter", dataset_name="x", output_dir="y", rewards=["correct_number"], beta=0.25,
        prompts_per_step=20, prompts_per_update=8, most_prior_gap=9.0,
    )  # fmt: skip
    told = brain.describe(config, 1)
    assert told["optimizer steps per step"] == "2 epochs x 3 of 8 prompts"
    assert told["target"] == "prior x exp(reward / 0.25); samples over 9 nats from it are left out"
