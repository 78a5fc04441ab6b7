"""The same gradient however a batch is packed, padded, split into micro-batches, or spread over processes.

Two real processes over gloo, DDP and DeepSpeed ZeRO, set up as `accelerate launch` does by the project's launch files.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import distributed
from support.forked import ended, fork, launched, two_ranks
from support.models import make_tiny_model
from transformers import AutoModelForCausalLM

LAUNCHERS = {
    "ddp": ("cpu_ddp",),
    "zero1": ("cpu_zero3", "--zero_stage", "1"),
    "zero2": ("cpu_zero3", "--zero_stage", "2"),
    "zero3": ("cpu_zero3",),
}


def run(launcher: tuple[str, ...] | None, **settings: Any) -> dict[str, Any]:
    """Run here (None) or in two processes, as `accelerate launch` sets them up, and read back what rank 0 saved."""
    out = Path(settings["out"])
    if launcher is None:
        distributed.run(settings)
    else:
        ranks = [own | launched(*launcher) for own in two_ranks()]
        log = out.with_name(f"{out.name}.log")
        processes = [fork(distributed.run, (settings,), log, environment) for environment in ranks]
        assert [ended(process, 300) for process in processes] == [0, 0], log.read_text()[-3000:]
    result = out / "result.pt"
    tensors = torch.load(result, weights_only=False) if result.exists() else {}
    return {**json.loads((out / "facts.json").read_text()), **tensors}


def largest_difference(mine: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    """Relative to the largest entry of each gradient."""
    assert mine.keys() == true.keys()
    return max(float((mine[n] - true[n]).abs().max() / true[n].abs().max().clamp_min(1e-12)) for n in true)


def save_model(folder: Path, **settings: Any) -> Path:
    make_tiny_model(**settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_packing_padding_and_microbatches(tmp_path: Path, use_peft: bool) -> None:
    model = save_model(tmp_path / "model")
    whole = run(None, model=model, out=tmp_path / "whole", use_peft=use_peft, tokens_per_microbatch=10_000)
    for name, settings in {
        "split": {"tokens_per_microbatch": 60},
        "one_by_one": {"tokens_per_microbatch": 1},
        "padded": {"form": "padded", "tokens_per_microbatch": 150},
    }.items():
        other = run(None, model=model, out=tmp_path / name, use_peft=use_peft, **settings)
        assert largest_difference(other["gradients"], whole["gradients"]) < 1e-5, name
        assert other["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-5)
        assert other["metrics"]["grad_norm"] == pytest.approx(whole["metrics"]["grad_norm"], rel=1e-5)
        assert other["exact_resume"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("ddp", {}),
        ("ddp", {"use_peft": True, "checkpointing": True}),
        ("zero1", {}),
        ("zero2", {}),
        ("zero3", {}),
        # Three pairs one by one: the second process has a micro-batch less, and must still meet every gathering.
        ("zero3", {"use_peft": True, "checkpointing": True, "tokens_per_microbatch": 1, "pairs": 3}),
        ("zero3", {"tied": True, "form": "padded"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "full",
)
def test_two_processes_equal_one(tmp_path: Path, launcher: str, settings: dict[str, Any]) -> None:
    tied = settings.pop("tied", False)
    model = save_model(tmp_path / "model", tie_word_embeddings=tied)
    alone = run(None, model=model, out=tmp_path / "alone", **settings)
    spread = run(LAUNCHERS[launcher], model=model, out=tmp_path / "spread", **settings)
    assert spread["split"] == (launcher == "zero3")
    assert spread["kind"] == ("DistributedDataParallel" if launcher == "ddp" else "DeepSpeedEngine")
    assert largest_difference(spread["gradients"], alone["gradients"]) < 1e-5
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "num_tokens"):
        assert spread["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-5, abs=1e-7), name
    assert spread["exact_resume"]
    for skips in (alone["skips"], spread["skips"]):
        assert (skips["skipped"], skips["kept"]) == ([1, 1, 0, 1, 1], True)
        assert "not finite, 3 updates in a row" in skips["said"]
    assert spread["weights"].keys() == alone["weights"].keys()
    for name, weight in spread["weights"].items():
        assert weight.shape == alone["weights"][name].shape
    exported = AutoModelForCausalLM.from_pretrained(
        model if settings.get("use_peft") else tmp_path / "spread" / "final"
    )
    if settings.get("use_peft"):
        from peft import PeftModel

        exported = PeftModel.from_pretrained(exported, tmp_path / "spread" / "final")
    for name, weight in exported.named_parameters():
        whole = next(w for n, w in spread["weights"].items() if n == name)
        assert torch.equal(weight, whole), name


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_objectives_of_groups_take_the_same_steps_under_zero3(tmp_path: Path, use_peft: bool) -> None:
    """VPO, CPL-KL, BRAIn and Direct Advantage; with LoRA the reference is the split model without its adapter."""
    model = save_model(tmp_path / "model")
    settings = {"model": model, "methods": True, "use_peft": use_peft}
    alone = run(None, out=tmp_path / "alone", tokens_per_microbatch=10_000, form="padded", **settings)
    spread = run(LAUNCHERS["zero3"], out=tmp_path / "spread", **settings)
    assert set(alone["losses"]) == {"vpo", "cpl_kl", "brain", "direct_advantage"}
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    # Each update begins where the one before ended, so that rounding adds up.
    assert largest_difference(spread["gradients"], alone["gradients"]) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_an_update_of_the_critic_alone_moves_the_critic_alone(tmp_path: Path, launcher: str) -> None:
    """Weight decay is on, and ZeRO puts flat tensors in the place of the optimizer's parameters."""
    moved = run(LAUNCHERS[launcher], model=save_model(tmp_path / "model"), out=tmp_path / "moved", critic="alone")
    head = {name for name in moved if name.startswith("value_head")}
    assert head
    assert all(moved[name] > 0.01 for name in head)
    assert all(moved[name] == 0 for name in moved.keys() - head)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_the_critics_gradient_is_clipped_apart_from_the_policys(tmp_path: Path, launcher: str) -> None:
    model = save_model(tmp_path / "model")
    own = {"critic": "beside", "options": {"value_gradient": False, "max_grad_norm": 0.05}}
    alone = run(None, model=model, out=tmp_path / "alone", **own)
    spread = run(LAUNCHERS[launcher], model=model, out=tmp_path / "spread", **own)
    assert [math.isnan(norm) for norm in alone["norms"]] == [False, False, True, False]
    assert spread["norms"] == pytest.approx(alone["norms"], rel=1e-4, nan_ok=True)
    for name, weight in alone["weights"].items():
        assert torch.allclose(spread["weights"][name], weight, rtol=1e-4, atol=1e-5), name
