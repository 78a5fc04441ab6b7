"""The engine against transformers' own forward and generate, on small random models."""

import asyncio
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.decoders import PROMPTS, STOP, VOCABULARY, Tokenizer, gemma2, gpt2, llama, mpt
from transformers import DynamicCache, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams


def with_lora(model: LlamaForCausalLM) -> torch.nn.Module:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    return adapted


def logprobs_of(model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of a completion from one plain forward without a cache."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def test_a_model_that_keeps_its_past_otherwise_is_refused():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=STOP)
    with pytest.raises(RefusedError, match=r"MambaForCausalLM does not keep its past .* Remedy: engine\.kind vllm"):
        HuggingFaceEngine(MambaForCausalLM(config), Tokenizer()).generate(PROMPTS[:1], SamplingParams(4))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_nan_is_an_error_and_not_a_low_score(temperature):
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RunFailedError, match="not finite"):
        HuggingFaceEngine(model, Tokenizer()).generate(PROMPTS, SamplingParams(4, temperature))


@pytest.mark.parametrize("build", [llama, lambda: llama(kv_heads=4), gpt2, gemma2, mpt, lambda: with_lora(llama())])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_a_plain_forward(build, temperature):
    model = build()
    stops = {STOP, 3, 8, 13, 21}
    sampling = SamplingParams(20, temperature, n=3, seed=7, stop_token_ids=(3, 8, 13, 21))
    found = HuggingFaceEngine(model, Tokenizer()).generate(PROMPTS, sampling)
    lengths = set()
    for prompt, completions in zip(PROMPTS, found, strict=True):
        assert len(completions) == 3
        for completion in completions:
            expected = logprobs_of(model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
            assert (completion.token_ids[-1] in stops) == (completion.finish_reason == "stop")
            assert not stops & set(completion.token_ids[:-1])
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 20
            lengths.add(len(completion.token_ids))
    assert len(lengths) > 2, "rows that end at different steps are what the batch handling is for"


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, lambda: with_lora(llama())])
def test_greedy_is_transformers_generate(build):
    model = build().eval()
    found = HuggingFaceEngine(model, Tokenizer()).generate(PROMPTS, SamplingParams(16, temperature=0))
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        expected = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", [{"max_rows": 1}, {"max_rows": 5}, {"max_cache_tokens": 60}])
def test_a_sample_does_not_depend_on_its_company(options):
    model = llama()
    sampling = SamplingParams(20, n=3, seed=3)
    together = HuggingFaceEngine(model, Tokenizer()).generate(PROMPTS, sampling)
    apart = HuggingFaceEngine(model, Tokenizer(), **options).generate(PROMPTS, sampling)
    ids = [[c.token_ids for c in completions] for completions in together]
    assert ids == [[c.token_ids for c in completions] for completions in apart]
    other = HuggingFaceEngine(model, Tokenizer()).generate(PROMPTS, SamplingParams(20, n=3, seed=4))
    assert ids != [[c.token_ids for c in completions] for completions in other]
    assert len({tuple(c.token_ids) for c in together[0]}) == 3


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = with_lora(llama()).train()
    model.base_model.model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.get_base_model().config._attn_implementation
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    HuggingFaceEngine(model, Tokenizer()).generate(PROMPTS, SamplingParams(8, n=2))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.get_base_model().config._attn_implementation == attention
    after = model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_failure_restores_the_model_too():
    model = with_lora(llama()).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(IndexError):
        HuggingFaceEngine(model, Tokenizer()).generate([[VOCABULARY + 5]], SamplingParams(4))
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_sleeping_engine_holds_no_cache_and_samples_as_before_when_it_is_woken_or_synchronised():
    engine = HuggingFaceEngine(llama(), Tokenizer())
    before = engine.generate(PROMPTS, SamplingParams(8, n=2))

    async def sleeps_in_the_middle() -> None:
        running = asyncio.create_task(engine.complete(PROMPTS[0], SamplingParams(6)))
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(RunFailedError, match="completions are under way"):
            engine.sleep()
        await running

    asyncio.run(sleeps_in_the_middle())
    engine.sleep()
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, DynamicCache)]
    with pytest.raises(RunFailedError, match="the engine sleeps"):
        engine.generate(PROMPTS, SamplingParams(8))
    engine.wake()
    assert engine.generate(PROMPTS, SamplingParams(8, n=2)) == before
    engine.sleep()
    engine.sync((), 0)
    assert engine.generate(PROMPTS, SamplingParams(8, n=2)) == before


def test_end_tokens_of_tokenizer_generation_configuration_and_caller():
    model = llama()
    model.generation_config.eos_token_id = [3, 4]
    engine = HuggingFaceEngine(model, Tokenizer())
    assert engine.stop_token_ids(SamplingParams(4, stop_token_ids=(9,))) == {2, 3, 4, 9}
    everything = tuple(range(VOCABULARY))
    for (completion,) in engine.generate(PROMPTS, SamplingParams(6, stop_token_ids=everything)):
        assert len(completion.token_ids) == 1
        assert completion.finish_reason == "stop"


def test_sampled_frequencies_are_the_distribution():
    model = llama()
    prompt, temperature, count = [5, 6, 7], 0.8, 4000
    (found,) = HuggingFaceEngine(model, Tokenizer(), max_rows=count).generate(
        [prompt], SamplingParams(1, temperature, n=count)
    )
    with torch.no_grad():
        expected = (model.eval()(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=VOCABULARY)
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((counts / count - expected).abs() < 4.5 * error + 1 / count).all())


def test_what_cannot_be_continued_is_refused():
    engine = HuggingFaceEngine(llama(), Tokenizer())
    with pytest.raises(RefusedError, match="prompt 2 is empty"):
        engine.generate([[5], []], SamplingParams(4))
    with pytest.raises(RefusedError, match=r"prompt 1 has 100 tokens; with 30 new ones .* 128 positions"):
        engine.generate([[5] * 100], SamplingParams(30))


def test_no_prompts_give_no_completions():
    assert HuggingFaceEngine(llama(), Tokenizer()).generate([], SamplingParams(4)) == []
