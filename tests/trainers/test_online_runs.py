"""Whole runs of the online methods on a small scale: what they compute, log and leave behind."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.online_run import METHODS, evals, write_online_config
from support.recipe_run import final_weights, metrics, run_method

from llmrl.runs.report import write_report


@pytest.mark.parametrize(
    "algorithm",
    ["loop", "loop_code", "loop_turn", "loop_trajectory", "rloo", "reinforce", "grpo", "dr_grpo", "gspo", "cispo",
     "dapo_clip", "reinforce_plus_plus", "reinforce_plus_plus_baseline"],
)  # fmt: skip
def test_every_algorithm_of_the_family_runs_as_published(tmp_path: Path, algorithm: str) -> None:
    config = write_online_config(tmp_path, algorithm=algorithm, max_steps=2)
    assert run_method("loop", config) == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all(line["updates"] >= 1 for line in lines)
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_2.jsonl").open()]
    assert len(rollouts) == 16
    assert {rollout["policy_versions"][0] for rollout in rollouts} == {1}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves_behind(tmp_path: Path, method: str) -> None:
    samples = {"pf_ppo": 5}.get(method, 4)
    own = {"critic_warmup": 1} if method == "rlsp" else {}
    config = write_online_config(tmp_path, samples_per_prompt=samples, use_peft=True, eval_steps=2, **own)
    assert run_method(method, config) == 0
    run = tmp_path / "run"
    line = metrics(run)[-1]
    wanted = {"loss", "grad_norm", "num_tokens", "learning_rate", "reward", "reward_std", "frac_reward_zero_std",
              "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean"}  # fmt: skip
    assert wanted <= line.keys()
    if method != "loop":
        assert {"value_loss", "kl"} <= line.keys()
    assert [entry["step"] for entry in evals(run)] == [0, 2, 4]
    assert all(entry["name"] == "heldout" for entry in evals(run))
    assert (run / "final" / "adapter_config.json").exists()
    record = json.loads((run / "rollouts" / "step_1.jsonl").read_text().splitlines()[0])
    assert {"row", "sample", "reward", "scores", "end_state", "prompt", "messages", "policy_versions"} <= record.keys()
    (completion,) = record["completions"]
    assert record["messages"][0]["content"] in completion
    assert record["answer"] == "1"
    heldout = json.loads((run / "samples.json").read_text())
    assert len(heldout) == evals(run)[0]["metrics"]["n"]
    for sample in heldout:
        assert [(one["label"], one["reward"] is None) for one in sample["completions"]] == [
            ("before", False), ("after", False),
        ]  # fmt: skip
    for name, entry in (("before", evals(run)[0]), ("after", evals(run)[-1])):
        rewards = [one["reward"] for sample in heldout for one in sample["completions"] if one["label"] == name]
        assert sum(rewards) / len(rewards) == pytest.approx(entry["metrics"]["reward"])
    assert "before, reward" in write_report(run).read_text()


def test_the_sampler_is_never_stale(tmp_path: Path) -> None:
    """The learner's log-probabilities of what was sampled are the sampler's, step after step."""
    config = write_online_config(tmp_path, max_steps=5, learning_rate=3e-3, epochs_per_step=2, rollouts_per_update=4)
    assert run_method("loop", config) == 0
    for line in metrics(tmp_path / "run"):
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["approx_kl"] > 0  # and yet the policy moved within the step


def test_with_a_constant_rate_a_run_may_be_resumed_for_more_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, resume = write_online_config(tmp_path), ("--resume_from_checkpoint", "latest")
    assert run_method("loop", config, "--output_dir", str(tmp_path / "whole")) == 0
    assert run_method("loop", config, "--max_steps", "2") == 0
    assert run_method("loop", config, "--max_steps", "1", *resume) == 2
    assert "max_steps: 2 -> 1" in capsys.readouterr().err
    assert run_method("loop", config, "--lr_scheduler_type", "linear", *resume) == 2
    assert "max_steps: 2 -> 4" in capsys.readouterr().err
    assert run_method("loop", config, *resume) == 0
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "settings", "free"),
    [
        ("loop", {}, True), ("loop", {"lr_scheduler_type": "cosine"}, False),
        ("loop", {"max_staleness": 1, "engine": {"kind": "vllm"}}, False),
        ("rlsp", {"rewards": None, "verifier": "exact_match", "samples_per_prompt": 1}, True),
        ("rlsp", {"rewards": None, "verifier": "exact_match", "samples_per_prompt": 1, "alpha_end": 0.5}, False),
    ],
)  # fmt: skip
def test_where_a_step_knows_how_many_there_are_their_number_stays(
    tmp_path: Path, method: str, settings: dict[str, Any], free: bool
) -> None:
    config = METHODS[method].Config(**yaml.safe_load(write_online_config(tmp_path, **settings).read_text()))
    assert config.length_is_free == free
