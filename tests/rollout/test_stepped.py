"""Many callers on one engine: joining late, leaving early, failing together."""

import asyncio
from dataclasses import replace

import pytest
import torch
from support.decoders import PROMPTS, Tokenizer, gemma2, gpt2, llama, mpt

from llmrl.errors import RunFailedError
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import Completion, SamplingParams, row_seed

SAMPLING = SamplingParams(12, temperature=1.0, seed=3)


async def late(engine: HuggingFaceEngine, prompt: list[int], sampling: SamplingParams, wait: int) -> Completion:
    for _ in range(wait):
        await asyncio.sleep(0)
    return await engine.complete(prompt, sampling)


@pytest.mark.parametrize("model", [llama, gpt2, gemma2, mpt])
@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_whoever_joins_late_gets_what_he_would_get_alone(model, max_rows: int) -> None:
    lm = model()
    alone = HuggingFaceEngine(lm, Tokenizer()).generate(PROMPTS, replace(SAMPLING, n=3))
    engine = HuggingFaceEngine(lm, Tokenizer(), max_rows=max_rows)

    async def all_of_them() -> list[Completion]:
        rows = [(p, s) for s in range(3) for p in range(len(PROMPTS))]
        seeds = [replace(SAMPLING, seed=row_seed(SAMPLING.seed, p, s)) for p, s in rows]
        waits = [7 * i % 5 + i for i in range(len(rows))]
        return await asyncio.gather(
            *(late(engine, PROMPTS[p], seed, wait) for (p, _), seed, wait in zip(rows, seeds, waits, strict=True))
        )

    together = asyncio.run(all_of_them())
    expected = [alone[p][s] for s in range(3) for p in range(len(PROMPTS))]
    for found, wanted in zip(together, expected, strict=True):
        assert found.token_ids == wanted.token_ids
        assert found.finish_reason == wanted.finish_reason
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(wanted.logprobs), atol=1e-5, rtol=0)


def test_events_come_in_the_same_order_every_time() -> None:
    """Callers that never wait for anything else make the same batches, so log-probabilities agree to the bit."""

    async def chat(engine: HuggingFaceEngine, prompt: list[int], seed: int) -> list[Completion]:
        turns = []
        for turn in range(3):
            turns.append(await engine.complete(prompt, SamplingParams(2 + seed % 4, seed=seed + turn)))
            prompt = [*prompt, *turns[-1].token_ids, 7]
        return turns

    async def everyone(engine: HuggingFaceEngine) -> list[list[Completion]]:
        return await asyncio.gather(*(chat(engine, PROMPTS[i % 4], 10 * i) for i in range(9)))

    lm = llama()
    first, second = (asyncio.run(everyone(HuggingFaceEngine(lm, Tokenizer(), max_rows=5))) for _ in range(2))
    assert first == second


def test_who_is_cancelled_leaves_and_the_others_go_on() -> None:
    engine = HuggingFaceEngine(llama(), Tokenizer(), max_rows=2)

    async def some_give_up() -> list[Completion | BaseException]:
        tasks = [asyncio.create_task(engine.complete(p, replace(SAMPLING, max_tokens=40))) for p in PROMPTS]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(some_give_up())
    assert [isinstance(f, asyncio.CancelledError) for f in found] == [True, False, False, True]
    assert engine._batch is None
    assert not engine._waiting


def test_a_failing_step_reaches_every_caller_and_the_engine_can_be_used_again() -> None:
    lm = llama()
    engine = HuggingFaceEngine(lm, Tokenizer())
    sound = lm.lm_head.weight.detach().clone()
    with torch.no_grad():
        lm.lm_head.weight.fill_(float("nan"))

    async def everyone() -> list[Completion | BaseException]:
        return await asyncio.gather(*(engine.complete(p, SAMPLING) for p in PROMPTS), return_exceptions=True)

    assert all(isinstance(f, RunFailedError) for f in asyncio.run(everyone()))
    with pytest.raises(RunFailedError):
        engine.generate(PROMPTS, SAMPLING)
    with torch.no_grad():
        lm.lm_head.weight.copy_(sound)
    assert all(isinstance(f, Completion) for f in asyncio.run(everyone()))
    assert len(engine.generate(PROMPTS, SAMPLING)) == len(PROMPTS)


def test_completions_carry_the_version_they_were_begun_with() -> None:
    engine = HuggingFaceEngine(llama(), Tokenizer())
    engine.sync([], 7)
    assert {c.policy_version for (c,) in engine.generate(PROMPTS, SAMPLING)} == {7}
