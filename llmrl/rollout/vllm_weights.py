"""The policy's weights on their way into vLLM: names and shapes checked, tied heads sent, adapters merged or apart.

vLLM takes what it is given: a head that is missing although tied keeps its old values, a wrong shape leaves layers
without storage, and both are reported as success. So everything is checked here, before it gets there.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from llmrl.errors import RefusedError, RunFailedError

Weights = Iterable[tuple[str, Tensor]]
WRAPPER = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM knows for the largest rank."""


@dataclass(frozen=True)
class ExpectedWeights:
    """Every parameter's name and shape, and for each name the others under which the same (tied) tensor is known."""

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: str) -> "ExpectedWeights":
        """Those of the model in a folder, from its configuration alone."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        names: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            names.setdefault(id(parameter), []).append(name)
        aliases = {name: tuple(n for n in names[id(p)] if n != name) for name, p in parameters.items()}
        return cls({name: tuple(p.shape) for name, p in parameters.items()}, aliases)

    def checked(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The same stream, each tensor looked at before it is passed on and a tied one passed on under all its names.

        Raises RunFailedError for a name that the model does not have, a wrong shape, a name that comes twice, tied
        tensors that differ, and at the end for what did not come.
        """
        sent: dict[str, Tensor | None] = {}
        for name, tensor in weights:
            self._check(name, tensor)
            if name not in sent:
                for each in (name, *self.aliases[name]):
                    sent[each] = tensor if self.aliases[name] else None
                    yield each, tensor
                continue
            known = sent[name]
            if known is None:
                raise RunFailedError(f"the weight {name} came twice")
            if known.data_ptr() != tensor.data_ptr() and not torch.equal(known, tensor):
                raise RunFailedError(
                    f"the weight {name} differs from {self.aliases[name][0]}, but the model's configuration says that "
                    "they are one (tie_word_embeddings)"
                )
        if missing := sorted(self.shapes.keys() - sent.keys()):
            raise RunFailedError(f"{len(missing)} of {len(self.shapes)} weights did not come, {missing[0]} among them")

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self.shapes:
            remedy = " Remedy: merged_weights(model, weights)" if name.startswith(WRAPPER) else ""
            raise RunFailedError(f"the engine's model has no weight {name}.{remedy}")
        if tuple(tensor.shape) != self.shapes[name]:
            raise RunFailedError(
                f"the weight {name} has the shape {tuple(tensor.shape)}, the engine's model has {self.shapes[name]}"
            )


def merged_weights(causal_lm: Any, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The weights of `causal_lm` by the names of the model without its adapter, W + scaling * B A where it has one.

    `weights` is the stream of its parameters (`learner.weights()`); of a model without adapter it passes unchanged.
    One layer's product is held at a time.
    """
    if not isinstance(causal_lm, PeftModel):
        yield from weights
        return
    layers = {name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)}
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        owner, _, rest = name.partition(".base_layer." if ".base_layer." in name else ".lora_")
        if owner not in layers:
            if plain := _plain_name(name):
                yield plain, tensor
        elif ".base_layer." in name and rest != "weight":
            yield f"{owner.removeprefix(WRAPPER)}.{rest}", tensor
        else:
            parts = held.setdefault(owner, {})
            parts["W" if ".base_layer." in name else rest[0]] = _lora_part(name, tensor)
            if parts.keys() == {"W", "A", "B"}:
                yield f"{owner.removeprefix(WRAPPER)}.weight", _merged(layers[owner], held.pop(owner))
    if held:
        owner, parts = next(iter(held.items()))
        missing = "base weight (tied to another?)" if "W" not in parts else "adapter"
        raise RunFailedError(f"{owner}: its {missing} did not come, so it cannot be merged")


def _plain_name(name: str) -> str | None:
    """The name without the wrapper's; None for the frozen original of a module that is trained whole."""
    if ".original_module." in name:
        return None
    plain = name.removeprefix(WRAPPER)
    before, whole, after = plain.partition(".modules_to_save.")
    return f"{before}.{after.partition('.')[2]}" if whole else plain


def _lora_part(name: str, tensor: Tensor) -> Tensor:
    if not name.endswith(".weight") or ".lora_magnitude_vector" in name or ".lora_embedding" in name:
        raise RefusedError(f"{name}: only plain LoRA (no DoRA, no adapted embeddings) can be sent to vLLM")
    return tensor


def _merged(layer: LoraLayer, parts: dict[str, Tensor]) -> Tensor:
    (adapter,) = layer.active_adapters
    delta = parts["B"].float() @ parts["A"].float() * layer.scaling[adapter]
    delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    return (parts["W"].float() + delta).to(parts["W"].dtype)


# -- adapters apart ------------------------------------------------------------------------------------------------


def largest_rank(adapter: PeftConfig) -> int:
    """vLLM's `max_lora_rank` for this adapter. Raises RefusedError for what vLLM cannot apply."""
    settings = adapter.to_dict()
    for key in ("use_dora", "modules_to_save"):
        if settings.get(key):
            raise RefusedError(f"vLLM cannot apply an adapter with {key}. Remedy: sync merged weights")
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    if rank > LORA_RANKS[-1]:
        raise RefusedError(f"vLLM applies adapters of rank up to {LORA_RANKS[-1]}, not {rank}")
    return min(known for known in LORA_RANKS if known >= rank)


def write_adapter(weights: Weights, adapter: PeftConfig, folder: Path) -> None:
    """The adapter's part of the stream as PEFT saves it; the rest of the stream is walked and left out."""
    found = {
        name.replace(".default.", "."): tensor.detach().cpu().contiguous().clone()
        for name, tensor in weights
        if ".lora_" in name
    }
    owners = {name.partition(".lora_")[0] for name in found}
    for owner in sorted(owners):
        if not {f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"} <= found.keys():
            raise RunFailedError(f"{owner}: half of its adapter did not come")
    if not found:
        raise RunFailedError("no adapter weights (lora_A, lora_B) came")
    folder.mkdir(parents=True)
    save_file(found, folder / "adapter_model.safetensors")
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


# -- weights in a folder -------------------------------------------------------------------------------------------


def write_weights(weights: Weights, folder: Path, shard_bytes: int = 2**30) -> None:
    """The stream as safetensors files of about `shard_bytes`, so that it is never held whole; `folder` appears last."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    try:
        _write_shards(weights, partial, shard_bytes)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk, the checkpoint that comes next needs the room
        raise
    partial.rename(folder)


def _write_shards(weights: Weights, folder: Path, shard_bytes: int) -> None:
    shard: dict[str, Tensor] = {}
    held = number = 0
    for name, tensor in weights:
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        held += tensor.nbytes
        if held >= shard_bytes:
            number += 1
            save_file(shard, folder / f"model-{number:05}.safetensors")
            shard, held = {}, 0
    if shard:
        save_file(shard, folder / f"model-{number + 1:05}.safetensors")
