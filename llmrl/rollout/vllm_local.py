"""vLLM in the learner's process: requests join and leave between two of its steps.

Invariants
- A sample depends on its prompt, its seed and the weights: each request has its own seed, and a prompt is never
  computed in parts (with a seed that is an error of vLLM's on CPUs).
- After `sync` nothing computed with the old weights is used: what is under way is computed anew up to its newest
  token, keeps the tokens and log-probabilities that it has, and goes on with the new policy.
- After a failed `sync` the engine samples nothing until one succeeds. After a failed step all its requests are gone.
- A completion of which no log-probability is finite is an error; a single one that is not stays as it is, for the
  trainer to leave out and count.
"""

import gc
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout import vllm_guest
from llmrl.rollout.protocol import ASLEEP, Completion, FinishReason, SamplingParams
from llmrl.rollout.stepped import SteppedEngine
from llmrl.rollout.vllm_weights import ExpectedWeights, largest_rank, write_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's CPU attention computes; it finds out in the middle of a step."""
NO_SLEEP = "vLLM gives memory back on a GPU only, and there is none here. Remedy: set engine.sleep to false"


@dataclass(frozen=True)
class VLLMOptions:
    """How the engine uses the machine.

    dtype: "auto" is float32 on a CPU and the model's own on a GPU. max_model_len: tokens of prompt and completion
    together, None for the model's positions. max_concurrent: completions in one step. kv_cache_gib: memory for keys and
    values on a CPU; gpu_memory_share: of the GPU's memory for weights, keys and values. sleep_mode: memory is taken so
    that `sleep` can give it back.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    max_concurrent: int = 256
    kv_cache_gib: float = 1.0
    gpu_memory_share: float = 0.4
    prefix_caching: bool = True
    sleep_mode: bool = False


@dataclass(frozen=True)
class _Request:
    seed: int
    policy_version: int
    adapter: str | None


class VLLMEngine(SteppedEngine):
    """Samples with vLLM from the model in a folder, and after `sync` from the learner's weights.

    With `adapter` (the PEFT configuration of the learner's LoRA) `sync` takes the adapter alone and leaves the base
    weights as they are. On a CPU sampling through an adapter is nearly three times slower than from merged weights.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        options: VLLMOptions | None = None,
        adapter: "PeftConfig | None" = None,
    ) -> None:
        super().__init__()
        vllm_guest.import_vllm()
        self.model, self.options, self.adapter = model, options or VLLMOptions(), adapter
        self._stop_token_ids = stop_token_ids(model, tokenizer)
        self._max_lora_rank = largest_rank(adapter) if adapter else 0
        self._folder = tempfile.TemporaryDirectory(prefix="llmrl-adapters-")
        self._requests: dict[int, _Request] = {}
        self._adapters: dict[str, Any] = {}
        self._active: Any = None
        self._unfit = ""
        self._is_damaged = False
        with vllm_guest.at_home():
            _check_machine(model, self.options)
            self._expected = ExpectedWeights.of(model)
            self._engine: Any = self._build()
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self.max_model_len = self._engine.model_config.max_model_len

    # -- sampling ------------------------------------------------------------------------------------------------

    def _check(self, prompt_ids: Sequence[int], sampling: SamplingParams, number: int) -> None:
        if self._unfit:
            raise RunFailedError(f"nothing can be sampled before a sync succeeds: {self._unfit}")
        if self._is_asleep:
            raise RunFailedError(ASLEEP)
        check_prompt(prompt_ids, sampling, number, self.max_model_len, self._vocabulary)

    def _add(self, key: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        lora = self._active
        self._engine.add_request(
            str(key), {"prompt_token_ids": list(prompt_ids)}, self._parameters(sampling), lora_request=lora
        )
        self._requests[key] = _Request(sampling.seed, self.policy_version, lora.lora_name if lora else None)

    def _step(self) -> list[tuple[int, Completion]]:
        try:
            with vllm_guest.random_state():
                outputs = self._engine.step()
        except Exception as error:
            self._clear()
            raise RunFailedError(f"vLLM failed while it generated, and its requests are lost: {error}") from error
        ended = []
        for output in outputs:
            request = self._requests.pop(int(output.request_id), None)
            if output.finished and request is not None:
                ended.append((int(output.request_id), _completion(output.outputs[0], request)))
        for _, completion in ended:
            if not any(map(math.isfinite, completion.logprobs)):
                self._give_up_weights()
        return ended

    def _give_up_weights(self) -> None:
        """Keys and values that are NaN spoil whatever is computed in their place later, so the engine is built anew."""
        self._clear()
        self._is_damaged = True
        self._unfit = "the model's logits are not finite (NaN or infinite): its weights have broken down"
        raise RunFailedError(self._unfit)

    def _abort(self, keys: Sequence[int]) -> None:
        present = [key for key in keys if self._requests.pop(key, None) is not None]
        self._engine.abort_request([str(key) for key in present])

    def _parameters(self, sampling: SamplingParams) -> Any:
        from vllm import SamplingParams as Parameters
        from vllm.sampling_params import RequestOutputKind

        return Parameters(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed if sampling.temperature > 0 else None,
            stop_token_ids=sorted(self._stop_token_ids | set(sampling.stop_token_ids)),
            ignore_eos=True,  # the end tokens are among the stop tokens: what they are is ours to say
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _clear(self) -> None:
        """After an exception in a step: without this its requests stay queued, and the next step fails like it."""
        self._requests.clear()
        self._engine.abort_request(list(self._engine.output_processor.request_states), internal=True)
        self._engine.reset_prefix_cache()

    # -- weights -------------------------------------------------------------------------------------------------

    def sync(self, weights: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """Sample from these weights from now on: parameters by the names of the model's state dict, or with `adapter`
        those of the PEFT model, of which the adapter's are taken.

        A mapping or list is checked before anything changes, an iterator as it comes. Raises RunFailedError where the
        weights do not fit or cannot be taken; then nothing is sampled until a sync succeeds, which first builds the
        engine anew where it was left half changed.
        """
        self._unfit = "it was interrupted"
        if isinstance(weights, Mapping):
            weights = list(weights.items())
        try:
            self.wake()
            if self.adapter is not None:
                self._take_adapter(weights, version)
            else:
                self._take_all(weights)
        except Exception as error:
            self._unfit = str(error) or type(error).__name__
            raise RunFailedError(f"the weights of policy version {version} did not get into vLLM: {error}") from error
        self._unfit, self.policy_version = "", version

    def _take_all(self, weights: "Iterable[tuple[str, Tensor]]") -> None:
        if isinstance(weights, Sequence):
            for _ in self._expected.checked(weights):
                pass
        if self._is_damaged:
            self._rebuild()
        self._is_damaged = True
        stream = {"weights_iterator": self._expected.checked(weights)}
        with vllm_guest.random_state(), torch.no_grad():
            self._engine.collective_rpc("reload_weights", kwargs=stream)
        # What runs is computed anew with the new weights; a plain reset would leave the old keys and values in place.
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RunFailedError("vLLM did not empty its cache of the old weights' keys and values")
        self._is_damaged = False

    def _take_adapter(self, weights: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """A new name, number and folder each time: vLLM keeps adapters by number, and keys and values by name."""
        from vllm.lora.request import LoRARequest

        assert self.adapter is not None
        if self._is_damaged:
            self._rebuild()
        number = 1 + self._active.lora_int_id if self._active else 1
        folder = Path(self._folder.name) / f"v{number}"
        write_adapter(weights, self.adapter, folder)
        request = LoRARequest(f"policy-v{version}-{number}", number, str(folder))
        with vllm_guest.random_state():
            self._engine.engine_core.add_lora(request)
        self._adapters[request.lora_name] = self._active = request
        self._forget_adapters()

    def _forget_adapters(self) -> None:
        """Drop the adapters that no request under way needs: those go on with the one that they began with."""
        in_use = {request.adapter for request in self._requests.values()} | {self._active.lora_name}
        for name in [name for name in self._adapters if name not in in_use]:
            gone = self._adapters.pop(name)
            self._engine.engine_core.remove_lora(gone.lora_int_id)
            shutil.rmtree(gone.lora_path)

    # -- life ----------------------------------------------------------------------------------------------------

    def _build(self) -> Any:
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        machine = _cpu_settings(self.model, self.options) if current_platform.is_cpu() else _gpu_settings(self.options)
        lora: dict[str, Any] = {}
        if self.adapter is not None:  # two: requests under way keep the adapter that they began with
            lora = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 8, "max_lora_rank": self._max_lora_rank}
        arguments = EngineArgs(
            model=self.model,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no sampling settings from the model's folder
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            max_model_len=self.options.max_model_len,
            max_num_seqs=self.options.max_concurrent,
            enable_prefix_caching=self.options.prefix_caching,
            seed=0,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **machine,
            **lora,
        )
        try:
            # Said to be `LLM`'s: without a word a GPU's step has 2,048 tokens instead of the 8,192 or 16,384 of that.
            return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        except (ValueError, RuntimeError, OSError) as error:
            raise RefusedError(f"vLLM cannot be started with {self.model}: {error}") from error

    def _rebuild(self) -> None:
        self._requests.clear()
        self._shut_down()
        with vllm_guest.at_home():
            self._engine = self._build()
        for gone in self._adapters.values():
            shutil.rmtree(gone.lora_path)
        self._adapters.clear()
        self._is_damaged = False

    def _shut_down(self) -> None:
        asleep, engine, self._engine = self._is_asleep, self._engine, None
        if engine is not None:
            if asleep:  # vLLM can only free what is there; what does not come back now is freed with the process
                with suppress(RuntimeError):
                    engine.wake_up()
            engine.engine_core.shutdown()
            del engine
            gc.collect()

    @property
    def _is_asleep(self) -> bool:
        return self._engine is not None and self._engine.is_sleeping()

    def sleep(self) -> None:
        """Weights go to the machine's memory and keys and values away, until `sync` or `wake`: level 1 of vLLM's sleep.

        Level 2 would drop the weights, too, and with them what no sync brings back: the base of an adapter, and tensors
        that are neither parameters nor buffers. Raises RefusedError without `sleep_mode`, RunFailedError where
        something is under way.
        """
        if not self.options.sleep_mode:
            raise RefusedError("this engine was not built to sleep: VLLMOptions(sleep_mode=True)")
        if self._requests:
            raise RunFailedError(f"{len(self._requests)} completions are under way, so the engine cannot sleep")
        if not self._is_asleep:
            self._engine.sleep(level=1)

    def wake(self) -> None:
        """Be ready to sample again, with the weights of before. Raises RunFailedError where the memory is not there."""
        if not self._is_asleep:
            return
        try:
            self._engine.wake_up()
        except RuntimeError as error:
            raise RunFailedError(
                f"after its sleep vLLM did not get its memory back: {error}. Remedy: a smaller "
                "engine.gpu_memory_utilization"
            ) from error

    def close(self) -> None:
        """Give the engine's memory back."""
        self._unfit = self._unfit or "the engine was closed"
        self._shut_down()
        self._folder.cleanup()


def check_prompt(
    prompt_ids: Sequence[int], sampling: SamplingParams, number: int, max_model_len: int, vocabulary: int
) -> None:
    """Raise RefusedError for what vLLM would refuse for all requests at once, or cut without a word."""
    if not prompt_ids:
        raise RefusedError(f"prompt {number} is empty: there is nothing to continue")
    if len(prompt_ids) + sampling.max_tokens > max_model_len:
        raise RefusedError(
            f"prompt {number} has {len(prompt_ids)} tokens; with {sampling.max_tokens} new ones it exceeds the "
            f"engine's {max_model_len} tokens (max_model_len). Remedy: shorten the prompt or lower the number of new "
            "tokens."
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocabulary:
        raise RefusedError(f"prompt {number} has a token id outside the model's vocabulary of {vocabulary}")


def _completion(output: Any, request: _Request) -> Completion:
    token_ids = list(output.token_ids)
    logprobs = [position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)]
    reason: FinishReason = "stop" if output.finish_reason == "stop" else "length"
    return Completion(token_ids, logprobs, reason, request.seed, request.policy_version)


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end token and those of the model's generation configuration, if it has one."""
    try:
        configured = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        configured = None
    own = configured if isinstance(configured, list) else [configured]
    return {i for i in (tokenizer.eos_token_id, *own) if i is not None}


def _check_machine(model: str, options: VLLMOptions) -> None:
    """Raises RefusedError for what vLLM cannot do on a CPU: sleep, and compute attention heads of some widths."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if options.sleep_mode:
        raise RefusedError(NO_SLEEP)
    config = AutoConfig.from_pretrained(model).get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width not in CPU_HEAD_SIZES:
        raise RefusedError(
            f"{model}: its attention heads are {width} wide, and vLLM computes on a CPU only widths of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}. Remedy: the Hugging Face engine"
        )


def _cpu_settings(model: str, options: VLLMOptions) -> dict[str, Any]:
    longest = options.max_model_len or AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings
    return {
        "dtype": "float32" if options.dtype == "auto" else options.dtype,
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30),
        "block_size": 32,  # prompts share their beginning in blocks of this many tokens; the default is 128
        # A prompt computed in parts ends the step with an error where the request has a seed.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(longest, 4096),
    }


def _gpu_settings(options: VLLMOptions) -> dict[str, Any]:
    """What is not said here is vLLM's own choice for a GPU: compiled, with CUDA graphs, prompts computed in parts."""
    return {
        "dtype": options.dtype,
        "gpu_memory_utilization": options.gpu_memory_share,
        "enable_sleep_mode": options.sleep_mode,
    }
