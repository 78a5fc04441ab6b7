"""The engine of a run: when it sleeps, how long a rollout it takes, and what is refused."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from support.models import make_tiny_model
from support.online_run import evals, write_online_config
from support.recipe_run import final_weights, run_method

from llmrl.config.parse import parse
from llmrl.errors import RefusedError, RunFailedError
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.rollout import vllm_weights
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.trainers import loop
from llmrl.trainers.online.engines import length_within, synchronise
from llmrl.trainers.online.experience import Experience


def noting(monkeypatch: pytest.MonkeyPatch, order: list[str], place: type, *names: str) -> None:
    """From now on these methods write their names into `order` when they begin."""

    def noted(name: str, method: Any) -> Any:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            order.append(name)
            return method(*arguments, **named)

        return wrapper

    for name in names:
        monkeypatch.setattr(place, name, noted(name, getattr(place, name)))


def test_the_engine_sleeps_while_the_policy_is_trained_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_method("loop", write_online_config(tmp_path, max_steps=2, output_dir=str(tmp_path / "awake"))) == 0
    order: list[str] = []
    noting(monkeypatch, order, HuggingFaceEngine, "sync", "wake", "sleep")
    noting(monkeypatch, order, Experience, "train")
    assert run_method("loop", write_online_config(tmp_path, max_steps=2, engine={"sleep": True})) == 0
    heldout, first, second = ["sync", "sleep"], ["wake", "sleep", "train"], ["sync", "sleep", "train"]
    assert order == [*heldout, *first, *second, *heldout]
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "awake")
    assert json.dumps(evals(tmp_path / "run")) == json.dumps(evals(tmp_path / "awake"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": {"kind": "vllm_server", "sleep": True}, "max_staleness": 1}, "engine.sleep with max_staleness 1"),
        pytest.param(
            {"engine": {"kind": "vllm", "sleep": True}},
            "engine.sleep: vLLM gives memory back on a GPU only",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_an_engine_that_cannot_sleep_is_refused_by_check_and_by_the_run_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: str
) -> None:
    config = write_online_config(tmp_path, **settings)
    with pytest.raises(RefusedError, match=words):
        loop.check(parse(loop.Config, ["--config", str(config)]).config)
    assert run_method("loop", config) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("own", [True, False])
def test_of_the_folder_for_weights_only_what_a_killed_run_has_left_is_removed(tmp_path: Path, own: bool) -> None:
    weights = tmp_path / "run" / "weights"
    (weights / "llmrl-weights-abc").mkdir(parents=True)
    (weights / "llmrl-weights-abc" / "model-00001.safetensors").write_text("what a killed run has left")
    if own:
        (weights / "my_model.safetensors").write_text("mine")
    server = {"kind": "vllm_server", "urls": ["http://127.0.0.1:9"], "patience_seconds": 0.1}
    assert run_method("loop", write_online_config(tmp_path, engine=server)) == 1  # there is no such server
    assert [file.name for file in weights.glob("*")] == (["my_model.safetensors"] if own else [])
    assert weights.exists() == own


@pytest.mark.parametrize(
    ("limit", "max_length", "model", "expected"),
    [
        (None, None, 256, 256),  # the Hugging Face engine has none of its own
        (256, None, 256, 256),
        (300, 200, 200, 200),
        (100, None, 256, 100),
        (100, None, None, 100),
        (100, 200, 200, "max_length 200 is too much for the engine, which takes sequences of 100 tokens"),
        (8, None, 256, "max_completion_length 8 is too much for the engine"),
    ],
)
def test_rollouts_are_no_longer_than_the_engine_takes(
    tmp_path: Path, limit: int | None, max_length: int | None, model: int | None, expected: int | str
) -> None:
    config = parse(loop.Config, ["--config", str(write_online_config(tmp_path, max_length=max_length))]).config
    engine: Any = SimpleNamespace() if limit is None else SimpleNamespace(max_model_len=limit)
    said: list[str] = []
    if isinstance(expected, str):
        with pytest.raises(RefusedError, match=expected):
            length_within(engine, config, model, said.append)
    else:
        assert length_within(engine, config, model, said.append) == expected
        assert bool(said) == (expected != model)
    assert length_within(None, config, model, said.append) == model  # a rank that asks no server


@pytest.mark.parametrize("failure", [None, RunFailedError("the server is gone")], ids=["sound", "failed"])
@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_every_rank_walks_all_weights_and_only_one_with_an_engine_merges_an_adapter(
    use_peft: bool, failure: RunFailedError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 each step of the walk gathers from all ranks: one that left early would leave the others waiting."""
    policy = make_tiny_model()
    if use_peft:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    learner = Learner(policy, LearnerOptions(), Accelerator(cpu=True), say=lambda text: None)
    walked: list[str] = []
    taken: list[str] = []
    merged: list[Any] = []
    merge = vllm_weights._merged
    monkeypatch.setattr(vllm_weights, "_merged", lambda layer, parts: merged.append(layer) or merge(layer, parts))

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in policy.named_parameters():
            walked.append(name)
            yield name, tensor

    def sync(found: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        for name, _ in found:
            taken.append(name)
            if failure is not None:
                raise failure

    learner.weights = weights  # type: ignore[method-assign, assignment]
    synchronise(None, learner, None, 1)
    assert walked == [name for name, _ in policy.named_parameters()]
    assert not merged
    walked.clear()
    with nullcontext() if failure is None else pytest.raises(RunFailedError, match="the server is gone"):
        synchronise(SimpleNamespace(sync=sync), learner, None, 1)  # type: ignore[arg-type]
    assert walked == [name for name, _ in policy.named_parameters()]
    assert taken == list(make_tiny_model().state_dict())[: None if failure is None else 1]
    assert bool(merged) == (use_peft and failure is None)
