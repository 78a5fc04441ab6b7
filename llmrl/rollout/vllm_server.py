"""vLLM in processes of its own, asked over HTTP: one server or several, on GPUs of their own or on other machines.

Weights travel through a folder that the servers can read, and each server is told to load it while its requests stand
still: requests under way keep their tokens and go on with the new policy.

Invariants
- A completion's `policy_version` is never newer than the weights that drew its first token.
- Nothing is sampled before the first `sync`, for the servers may have kept the weights of another run, nor after a
  failed one until one succeeds. A server that was started anew gets the newest weights before it is used again.
- A server says whose weights it has. Those of another run are never sampled from.
"""

import asyncio
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import AutoConfig, PreTrainedTokenizerBase

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.protocol import ASLEEP, Completion, SamplingParams, row_seed
from llmrl.rollout.vllm_http import Fleet, RequestRefusedError, Server
from llmrl.rollout.vllm_local import check_prompt, stop_token_ids
from llmrl.rollout.vllm_weights import ExpectedWeights, largest_rank, write_adapter, write_weights

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

T = TypeVar("T")
START = "Remedy: start it with launch/vllm_server, which sets this"
SLEEP = "Remedy: start it on a GPU with `launch/vllm_server MODEL -- --enable-sleep-mode`, or set engine.sleep to false"
NOT_FINITE = "not JSON compliant"
"""With these words a server refuses to put a NaN into its answer."""
HANDED_OVER = "llmrl-weights-"
"""With this begins the name of a folder in which an engine hands weights over."""
OWN_WEIGHTS = "default"
"""What vLLM says of weights that nobody has replaced."""


@dataclass(frozen=True)
class ServerOptions:
    """How servers are dealt with.

    patience_seconds: how long a server may fail before the run ends. request_seconds: the longest that one completion,
    or the loading of weights, may take. max_concurrent: completions under way at each server. folder: where weights are
    handed over, made where it is not there; None for a temporary one. allow_remote: servers on other machines.
    sleep_mode: servers are asked to sleep, which they must have been started for.
    """

    patience_seconds: float = 300.0
    request_seconds: float = 600.0
    max_concurrent: int = 256
    folder: Path | None = None
    allow_remote: bool = False
    sleep_mode: bool = False


class VLLMServerEngine:
    """Samples at running vLLM servers, each of which serves the model in the folder `model`.

    With `adapter` (the PEFT configuration of the learner's LoRA) `sync` hands over the adapter alone. The key of
    servers that ask for one is read from the environment's VLLM_API_KEY. Raises RunFailedError if a server does not
    answer within `patience_seconds`, RefusedError if it is set up otherwise than the engine needs.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        options: ServerOptions | None = None,
        adapter: "PeftConfig | None" = None,
    ) -> None:
        self.policy_version = 0
        self.options, self.adapter = options or ServerOptions(), adapter
        self._stop_token_ids = stop_token_ids(model, tokenizer)
        self._expected = ExpectedWeights.of(model)
        if adapter is not None:
            largest_rank(adapter)
        self._unfit = "nobody knows which weights the servers have"
        self._number, self._is_asleep = 0, False
        self._newest: Path | None = None
        self._old: list[Path] = []
        self._users: Counter[Path | None] = Counter()
        self._fleet = Fleet(
            urls, self.options.patience_seconds, self.options.allow_remote, os.environ.get("VLLM_API_KEY")
        )
        self._made = [each for each in [self.options.folder] if each is not None and not each.exists()]
        self._folder = _folder_in(self.options.folder)
        # A loop of its own: callers' loops come and go, connections stay.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True)
        self._thread.start()
        try:
            self._free = self._wait(self._places())
            limits = self._wait(self._all(self._facts))
        except BaseException:
            self.close()
            raise
        self.max_model_len = min(longest for _, longest in limits)
        self._model_name = limits[0][0]
        self._vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
        self._fleet.make_sure = self._make_sure

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """For each prompt `sampling.n` completions. Raises RefusedError for a prompt that cannot be continued."""
        for number, ids in enumerate(prompt_ids, 1):
            self._check(ids, sampling, number)
        rows = [
            (ids, replace(sampling, n=1, seed=row_seed(sampling.seed, p, s)))
            for p, ids in enumerate(prompt_ids)
            for s in range(sampling.n)
        ]
        found = self._wait(self._gather(rows))
        return [found[i : i + sampling.n] for i in range(0, len(found), sampling.n)]

    async def complete(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion, beside all others that are under way. Cancelled, it ends at the server too."""
        self._check(prompt_ids, sampling, 1)
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(self._complete(prompt_ids, sampling), self._loop)
        )

    def _check(self, prompt_ids: Sequence[int], sampling: SamplingParams, number: int) -> None:
        if self._unfit:
            raise RunFailedError(f"nothing can be sampled before a sync succeeds: {self._unfit}")
        if self._is_asleep:
            raise RunFailedError(ASLEEP)
        check_prompt(prompt_ids, sampling, number, self.max_model_len, self._vocabulary)

    async def _gather(self, rows: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Completion]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._complete(ids, sampling)) for ids, sampling in rows]
        return [task.result() for task in tasks]

    async def _complete(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        async with self._free:
            version, weights = self.policy_version, self._newest
            self._users[weights] += 1
            try:
                answer = await self._fleet.ask_any(
                    "/v1/completions",
                    self._body(prompt_ids, sampling),
                    "give a completion",
                    self.options.request_seconds,
                )
            except RequestRefusedError as error:
                if NOT_FINITE not in error.message:
                    raise
                raise RunFailedError(
                    "the model's log-probabilities are not finite (NaN or infinite): its weights have broken down"
                ) from error
            finally:
                self._users[weights] -= 1
        if self._unfit:
            raise RunFailedError(f"a sync failed while a completion was under way: {self._unfit}")
        return _completion(answer["choices"][0], sampling.seed, version)

    def _body(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> dict[str, Any]:
        return {
            "model": self._newest.name if self.adapter is not None and self._newest else self._model_name,
            "prompt": list(prompt_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed if sampling.temperature > 0 else None,
            "stop_token_ids": sorted(self._stop_token_ids | set(sampling.stop_token_ids)),
            "ignore_eos": True,  # the end tokens are among the stop tokens
            "logprobs": 0,
            "return_token_ids": True,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,  # nothing that a generation_config.json might bring in
        }

    # -- weights -------------------------------------------------------------------------------------------------

    def sync(self, weights: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """Sample from these weights from now on: parameters by the names of the model's state dict, or with `adapter`
        those of the PEFT model, of which the adapter's are taken.

        Raises RunFailedError where the weights do not fit, the folder cannot be written, or a server does not take
        them; then nothing is sampled until a sync succeeds.
        """
        if isinstance(weights, Mapping):
            weights = weights.items()
        self._number += 1
        folder = self._folder / f"policy-v{version}-{self._number}"
        try:
            if self.adapter is not None:
                write_adapter(weights, self.adapter, folder)
            else:
                write_weights(self._expected.checked(weights), folder)
            self._old += [self._newest] if self._newest else []
            self._newest = folder
            self._wait(self._all(self._renew))
        except BaseException as error:
            self._unfit = str(error) or type(error).__name__
            if not isinstance(error, Exception):
                raise
            raise RunFailedError(
                f"the weights of policy version {version} did not reach the vLLM servers: {error}"
            ) from error
        self._unfit, self.policy_version, self._is_asleep = "", version, False
        self._clear_away()

    def _clear_away(self) -> None:
        """Remove what was handed over before; adapters when no completion under way needs them any more."""
        for folder in [each for each in self._old if self.adapter is None or not self._users[each]]:
            if self.adapter is not None:
                self._wait(self._all(lambda server, name=folder.name: self._forget(server, name)))
            shutil.rmtree(folder, ignore_errors=True)
            self._old.remove(folder)

    async def _renew(self, server: Server) -> None:
        async with server.lock:
            if self._number > 1:  # the first time it may have what an earlier run has left
                self._refuse_strangers(server, await self._weights_of(server, patiently=True))
            await self._load(server, patiently=True)
            server.made_sure()

    async def _make_sure(self, server: Server) -> None:
        """See whether a server still has the newest weights; one that was started anew gets them."""
        if self._newest is None:
            return
        label = await self._weights_of(server, patiently=False)
        if label == self._label(self._newest):
            return
        self._refuse_strangers(server, label)
        await self._load(server, patiently=False)

    def _refuse_strangers(self, server: Server, label: str) -> None:
        if label != OWN_WEIGHTS and self._folder.name not in label:
            raise RunFailedError(f"another run gave {server.url} its weights. Remedy: each run has servers of its own")

    def _label(self, weights: Path) -> str:
        """By which a server tells whose weights it has; vLLM keeps it until it ends."""
        return f"{'weights' if self.adapter is None else 'adapter'} {self._folder.name}/{weights.name}"

    async def _weights_of(self, server: Server, patiently: bool) -> str:
        info = await self._control(server, patiently, "/weight_info", None, "tell its weights", method="GET")
        return str(info["weight_version"])

    async def _load(self, server: Server, patiently: bool) -> None:
        """Make a server sample from the newest weights. On GPUs vLLM's weight transfer could take this place."""
        assert self._newest is not None
        control = partial(self._control, server, patiently)
        label = {"new_version": self._label(self._newest)}
        if self._is_asleep:
            await control("/wake_up", None, "wake up")
        if self.adapter is not None:
            body = {"lora_name": self._newest.name, "lora_path": str(self._newest), "load_inplace": True}
            await control("/v1/load_lora_adapter", body, "take an adapter")
            await control("/update_weight_version", label, "note its weights")
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._newest)}}
            await control("/pause?mode=keep", None, "pause")
            await control("/collective_rpc", body, "take the new weights")
            reset = await control("/reset_prefix_cache?reset_running_requests=true", None, "empty its cache")
            if not reset["success"]:
                raise RunFailedError(f"{server.url} did not empty its cache of the old weights' keys and values")
            await control("/resume", None, "go on after a pause")
            await control("/update_weight_version", label, "note its weights")  # last: one that has it is not paused

    async def _forget(self, server: Server, name: str) -> None:
        with suppress(RequestRefusedError):  # a server that was started anew does not know it
            await self._control(server, True, "/v1/unload_lora_adapter", {"lora_name": name}, "drop an adapter")

    async def _control(
        self, server: Server, patiently: bool, path: str, body: dict[str, Any] | None, what: str, method: str = "POST"
    ) -> Any:
        """One of the calls that only a server set up for training answers."""
        try:
            seconds = self.options.request_seconds
            return await self._fleet.ask(server, method, path, body, what, seconds, patiently)
        except RequestRefusedError as error:
            if error.status != 404 or error.message != "Not Found":
                raise
            lora = "lora" in path
            setting = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora" if lora else "VLLM_SERVER_DEV_MODE=1"
            raise RefusedError(f"{server.url} has no {path}: it runs without {setting}. {START}") from error

    # -- life ----------------------------------------------------------------------------------------------------

    async def _facts(self, server: Server) -> tuple[str, int]:
        """(name of the served model, its longest sequence). Raises RefusedError for a server that is set up otherwise
        than this engine needs. One that a killed run has left asleep or standing still goes on."""
        seconds = self.options.request_seconds
        try:
            path = "/server_info?config_format=json"
            info = await self._fleet.ask(server, "GET", path, None, "tell its settings", seconds)
        except RequestRefusedError as error:
            raise RefusedError(f"{server.url} does not tell its settings (VLLM_SERVER_DEV_MODE=1). {START}") from error
        settings = info["vllm_config"]["model_config"]
        if settings["logprobs_mode"] != "processed_logprobs":
            raise RefusedError(
                f"{server.url} gives {settings['logprobs_mode']}, which are not those of the distribution that it "
                f"samples from. It needs --logprobs-mode processed_logprobs. {START}"
            )
        can_sleep = settings.get("enable_sleep_mode", False)
        if self.options.sleep_mode and not can_sleep:
            raise RefusedError(f"{server.url} cannot sleep: it runs without --enable-sleep-mode. {SLEEP}")
        await self._control(server, True, "/wake_up" if can_sleep else "/resume", None, "begin")
        if self.adapter is not None and (await self._weights_of(server, patiently=True)).startswith("weights "):
            raise RefusedError(
                f"{server.url} has the weights of another run, and an adapter needs the model's own. Remedy: start it "
                "anew, or engine.lora merged"
            )
        models = await self._fleet.ask(server, "GET", "/v1/models", None, "tell its models", seconds)
        return models["data"][0]["id"], settings["max_model_len"]

    async def _places(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self.options.max_concurrent * len(self._fleet.servers))

    async def _all(self, each: Any) -> list[Any]:
        return list(await asyncio.gather(*(each(server) for server in self._fleet.servers)))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several
        except BaseException:
            future.cancel()
            raise

    def sleep(self) -> None:
        """Servers put their weights into the machine's memory and drop keys and values, until `sync` or `wake`. What is
        under way there is lost. Raises RefusedError without `sleep_mode`."""
        if not self.options.sleep_mode:
            raise RefusedError("these servers were not said to sleep: ServerOptions(sleep_mode=True)")
        self._is_asleep = True  # whatever comes of it: a server that does not sleep can be woken, too
        self._wait(self._all(lambda server: self._control(server, True, "/sleep?level=1", None, "go to sleep")))

    def wake(self) -> None:
        """Be ready to sample again, with the weights of before."""
        if self._is_asleep:
            self._wait(self._all(self._woken))
            self._is_asleep = False

    async def _woken(self, server: Server) -> None:
        await self._control(server, True, "/wake_up", None, "wake up")
        server.is_sure = False

    def close(self) -> None:
        """End the connections and remove the folder; the servers go on."""
        if not self._loop.is_closed():
            self._wait(self._fleet.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for folder in self._made:
            with suppress(OSError):  # it holds something else, or is gone
                folder.rmdir()


def _folder_in(parent: Path | None) -> Path:
    """A folder of this engine's own; servers are given its absolute path, for they may work elsewhere."""
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=HANDED_OVER, dir=parent)).resolve()
    except OSError as error:
        raise RefusedError(
            f"the folder for weights, {parent}, cannot be used: {error.strerror or error}. Name another "
            "(engine.weights_dir), which the servers can read, too"
        ) from error


def _completion(choice: dict[str, Any], seed: int, version: int) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise RunFailedError(f"a vLLM server ended a completion with {choice['finish_reason']!r}")
    logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    return Completion(list(choice["token_ids"]), logprobs, choice["finish_reason"], seed, version)
