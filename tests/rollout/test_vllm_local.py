"""vLLM's real CPU engine in this process, against the learner's own log-probabilities, on small random models."""

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from support.models import make_tiny_model

from llmrl.errors import RefusedError, RunFailedError
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import completion
from llmrl.rollout.protocol import Completion, SamplingParams
from llmrl.rollout.vllm_local import VLLMEngine, VLLMOptions
from llmrl.rollout.vllm_weights import merged_weights

pytest.importorskip("vllm", reason="vLLM is not installed: see Versions in CONTRIBUTING.md")
pytestmark = pytest.mark.slow

TOKENIZER: Any = SimpleNamespace(eos_token_id=2)
OPTIONS = VLLMOptions(kv_cache_gib=0.05)
PROMPTS = [[5, 6, 7, 8], [9] * 3, list(range(3, 90)), [*range(3, 80), 11]]
SAMPLING = SamplingParams(12, seed=7)


def model(tied: bool = False, seed: int = 0) -> Any:
    return make_tiny_model(seed=seed, head_dim=32, tie_word_embeddings=tied)


def build_learner(causal_lm: Any, temperature: float = 1.0) -> Learner:
    options = LearnerOptions(reference="precomputed", temperature=temperature)
    return Learner(causal_lm, options, Accelerator(cpu=True), lambda text: None)


def assert_same_logprobs(learner: Learner, found: list[list[Completion]], prompts: Sequence[Sequence[int]]) -> None:
    for prompt, completions in zip(prompts, found, strict=True):
        expected = learner.logprobs([tuple(completion(prompt, c.token_ids) for c in completions)])[0]
        for each, wanted in zip(completions, expected, strict=True):
            np.testing.assert_allclose(each.logprobs, wanted, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Whether the head is tied -> a folder with the model of seed 0."""
    made = {}
    for tied in (True, False):
        made[tied] = str(tmp_path_factory.mktemp("model"))
        model(tied).save_pretrained(made[tied])
    return made


@pytest.fixture(scope="module")
def shared_engine(folders: dict[bool, str]) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(folders[False], TOKENIZER, OPTIONS)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: VLLMEngine) -> VLLMEngine:
    """One engine for all tests, with the weights of seed 0 and version 0 whatever the test before has done."""
    shared_engine.sync(model().state_dict(), 0)
    return shared_engine


@pytest.mark.parametrize("tied", [False, True])
def test_after_sync_log_probs_are_the_learners_and_nothing_comes_from_a_stale_cache(
    tied: bool, folders: dict[bool, str]
) -> None:
    engine = VLLMEngine(folders[tied], TOKENIZER, OPTIONS)
    sampling = replace(SAMPLING, n=2)
    before = engine.generate(PROMPTS, sampling)
    assert_same_logprobs(build_learner(model(tied)), before, PROMPTS)

    learner = build_learner(model(tied, seed=1))
    engine.sync(learner.weights(), 1)
    after = engine.generate(PROMPTS, sampling)
    assert_same_logprobs(learner, after, PROMPTS)
    assert after != before
    assert {c.policy_version for row in before for c in row} == {0}
    assert {c.policy_version for row in after for c in row} == {engine.policy_version} == {1}
    engine.close()


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_log_probs_are_those_after_temperature(engine: VLLMEngine, temperature: float) -> None:
    found = engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature))
    assert_same_logprobs(build_learner(model(), temperature), found, PROMPTS)


def test_greedy_takes_the_likeliest_token_and_scores_it_at_temperature_1(engine: VLLMEngine) -> None:
    found = engine.generate(PROMPTS, replace(SAMPLING, temperature=0.0))
    assert_same_logprobs(build_learner(model()), found, PROMPTS)
    with torch.no_grad():
        for prompt, (each,) in zip(PROMPTS, found, strict=True):
            logits = model()(torch.tensor([prompt + each.token_ids])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == each.token_ids


def test_a_sample_does_not_depend_on_its_company(engine: VLLMEngine) -> None:
    together = engine.generate(PROMPTS, replace(SAMPLING, n=3))
    assert engine.generate(PROMPTS, replace(SAMPLING, n=3)) == together
    alone = [
        [asyncio.run(engine.complete(prompt, replace(SAMPLING, seed=c.seed))) for c in completions]
        for prompt, completions in zip(PROMPTS, together, strict=True)
    ]
    assert alone == together
    assert len({tuple(c.token_ids) for row in together for c in row}) == 12


def test_more_prompts_than_one_step_takes_are_not_computed_in_parts(engine: VLLMEngine) -> None:
    """With a seed that would be an error; 60 x 87 tokens are more than the 4096 of a step."""
    prompts = [[3 + i, *PROMPTS[2][1:]] for i in range(60)]
    found = engine.generate(prompts, SamplingParams(2, seed=1))
    assert_same_logprobs(build_learner(model()), found, prompts)


def test_callers_come_and_go_between_steps(engine: VLLMEngine) -> None:
    lengths = [3, 20, 7, 15, 1, 9]

    async def wait_and_complete(number: int) -> Completion:
        for _ in range(3 * number):
            await asyncio.sleep(0)
        return await engine.complete(PROMPTS[number % 4], SamplingParams(lengths[number], seed=number))

    async def all_of_them() -> list[Completion]:
        gone = asyncio.create_task(engine.complete(PROMPTS[0], SamplingParams(100, seed=1)))
        tasks = [asyncio.create_task(wait_and_complete(i)) for i in range(6)]
        await tasks[0]
        gone.cancel()
        return [await task for task in tasks]

    found = asyncio.run(all_of_them())
    assert_same_logprobs(build_learner(model()), [[c] for c in found], [PROMPTS[i % 4] for i in range(6)])
    assert all(len(c.token_ids) == n or c.token_ids[-1] == 2 for c, n in zip(found, lengths, strict=True))
    assert not engine._engine.has_unfinished_requests()


def test_end_tokens_are_kept_and_named(engine: VLLMEngine) -> None:
    stops = tuple(range(40, 97))
    found = engine.generate(PROMPTS, replace(SAMPLING, max_tokens=30, n=4, stop_token_ids=stops))
    for each in (c for row in found for c in row):
        ends = [token in stops or token == 2 for token in each.token_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (each.finish_reason == "stop")
        assert each.finish_reason == "stop" or len(each.token_ids) == 30


def test_a_sync_in_the_middle_of_a_completion(engine: VLLMEngine) -> None:
    old, new = build_learner(model()), build_learner(model(seed=1))
    prompt, sampling = PROMPTS[2], SamplingParams(40, seed=3)

    async def with_sync_after_ten_tokens() -> tuple[Completion, Completion]:
        running = asyncio.create_task(engine.complete(prompt, sampling))
        for _ in range(11):
            await asyncio.sleep(0)
        engine.sync(new.weights(), 1)
        return await asyncio.gather(running, engine.complete(prompt, sampling))

    torn, fresh = asyncio.run(with_sync_after_ten_tokens())
    assert (torn.policy_version, fresh.policy_version) == (0, 1)
    assert_same_logprobs(new, [[fresh]], [prompt])
    sequence = [(completion(prompt, torn.token_ids),)]
    by_old, by_new = (np.abs(np.array(torn.logprobs) - one.logprobs(sequence)[0][0]) < 1e-4 for one in (old, new))
    switch = int(np.argmin(by_old))
    assert 5 <= switch <= 15
    assert by_old[:switch].all()
    assert by_new[switch:].all()


def test_the_process_is_left_as_it_was(folders: dict[bool, str]) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),  # type: ignore[index]
            torch.get_num_threads(), torch.set_num_threads, torch.distributed.is_initialized(),
        )  # fmt: skip

    new = model(seed=1).state_dict()
    before = state()
    engine = VLLMEngine(folders[False], TOKENIZER, OPTIONS)
    assert state() == before
    engine.generate(PROMPTS, replace(SAMPLING, n=2))
    engine.sync(new, 1)
    assert state() == before
    engine.close()
    assert state() == before


TWO_RANKS = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from llmrl.rollout.protocol import SamplingParams
from llmrl.rollout.vllm_local import VLLMEngine, VLLMOptions

dist.init_process_group("gloo")
if dist.get_rank() == 0:
    engine = VLLMEngine(sys.argv[1], SimpleNamespace(eos_token_id=2), VLLMOptions(kv_cache_gib=0.05))
    assert len(engine.generate([[5, 6, 7]], SamplingParams(3))) == 1
    engine.close()
total = torch.ones(1)
dist.all_reduce(total)
dist.all_reduce(total, group=dist.new_group([0, 1]))
assert total.item() == 4.0 and dist.get_world_size() == 2
print("all ranks have met")
"""


def test_one_rank_of_a_distributed_run_may_have_an_engine(folders: dict[bool, str], tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*command, str(script), folders[False]], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout.count("all ranks have met") == 2, ended.stderr


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], SAMPLING, "prompt 2 is empty"),
        ([1] * 250, SAMPLING, "prompt 2 has 250 tokens; with 12 new ones it exceeds the engine's 256 tokens"),
        ([1] * 10, SamplingParams(247), "prompt 2 has 10 tokens; with 247 new ones"),
        ([1, 97], SAMPLING, "prompt 2 has a token id outside the model's vocabulary of 97"),
        ([1, -1], SAMPLING, "prompt 2 has a token id outside"),
    ],
)
def test_what_vllm_would_cut_or_choke_on_is_refused_before_anything_is_queued(
    engine: VLLMEngine, prompt: list[int], sampling: SamplingParams, message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        engine.generate([PROMPTS[0], prompt], sampling)
    assert not engine._engine.has_unfinished_requests()
    assert len(engine.generate([[1] * 9], SamplingParams(247, temperature=0))[0][0].token_ids) <= 247


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: {k: v for k, v in weights.items() if k != name}


def with_changed(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: {k: change(v) if k == name else v for k, v in weights.items()}


def that_breaks_off(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights.items():
        if name == "model.layers.1.self_attn.k_proj.weight":
            raise OSError("the gathering broke off")
        yield name, tensor


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(KEY), f"1 of 30 weights did not come, {KEY}"),
        (lambda weights: iter(without(KEY)(weights).items()), f"1 of 30 weights did not come, {KEY}"),
        (with_changed(KEY, lambda w: w[:-1]), "has the shape .63, 32., the engine's model has .64, 32."),
        (lambda weights: iter(with_changed(KEY, lambda w: w.T)(weights).items()), "has the shape .32, 64."),
        (lambda weights: {**weights, "base_model.model.x": weights[KEY]}, "has no weight base_model.model.x.*merged"),
        (lambda weights: [*weights.items(), (KEY, weights[KEY])], "came twice"),
        (that_breaks_off, "the gathering broke off"),
    ],
)
def test_after_a_failed_sync_nothing_is_sampled_until_one_succeeds(
    engine: VLLMEngine, spoil: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    new = model(seed=1)
    with pytest.raises(RunFailedError, match=message):
        engine.sync(spoil(new.state_dict()), 1)
    with pytest.raises(RunFailedError, match="before a sync succeeds"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RunFailedError, match="before a sync succeeds"):
        asyncio.run(engine.complete(PROMPTS[0], SAMPLING))
    engine.sync(new.state_dict(), 2)
    assert_same_logprobs(build_learner(new), engine.generate(PROMPTS, SAMPLING), PROMPTS)


def test_tied_weights_that_differ_are_no_weights_of_this_model(folders: dict[bool, str]) -> None:
    engine = VLLMEngine(folders[True], TOKENIZER, OPTIONS)
    with pytest.raises(RunFailedError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        engine.sync(model(tied=False, seed=1).state_dict(), 1)
    engine.close()


def test_a_failed_step_reaches_every_caller_and_the_engine_goes_on(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(PROMPTS, SAMPLING)
    executor = engine._engine.model_executor
    execute, steps = executor.execute_model, iter(range(100))

    def fail_in_the_fifth_step(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 5:
            raise RuntimeError("out of memory")
        return execute(*args, **kwargs)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(engine.complete(p, SAMPLING) for p in PROMPTS), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "execute_model", fail_in_the_fifth_step)
        found = asyncio.run(all_of_them())
    assert [type(each) for each in found] == [RunFailedError] * 4
    assert "out of memory" in str(found[0])
    assert not engine._engine.has_unfinished_requests()
    assert engine.generate(PROMPTS, SAMPLING) == expected


def test_weights_that_have_broken_down_are_an_error_and_not_a_low_score(engine: VLLMEngine) -> None:
    engine.sync({name: tensor * torch.nan for name, tensor in model().state_dict().items()}, 1)
    with pytest.raises(RunFailedError, match="not finite"):
        engine.generate(PROMPTS, SAMPLING)
    assert not engine._engine.has_unfinished_requests()
    engine.sync(model().state_dict(), 2)
    for _ in range(3):  # NaN keys and values left in the cache's memory would come back
        assert_same_logprobs(build_learner(model()), engine.generate(PROMPTS, SAMPLING), PROMPTS)


def test_a_sleeping_engine_samples_nothing_until_it_is_woken_or_synchronised(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own states and calls, which are the same on a CPU; only its memory stays where it is."""
    before = engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RefusedError, match="not built to sleep"):
        engine.sleep()
    monkeypatch.setattr(engine, "options", replace(engine.options, sleep_mode=True))
    engine.sleep()
    engine.sleep()
    assert engine._engine.is_sleeping()
    with pytest.raises(RunFailedError, match="the engine sleeps"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(RunFailedError, match="the engine sleeps"):
        asyncio.run(engine.complete(PROMPTS[0], SAMPLING))
    engine.wake()
    engine.wake()
    assert engine.generate(PROMPTS, SAMPLING) == before

    async def sleeps_in_the_middle() -> Completion:
        running = asyncio.create_task(engine.complete(PROMPTS[0], SAMPLING))
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(RunFailedError, match="1 completions are under way"):
            engine.sleep()
        return await running

    assert len(asyncio.run(sleeps_in_the_middle()).token_ids) > 0
    engine.sleep()
    engine.sync(model(seed=1).state_dict(), 1)
    assert_same_logprobs(build_learner(model(seed=1)), engine.generate(PROMPTS, SAMPLING), PROMPTS)


def test_an_engine_that_could_not_be_woken_says_so_and_takes_weights_later(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "options", replace(engine.options, sleep_mode=True))
    engine.sleep()

    def no_room(*arguments: Any) -> None:
        raise RuntimeError("CUDA Error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine.model_executor, "wake_up", no_room)
        for attempt in (engine.wake, lambda: engine.sync(model(seed=1).state_dict(), 1)):
            with pytest.raises(RunFailedError, match=r"did not get its memory back.*out of memory.*gpu_memory_util"):
                attempt()
    with pytest.raises(RunFailedError, match="before a sync succeeds"):
        engine.generate(PROMPTS, SAMPLING)
    engine.sync(model(seed=1).state_dict(), 1)
    assert_same_logprobs(build_learner(model(seed=1)), engine.generate(PROMPTS, SAMPLING), PROMPTS)


def test_sleep_is_refused_where_there_is_no_gpu(folders: dict[bool, str]) -> None:
    with pytest.raises(RefusedError, match="on a GPU only"):
        VLLMEngine(folders[False], TOKENIZER, replace(OPTIONS, sleep_mode=True))


def test_heads_that_the_cpu_kernels_do_not_know_are_refused_at_once(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="attention heads are 8 wide"):
        VLLMEngine(str(tmp_path), TOKENIZER, OPTIONS)


# -- adapters --------------------------------------------------------------------------------------------------------


def adapted(seed: int, **settings: Any) -> Any:
    """The model of seed 0 under a LoRA adapter that changes what it says."""
    base = model()
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(base, config)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "modules_to_save": ["lm_head"]}])
def test_a_merged_adapter_samples_as_the_learner_scores(engine: VLLMEngine, settings: dict[str, Any]) -> None:
    learner = build_learner(adapted(1, **settings))
    before = {name: parameter.clone() for name, parameter in learner.causal_lm.named_parameters()}
    engine.sync(merged_weights(learner.causal_lm, learner.weights()), 1)
    assert_same_logprobs(learner, engine.generate(PROMPTS, SAMPLING), PROMPTS)
    assert all(torch.equal(before[name], p) for name, p in learner.causal_lm.named_parameters())


def test_an_adapter_alone_samples_as_the_learner_scores_and_leaves_no_old_one_behind(folders: dict[bool, str]) -> None:
    policies = [build_learner(adapted(seed)) for seed in (1, 2, 3)]
    engine = VLLMEngine(folders[False], TOKENIZER, OPTIONS, adapter=policies[0].causal_lm.peft_config["default"])
    assert_same_logprobs(build_learner(model()), engine.generate(PROMPTS, SAMPLING), PROMPTS)

    async def with_sync_on_the_way() -> Completion:
        running = asyncio.create_task(engine.complete(PROMPTS[2], SamplingParams(40, seed=3)))
        for _ in range(10):
            await asyncio.sleep(0)
        engine.sync(policies[2].weights(), 3)
        return await running

    for version, learner in enumerate(policies[:2], 1):
        engine.sync(learner.weights(), version)
        assert_same_logprobs(learner, engine.generate(PROMPTS, SAMPLING), PROMPTS)
    torn = asyncio.run(with_sync_on_the_way())
    assert torn.policy_version == 2
    assert_same_logprobs(policies[1], [[torn]], [PROMPTS[2]])
    assert_same_logprobs(policies[2], engine.generate(PROMPTS, SAMPLING), PROMPTS)
    engine.sync(policies[0].weights(), 4)
    assert len(list(Path(engine._folder.name).iterdir())) == 1
    with pytest.raises(RunFailedError, match="no adapter weights"):
        engine.sync(model().state_dict(), 5)
    engine.close()
    assert not Path(engine._folder.name).exists()


def test_an_adapter_that_has_broken_down_leaves_nothing_behind(folders: dict[bool, str]) -> None:
    learner = build_learner(adapted(1))
    engine = VLLMEngine(folders[False], TOKENIZER, OPTIONS, adapter=learner.causal_lm.peft_config["default"])
    engine.sync([(name, tensor * torch.nan) for name, tensor in learner.weights()], 1)
    with pytest.raises(RunFailedError, match="not finite"):
        engine.generate(PROMPTS, SAMPLING)
    engine.sync(learner.weights(), 2)
    for _ in range(3):
        assert_same_logprobs(learner, engine.generate(PROMPTS, SAMPLING), PROMPTS)
    assert len(list(Path(engine._folder.name).iterdir())) == 1
    engine.close()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_vllm_cannot_apply_are_refused(folders: dict[bool, str], settings: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="vLLM cannot apply an adapter with"):
        VLLMEngine(folders[False], TOKENIZER, OPTIONS, adapter=adapted(1, **settings).peft_config["default"])
