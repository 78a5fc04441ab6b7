"""The configured generation engine, and the learner's weights on their way into it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmrl import models
from llmrl.config.online import EngineKeys
from llmrl.errors import RefusedError
from llmrl.learner.learner import Learner
from llmrl.learner.loading import base_of
from llmrl.learner.sharding import zero_stage
from llmrl.learner.together import all_do
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import Engine
from llmrl.runs import ranks
from llmrl.trainers.online.config import SamplingConfig

WEIGHTS = "weights"
"""Folder in a run's directory through which vLLM servers get weights."""
NOT_UNDER_ZERO3 = (
    "engine.kind huggingface samples with the whole model on each process, which ZeRO-3 does not have; use vllm or "
    "vllm_server, or launch with ZeRO-2 or DDP"
)


def check_engine(keys: EngineKeys) -> None:
    """Raise RefusedError for an engine that this machine does not have, that cannot sleep on it, or that cannot be had
    under what was launched."""
    if keys.kind == "huggingface" and ranks.zero_stage() == 3:
        raise RefusedError(NOT_UNDER_ZERO3)
    if keys.kind != "vllm":
        return
    if find_spec("vllm") is None:
        from llmrl.rollout.vllm_guest import MISSING

        raise RefusedError(f"engine.kind vllm: {MISSING}")
    if keys.sleep and not torch.cuda.is_available():
        raise RefusedError(
            "engine.sleep: vLLM gives memory back on a GPU only, and there is none here. Remedy: set it to false"
        )


def build_engine(
    config: SamplingConfig, learner: Learner, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Engine | None:
    """The engine of `config.engine`. Servers are asked by the first rank for all: None on the others.

    Raises RefusedError where it cannot be, RunFailedError where a server is not there.
    """
    keys = config.engine
    check_engine(keys)
    if keys.kind == "huggingface":
        if zero_stage(learner.accelerator) == 3:
            raise RefusedError(NOT_UNDER_ZERO3)
        return HuggingFaceEngine(learner.causal_lm, tokenizer, keys.max_rows, keys.max_cache_tokens)
    model, adapter = base_of(models.resolve(config.model_name_or_path)), adapter_alone(config, learner)
    if keys.kind == "vllm":
        if torch.cuda.is_available() and learner.accelerator.num_processes > 1:
            raise RefusedError(
                "engine.kind vllm takes the first GPU, whichever rank asks, so it is for one process. Remedy: "
                "engine.kind vllm_server, with servers on GPUs of their own (docs/engines.md, Several GPUs)"
            )
        from llmrl.rollout.vllm_local import VLLMEngine, VLLMOptions

        options = VLLMOptions(
            max_model_len=max_length,
            max_concurrent=config.rollout.concurrent,
            gpu_memory_share=keys.gpu_memory_utilization,
            sleep_mode=keys.sleep,
        )
        return VLLMEngine(model, tokenizer, options, adapter)
    if not learner.accelerator.is_main_process:
        return None
    from llmrl.rollout.vllm_server import ServerOptions, VLLMServerEngine

    servers = ServerOptions(
        patience_seconds=keys.patience_seconds,
        request_seconds=keys.request_seconds,
        max_concurrent=config.rollout.concurrent,
        folder=_weights_folder(config),
        allow_remote=keys.allow_remote,
        sleep_mode=keys.sleep,
    )
    return VLLMServerEngine(keys.urls, model, tokenizer, servers, adapter)


def length_within(
    engine: Engine | None, config: SamplingConfig, longest: int | None, say: Callable[[str], None]
) -> int | None:
    """Tokens of a rollout, `longest` by the model, that the engine takes, too; said where they are fewer.

    Raises RefusedError where more were asked for, or nothing would be left for a prompt.
    """
    limit: int | None = getattr(engine, "max_model_len", None)
    if limit is None or (longest is not None and longest <= limit):
        return longest
    for key, least in (
        ("max_length", config.max_length or 0),
        ("max_completion_length", config.max_completion_length + 1),
    ):
        if least > limit:
            raise RefusedError(
                f"{key} {getattr(config, key)} is too much for the engine, which takes sequences of {limit} tokens. "
                "Remedy: lower it, or start the server with a larger --max_model_len"
            )
    say(f"engine: a rollout has at most {limit} tokens, which is all that the engine takes (its max_model_len)")
    return limit


def _weights_folder(config: SamplingConfig) -> Path:
    """Where servers find new weights; that in output_dir is cleared of what a killed attempt has left there, and of
    nothing else: whatever else lies in it is somebody's own."""
    from llmrl.rollout.vllm_server import HANDED_OVER

    if config.engine.weights_dir is not None:
        return Path(config.engine.weights_dir)
    folder = Path(config.output_dir) / WEIGHTS
    for left in folder.glob(f"{HANDED_OVER}*"):
        shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):  # it is not there, or holds something else
        folder.rmdir()
    return folder


def adapter_alone(config: SamplingConfig, learner: Learner) -> PeftConfig | None:
    """The adapter's configuration, where it goes to the engine on its own; None where whole weights go."""
    if not isinstance(learner.causal_lm, PeftModel) or merges_adapter(config.engine):
        return None
    return learner.causal_lm.peft_config[learner.causal_lm.active_adapter]


def merges_adapter(keys: EngineKeys) -> bool:
    """Whether an adapter reaches a vLLM engine within the weights."""
    return keys.lora == "merged" or (keys.lora == "auto" and not torch.cuda.is_available())


def left_for_servers(config: SamplingConfig) -> str:
    """What lies in output_dir for vLLM servers: nothing, adapter, or weights."""
    if config.engine.kind != "vllm_server" or config.engine.weights_dir is not None:
        return "nothing"
    return "adapter" if config.use_peft and not merges_adapter(config.engine) else "weights"


def synchronise(engine: Engine | None, learner: Learner, adapter: PeftConfig | None, version: int) -> None:
    """Bring the learner's weights into the engine; called on all ranks, for sharded weights are gathered together.

    Raises on all of them what the engine of one raises.
    """
    if isinstance(engine, HuggingFaceEngine):
        engine.sync((), version)
        return
    weights = learner.weights()
    known = _as_the_engine_knows_them(weights, learner, adapter)

    def bring() -> None:
        try:
            if engine is not None:
                engine.sync(known, version)
        finally:
            for _ in weights:  # a rank without an engine, or whose engine failed, takes part in gathering, too
                pass

    all_do(learner.accelerator, bring)


def put_to_sleep(engine: Engine | None, accelerator: Accelerator) -> None:
    """Give the engine's memory to training, until `wake_up` or `synchronise`. What one rank fails with, all raise."""
    all_do(accelerator, engine.sleep if engine else None)


def wake_up(engine: Engine | None, accelerator: Accelerator) -> None:
    """Let an engine that sleeps be ready again, with the weights that it had."""
    all_do(accelerator, engine.wake if engine else None)


def _as_the_engine_knows_them(
    weights: Iterator[tuple[str, Tensor]], learner: Learner, adapter: PeftConfig | None
) -> Iterator[tuple[str, Tensor]]:
    from llmrl.rollout.vllm_weights import merged_weights

    return merged_weights(learner.causal_lm, weights) if adapter is None else weights
