"""The client of vLLM servers: faults against a small fake server, the rest against one real one."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from support.fake_vllm import FakeServer
from support.models import make_tiny_model
from support.words import word_tokenizer

from llmrl.errors import RefusedError, RunFailedError
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import completion
from llmrl.rollout import vllm_http
from llmrl.rollout.protocol import Completion, SamplingParams, row_seed
from llmrl.rollout.vllm_launch import ServerProcess
from llmrl.rollout.vllm_server import ServerOptions, VLLMServerEngine
from llmrl.rollout.vllm_weights import merged_weights

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER: Any = SimpleNamespace(eos_token_id=2)
PROMPTS = [[5, 6, 7, 8], [9] * 3, list(range(3, 90))]
SAMPLING = SamplingParams(12, seed=7)


def model(seed: int = 0) -> Any:
    return make_tiny_model(seed=seed, head_dim=32, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("model")
    model().save_pretrained(made)
    word_tokenizer().save_pretrained(made)
    return str(made)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.end()


def connect(model_folder: str, *servers: FakeServer, **options: Any) -> VLLMServerEngine:
    chosen = ServerOptions(**{"patience_seconds": 0.5, "request_seconds": 5.0, **options})
    engine = VLLMServerEngine([server.url for server in servers], model_folder, TOKENIZER, chosen)
    engine.sync(model().named_parameters(), 0)
    return engine


def test_nothing_is_sampled_with_weights_that_another_run_may_have_left(folder: str, fake: FakeServer) -> None:
    engine = VLLMServerEngine([fake.url], folder, TOKENIZER)
    with pytest.raises(RunFailedError, match="nobody knows which weights the servers have"):
        engine.generate(PROMPTS, SAMPLING)
    engine.close()


def test_rows_come_back_in_order_with_their_own_seeds(folder: str, fake: FakeServer) -> None:
    engine = connect(folder, fake)
    found = engine.generate(PROMPTS, replace(SAMPLING, n=3, stop_token_ids=(4,)))
    for p, row in enumerate(found):
        for s, each in enumerate(row):
            seed = row_seed(7, p, s)
            assert each == Completion([PROMPTS[p][-1], seed % 97], [-0.5, -1.5], "length", seed, 0)
    body = next(body for path, body in fake.asked if path == "/v1/completions")
    assert body["model"] == "served"
    assert body["stop_token_ids"] == [2, 4]
    engine.close()


def test_servers_share_the_load(folder: str) -> None:
    def slow(server: FakeServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.2 if "completions" in path else 0)
        return server.usual(path, body)

    servers = [FakeServer(answer=slow) for _ in range(3)]
    engine = connect(folder, *servers)
    engine.generate(PROMPTS, replace(SAMPLING, n=4))
    assert [server.paths().count("/v1/completions") for server in servers] == [4, 4, 4]
    engine.close()


def test_weights_are_handed_over_while_requests_stand_still(folder: str, fake: FakeServer, tmp_path: Path) -> None:
    engine = connect(folder, fake, folder=tmp_path)
    for version in (1, 2):
        engine.sync(model(seed=version).named_parameters(), version)
        assert [path for path, _ in fake.asked[-5:]] == [
            "/pause?mode=keep", "/collective_rpc", "/reset_prefix_cache?reset_running_requests=true",
            "/resume", "/update_weight_version",
        ]  # fmt: skip
        assert fake.weights == sorted(model().state_dict())  # with the tied head
        assert len(list(next(tmp_path.iterdir()).iterdir())) == 1  # the weights before have been removed
        assert engine.generate(PROMPTS, SAMPLING)[0][0].policy_version == engine.policy_version == version
    engine.close()
    assert not list(tmp_path.iterdir())


def test_the_folder_for_weights_is_made_and_goes_with_the_engine(folder: str, fake: FakeServer, tmp_path: Path) -> None:
    missing, given = tmp_path / "run" / "weights", tmp_path / "given"
    given.mkdir()
    for parent in (missing, given):
        engine = connect(folder, fake, folder=parent)
        assert len(list(parent.iterdir())) == 1
        engine.close()
    assert not missing.exists()
    assert list(given.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match=r"tmp.*file, cannot be used: .*engine\.weights_dir"):
        connect(folder, fake, folder=tmp_path / "file")


def test_a_server_that_fails_for_a_while_is_waited_for(folder: str, fake: FakeServer) -> None:
    engine = connect(folder, fake, patience_seconds=20.0)
    failures = iter(range(100))

    def failing(server: FakeServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {"error": {"message": "busy"}}) if next(failures) < 4 else server.usual(path, body)

    fake.answer = failing
    assert len(engine.generate(PROMPTS, SAMPLING)) == 3
    engine.close()


def test_a_server_that_goes_on_failing_ends_the_run_with_its_url_and_what_was_awaited(
    folder: str, fake: FakeServer
) -> None:
    engine = connect(folder, fake)
    fake.answer = lambda server, path, body: (500, {"error": {"message": "the engine is dead"}})
    with pytest.raises(RunFailedError, match=rf"{fake.url} did not give a completion.*HTTP 500: the engine is dead"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RunFailedError, match="did not give a completion"):
        asyncio.run(engine.complete(PROMPTS[0], SAMPLING))
    engine.close()


def test_a_server_that_hangs_is_given_up_at_the_deadline(folder: str, fake: FakeServer) -> None:
    engine = connect(folder, fake, request_seconds=0.3, patience_seconds=0.2)
    ended = threading.Event()
    fake.answer = lambda server, path, body: (ended.wait(20) and 200, {})
    with pytest.raises(RunFailedError, match=r"did not give a completion.*no answer within 0.3 s"):
        engine.generate(PROMPTS[:1], SAMPLING)
    ended.set()
    engine.close()


def test_a_server_that_is_not_there_at_the_start_is_named(folder: str, fake: FakeServer) -> None:
    fake.end()
    with pytest.raises(RunFailedError, match=rf"{fake.url} did not tell its settings.*ConnectError"):
        connect(folder, fake)


def test_a_server_killed_on_the_way_costs_nothing_where_there_is_another(folder: str, fake: FakeServer) -> None:
    other = FakeServer()
    engine = connect(folder, fake, other)
    fake.end()
    assert len(engine.generate(PROMPTS, replace(SAMPLING, n=4))) == 3
    assert other.paths().count("/v1/completions") == 12
    engine.close()
    other.end()


def test_a_server_that_was_started_anew_gets_the_newest_weights_first(folder: str, fake: FakeServer) -> None:
    engine = connect(folder, fake, patience_seconds=20.0)
    engine.sync(model(seed=1).named_parameters(), 1)
    fake.end()
    again: list[FakeServer] = []
    threading.Timer(0.5, lambda: again.append(FakeServer(fake.server_address[1]))).start()
    assert engine.generate(PROMPTS, SAMPLING)[0][0].policy_version == 1
    paths = again[0].paths()
    assert paths.index("/collective_rpc") < paths.index("/resume") < paths.index("/v1/completions")
    assert paths.count("/collective_rpc") == 1
    engine.close()
    again[0].end()


def test_a_server_that_was_started_anew_while_nobody_asked_it_gets_the_newest_weights_too(
    folder: str, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_http, "SURE_SECONDS", 0.1)
    engine = connect(folder, fake)
    engine.generate(PROMPTS, SAMPLING)
    time.sleep(0.2)
    engine.generate(PROMPTS, SAMPLING)
    assert fake.paths().count("/collective_rpc") == 1  # it was asked, and had them
    assert fake.paths().count("/weight_info") >= 1
    fake.end()
    again = FakeServer(fake.server_address[1])
    time.sleep(0.2)
    engine.generate(PROMPTS, SAMPLING)
    paths = again.paths()
    assert paths.index("/weight_info") < paths.index("/collective_rpc") < paths.index("/v1/completions")
    engine.close()
    again.end()


@pytest.mark.parametrize("interval", ["SURE_SECONDS", "ASKED_EVERY_SECONDS"])
def test_two_runs_at_one_server_do_not_sample_from_one_anothers_weights(
    folder: str, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, interval: str
) -> None:
    monkeypatch.setattr(vllm_http, interval, 0.0)
    first = connect(folder, fake)
    second = connect(folder, fake)
    with pytest.raises(RunFailedError, match=f"another run gave {fake.url} its weights"):
        first.generate(PROMPTS, SAMPLING)
    with pytest.raises(RunFailedError, match=f"another run gave {fake.url} its weights"):
        first.sync(model().named_parameters(), 1)
    assert len(second.generate(PROMPTS, SAMPLING)) == 3
    with pytest.raises(RefusedError, match="has the weights of another run, and an adapter needs the model's own"):
        VLLMServerEngine([fake.url], folder, TOKENIZER, adapter=LoraConfig(r=4))
    first.close()
    second.close()


# -- sleep -----------------------------------------------------------------------------------------------------------


def test_servers_sleep_until_they_are_woken_or_get_new_weights(folder: str) -> None:
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        server.can_sleep = True
    engine = connect(folder, *servers, sleep_mode=True)
    for server in servers:
        assert server.paths().index("/wake_up") < server.paths().index("/pause")  # a killed run may have left it asleep
    engine.sleep()
    assert {server.asked[-1][0] for server in servers} == {"/sleep?level=1"}
    with pytest.raises(RunFailedError, match="the engine sleeps"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RunFailedError, match="the engine sleeps"):
        asyncio.run(engine.complete(PROMPTS[0], SAMPLING))
    engine.wake()
    assert {server.asked[-1][0] for server in servers} == {"/wake_up"}
    engine.generate(PROMPTS, replace(SAMPLING, n=4))
    for server in servers:  # woken, it might have been another process
        asked = server.paths()
        assert asked[len(asked) - 1 - asked[::-1].index("/wake_up") + 1] == "/weight_info"
    engine.sleep()
    engine.sync(model(seed=1).named_parameters(), 1)
    assert [path for path in servers[0].paths() if path in ("/sleep", "/wake_up", "/collective_rpc")] == [
        "/wake_up", "/collective_rpc", "/sleep", "/wake_up", "/sleep", "/wake_up", "/collective_rpc",
    ]  # fmt: skip
    assert engine.generate(PROMPTS, SAMPLING)[0][0].policy_version == 1
    engine.close()
    for server in servers:
        server.end()


def test_a_server_that_cannot_sleep_is_refused_at_the_start(folder: str, fake: FakeServer) -> None:
    with pytest.raises(RefusedError, match=rf"{fake.url} cannot sleep.*launch/vllm_server MODEL -- --enable-sleep"):
        connect(folder, fake, sleep_mode=True)
    engine = connect(folder, fake)
    with pytest.raises(RefusedError, match="not said to sleep"):
        engine.sleep()
    engine.close()


def test_what_a_server_refuses_is_an_error_at_once_with_its_words(folder: str, fake: FakeServer) -> None:
    engine = connect(folder, fake, patience_seconds=60.0)
    fake.answer = lambda server, path, body: (400, {"error": {"message": "no such token"}})
    with pytest.raises(RunFailedError, match=r"refused to give a completion .HTTP 400.: no such token"):
        engine.generate(PROMPTS, SAMPLING)
    assert fake.paths().count("/v1/completions") <= 3
    engine.close()


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/collective_rpc", (400, {"error": {"message": "no shape"}}), "refused to take the new weights.*no shape"),
        ("/collective_rpc", (404, {"detail": "Not Found"}), "runs without VLLM_SERVER_DEV_MODE=1.*launch/vllm_server"),
        ("/collective_rpc", (500, {"error": {"message": "dead"}}), "did not take the new weights.*dead"),
        ("/reset_prefix_cache", (200, {"success": False}), "did not empty its cache"),
    ],
)
def test_after_a_failed_sync_nothing_is_sampled_until_one_succeeds(
    folder: str, fake: FakeServer, path: str, answer: tuple[int, Any], message: str
) -> None:
    engine = connect(folder, fake)
    fake.answer = lambda server, asked, body: answer if asked.startswith(path) else server.usual(asked, body)
    with pytest.raises(RunFailedError, match=message):
        engine.sync(model(seed=1).named_parameters(), 1)
    with pytest.raises(RunFailedError, match="nothing can be sampled before a sync succeeds"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RunFailedError, match="30 weights did not come"):
        engine.sync(list(model(seed=1).named_parameters())[:-3], 1)
    fake.answer = None
    engine.sync(model(seed=1).named_parameters(), 2)
    assert engine.generate(PROMPTS, SAMPLING)[0][0].policy_version == 2
    engine.close()


def test_a_cancelled_completion_leaves_the_server(folder: str, fake: FakeServer) -> None:
    gone = threading.Event()

    def waits(server: FakeServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        gone.wait(20)
        return 200, {}

    engine = connect(folder, fake)
    fake.answer = waits

    async def cancel() -> None:
        task = asyncio.create_task(engine.complete(PROMPTS[0], SAMPLING))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    for _ in range(100):
        if not engine._fleet.servers[0].in_flight:
            break
        time.sleep(0.02)
    assert engine._fleet.servers[0].in_flight == 0
    gone.set()
    engine.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://10.0.0.7:8000", "is not on this machine.*allow_remote"),
        ("http://gpu-node:8000", "is not on this machine"),
        ("http://127.0.0.1.example.org", "is not on this machine"),
        ("127.0.0.1:8000", "is not the URL of a server"),
        ("ftp://127.0.0.1", "is not the URL of a server"),
    ],
)
def test_only_servers_on_this_machine_unless_asked_for(folder: str, url: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        VLLMServerEngine([url], folder, TOKENIZER)


def test_a_server_with_other_log_probabilities_is_refused(folder: str, fake: FakeServer) -> None:
    settings = {"logprobs_mode": "raw_logprobs", "max_model_len": 256}
    fake.answer = lambda server, path, body: (200, {"vllm_config": {"model_config": settings}})
    with pytest.raises(RefusedError, match=r"raw_logprobs.*--logprobs-mode processed_logprobs"):
        connect(folder, fake)


def test_prompts_are_checked_before_anything_is_asked(folder: str, fake: FakeServer) -> None:
    engine = connect(folder, fake)
    with pytest.raises(RefusedError, match="prompt 2 has 250 tokens; with 12 new ones it exceeds"):
        engine.generate([[5], [1] * 250], SAMPLING)
    with pytest.raises(RefusedError, match="prompt 1 is empty"):
        asyncio.run(engine.complete([], SAMPLING))
    assert "/v1/completions" not in fake.paths()
    engine.close()


# -- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(folder: str) -> Iterator[ServerProcess]:
    pytest.importorskip("vllm", reason="vLLM is not installed: see Versions in CONTRIBUTING.md")
    extra = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    with ServerProcess(folder, extra=extra, kv_cache_gib=0.05) as server:
        server.wait_until_healthy(300.0)
        yield server


def build_learner(causal_lm: Any) -> Learner:
    return Learner(causal_lm, LearnerOptions(reference="precomputed"), Accelerator(cpu=True), lambda text: None)


def assert_same_logprobs(learner: Learner, found: list[list[Completion]]) -> None:
    for prompt, completions in zip(PROMPTS, found, strict=True):
        expected = learner.logprobs([tuple(completion(prompt, c.token_ids) for c in completions)])[0]
        for each, wanted in zip(completions, expected, strict=True):
            np.testing.assert_allclose(each.logprobs, wanted, atol=1e-4, rtol=0)


def adapted(seed: int) -> Any:
    base = model()
    torch.manual_seed(seed)
    return get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )


@pytest.mark.slow
def test_an_adapter_alone_samples_as_the_learner_scores(
    folder: str, real: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First, for the other tests replace the weights under it, which an adapter must not meet."""
    policies = [build_learner(adapted(seed)) for seed in (1, 2)]
    engine = VLLMServerEngine([real.url], folder, TOKENIZER, adapter=policies[0].causal_lm.peft_config["default"])
    for version, learner in enumerate([*policies, policies[0]], 1):
        engine.sync(learner.weights(), version)
        assert_same_logprobs(learner, engine.generate(PROMPTS, SAMPLING))
    assert len(list(engine._folder.iterdir())) == 1
    engine.sync(policies[1].weights(), 4)
    other = VLLMServerEngine([real.url], folder, TOKENIZER)
    other.sync(model().named_parameters(), 0)
    other.close()
    with pytest.raises(RefusedError, match="has the weights of another run"):
        VLLMServerEngine([real.url], folder, TOKENIZER, adapter=policies[0].causal_lm.peft_config["default"])
    monkeypatch.setattr(vllm_http, "SURE_SECONDS", 0.0)
    with pytest.raises(RunFailedError, match="another run gave"):
        engine.generate(PROMPTS, SAMPLING)
    engine.close()


@pytest.mark.slow
def test_after_sync_log_probs_are_the_learners_and_nothing_comes_from_a_stale_cache(
    folder: str, real: ServerProcess
) -> None:
    engine = VLLMServerEngine([real.url], folder, TOKENIZER)
    for version, causal_lm in enumerate([model(), model(seed=1), adapted(2), model()]):
        learner = build_learner(causal_lm)
        engine.sync(merged_weights(causal_lm, learner.weights()), version)
        found = engine.generate(PROMPTS, replace(SAMPLING, n=2))
        assert found == engine.generate(PROMPTS, replace(SAMPLING, n=2))
        assert_same_logprobs(learner, found)
        assert {c.policy_version for row in found for c in row} == {version}
    engine.close()


@pytest.mark.slow
def test_a_sync_in_the_middle_of_a_completion(folder: str, real: ServerProcess) -> None:
    engine = VLLMServerEngine([real.url], folder, TOKENIZER)
    old, new = build_learner(model()), build_learner(model(seed=1))
    engine.sync(old.weights(), 0)
    sampling = SamplingParams(160, seed=3)

    async def with_sync_on_the_way() -> Completion:
        running = asyncio.create_task(engine.complete(PROMPTS[2], sampling))
        await asyncio.sleep(0.15)
        engine.sync(new.weights(), 1)
        return await running

    torn = asyncio.run(with_sync_on_the_way())
    assert torn.policy_version == 0
    sequence = [(completion(PROMPTS[2], torn.token_ids),)]
    by_old, by_new = (np.abs(np.array(torn.logprobs) - one.logprobs(sequence)[0][0]) < 1e-4 for one in (old, new))
    switch = len(torn.token_ids) if by_old.all() else int(np.argmin(by_old))
    assert by_old[:switch].all()
    assert by_new[switch:].all()
    engine.sync(old.weights(), 2)
    engine.close()


@pytest.mark.slow
def test_a_sleeping_server_samples_nothing_until_it_gets_weights(
    folder: str, real: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own states and endpoints, which are the same on a CPU; only its memory stays where it is."""
    with pytest.raises(RefusedError, match="cannot sleep: it runs without --enable-sleep-mode"):
        VLLMServerEngine([real.url], folder, TOKENIZER, ServerOptions(sleep_mode=True))

    def is_sleeping() -> bool:
        return bool(httpx.get(f"{real.url}/is_sleeping", trust_env=False).json()["is_sleeping"])

    engine = VLLMServerEngine([real.url], folder, TOKENIZER)
    engine.sync(model().named_parameters(), 0)
    before = engine.generate(PROMPTS, SAMPLING)
    monkeypatch.setattr(engine, "options", replace(engine.options, sleep_mode=True))
    engine.sleep()
    assert is_sleeping()
    engine.wake()
    assert not is_sleeping()
    assert engine.generate(PROMPTS, SAMPLING) == before
    engine.sleep()
    learner = build_learner(model(seed=1))
    engine.sync(learner.weights(), 1)
    assert not is_sleeping()
    assert_same_logprobs(learner, engine.generate(PROMPTS, SAMPLING))
    engine.close()


@pytest.mark.slow
def test_weights_that_have_broken_down_are_an_error_and_not_a_low_score(folder: str, real: ServerProcess) -> None:
    engine = VLLMServerEngine([real.url], folder, TOKENIZER)
    engine.sync({name: tensor * torch.nan for name, tensor in model().named_parameters()}, 0)
    with pytest.raises(RunFailedError, match="not finite"):
        engine.generate(PROMPTS, SAMPLING)
    engine.close()


@pytest.mark.slow
def test_z_a_stopped_server_leaves_no_process_behind(real: ServerProcess) -> None:
    """Last, because it ends the server."""
    group = [p for p in psutil.process_iter() if os.getpgid(p.pid) == real._process.pid]
    assert len(group) >= 2
    real.stop()
    assert not psutil.wait_procs(group, timeout=5)[1]


# -- the launcher, with a program in vLLM's place ----------------------------------------------------------------------

STAND_IN = """
import http.server, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
if "--break" in sys.argv:
    sys.exit("no such model")
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which `vllm` is a program with a child that does not heed SIGTERM."""
    for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "vllm/entrypoints/openai/api_server.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "vllm-0.31.0.dist-info").mkdir()
    (tmp_path / "vllm-0.31.0.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.31.0\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "LLMRL_VENV": sys.prefix, "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_launcher_ends_the_server(
    folder: str, stand_in: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    command = [str(ROOT / "launch/vllm_server"), folder, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=stand_in) as launcher:
        assert launcher.stdout is not None
        lines = [launcher.stdout.readline() for _ in range(2)]
        assert lines[1].startswith("ready: http://127.0.0.1:")
        (server,) = psutil.Process(launcher.pid).children()
        (log,) = tmp_path.glob("vllm-*.log")
        assert str(log) in lines[0]
        child = psutil.Process(int(log.read_text(encoding="utf-8").split()[1]))
        launcher.send_signal(number)
        code = launcher.wait(30)
    assert not psutil.wait_procs([server], timeout=10)[1]
    if number != signal.SIGKILL:  # nobody is left then who could end what does not heed SIGTERM
        assert code == 0
        assert not psutil.wait_procs([child], timeout=10)[1]
        assert not log.exists()
    elif child.is_running():
        child.kill()


def test_a_server_that_does_not_start_is_an_error_with_its_last_words(folder: str, stand_in: dict[str, str]) -> None:
    command = [str(ROOT / "launch/vllm_server"), folder, "--port", "0", "--", "--break"]
    ended = subprocess.run(command, capture_output=True, text=True, env=stand_in, timeout=60, check=False)
    assert ended.returncode == 1
    assert "the vLLM server ended with exit code 1" in ended.stderr
    assert "no such model" in ended.stderr


def test_what_cannot_be_started_is_refused(folder: str, fake: FakeServer, stand_in: dict[str, str]) -> None:
    for arguments, message in (
        (["/nowhere"], "/nowhere is not a folder with a model"),
        ([folder, "--port", str(fake.server_address[1])], "is taken"),
    ):
        command = [str(ROOT / "launch/vllm_server"), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=stand_in, timeout=60, check=False)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
