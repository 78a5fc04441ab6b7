"""Beam search: against enumeration of every answer, greedy decoding, and transformers' own beam search."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.decoders import PROMPTS, STOP, VOCABULARY, Tokenizer, gemma2, gpt2, llama
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from llmrl.errors import RefusedError, RunFailedError
from llmrl.evaluation.search import BeamSearch, Found
from llmrl.rollout.huggingface import HuggingFaceEngine
from llmrl.rollout.protocol import SamplingParams

FEW, LONGEST = 4, 3
"""Tokens and longest answer of a model whose answers can all be written down."""


def few(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=FEW, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=STOP, bos_token_id=1, pad_token_id=0, initializer_range=0.8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_lora(model: LlamaForCausalLM) -> torch.nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))


def logprob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """log pi of an answer from one plain forward."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())


def every_ended_answer() -> list[list[int]]:
    others = [token for token in range(FEW) if token != STOP]
    starts = [list(start) for n in range(LONGEST) for start in itertools.product(others, repeat=n)]
    return [[*start, STOP] for start in starts]


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_likeliest_of_all_answers(seed: int) -> None:
    model, prompt = few(seed), [1, 3]
    (found,) = BeamSearch(model, FEW**LONGEST, [STOP])([prompt], LONGEST)
    best = max(every_ended_answer(), key=lambda answer: logprob(model, prompt, answer))
    assert (found.token_ids, found.ended) == (best, True)
    assert found.logprob == pytest.approx(logprob(model, prompt, best), abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_by_reward_finds_the_largest_ratio_of_all_answers(seed: int) -> None:
    policy, reference, prompt = few(seed), few(seed + 10), [1, 3]
    width = len(every_ended_answer())  # so that it goes on until all have ended
    search = BeamSearch(policy, width, [STOP], by="reward", reference=reference, plausible=0)
    (found,) = search([prompt], LONGEST)

    def ratio(answer: list[int]) -> float:
        return logprob(policy, prompt, answer) - logprob(reference, prompt, answer)

    best = max(every_ended_answer(), key=ratio)
    assert found.token_ids == best
    assert found.log_ratio == pytest.approx(ratio(best), abs=1e-5)
    assert found.logprob == pytest.approx(logprob(policy, prompt, best), abs=1e-5)


@pytest.mark.parametrize("by", ["likelihood", "reward"])
def test_width_1_is_greedy_decoding(by: str) -> None:
    model, engine = llama(), HuggingFaceEngine(llama(), Tokenizer())
    expected = engine.generate(PROMPTS, SamplingParams(12, temperature=0))
    found = BeamSearch(model, 1, [STOP], by=by, reference=llama(seed=3), plausible=1)(PROMPTS, 12)  # type: ignore[arg-type]
    assert [each.token_ids for each in found] == [completion.token_ids for (completion,) in expected]
    assert [each.logprob for each in found] == pytest.approx([sum(c.logprobs) for (c,) in expected], abs=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
@pytest.mark.parametrize("width", [2, 5])
def test_by_likelihood_it_is_transformers_beam_search(build, width: int) -> None:
    model = build().eval()
    stops = list(range(STOP, 14))
    found = BeamSearch(model, width, stops)(PROMPTS, 10)
    for prompt, ours in zip(PROMPTS, found, strict=True):
        theirs = model.generate(
            input_ids=torch.tensor([prompt]), num_beams=width, do_sample=False, length_penalty=0.0, max_new_tokens=10,
            early_stopping=False, eos_token_id=stops,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert ours.token_ids == theirs[: len(ours.token_ids)]
        assert set(theirs[len(ours.token_ids) :]) <= {0}, "only padding follows"
    assert any(each.ended for each in found)


@pytest.mark.parametrize("by", ["likelihood", "reward"])
def test_a_prompt_does_not_depend_on_its_company(by: str) -> None:
    def search(prompts: list[list[int]], batch: int) -> list[Found]:
        beams = BeamSearch(llama(), 3, [STOP, 5], by=by, reference=llama(seed=3), prompts_per_batch=batch)  # type: ignore[arg-type]
        return beams(prompts, 10)

    together = search(PROMPTS, 4)
    assert [each.token_ids for each in search(PROMPTS, 2)] == [each.token_ids for each in together]
    alone = [search([prompt], 1)[0] for prompt in PROMPTS]
    assert [each.token_ids for each in alone] == [each.token_ids for each in together]
    assert [each.log_ratio for each in alone] == pytest.approx([each.log_ratio for each in together], abs=1e-4)


def test_only_plausible_tokens_are_chosen_by_reward() -> None:
    """Without the constraint the tokens found are such as the policy hardly ever says."""
    policy = llama().eval()
    least = {}
    for plausible in (0.0, 0.3):
        search = BeamSearch(policy, 3, [STOP], by="reward", reference=llama(seed=3), plausible=plausible)
        shares = []
        for prompt, found in zip(PROMPTS, search(PROMPTS, 8), strict=True):
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + found.token_ids])).logits[0, len(prompt) - 1 : -1]
            probabilities = logits.softmax(-1)
            chosen = probabilities.gather(-1, torch.tensor(found.token_ids)[:, None])[:, 0]
            shares += (chosen / probabilities.amax(-1)).tolist()
        least[plausible] = min(shares)
    assert least[0.0] < 0.03
    assert least[0.3] >= 0.3 - 1e-4


class Mute(LlamaForCausalLM):
    """A model that never says some tokens."""

    never: tuple[int, ...] = ()

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        found = super().forward(*args, **kwargs)
        found.logits[..., list(self.never)] = -torch.inf
        return found


def test_what_the_reference_never_says_is_not_chosen() -> None:
    policy = few(0)
    reference = Mute(policy.config).eval()
    reference.load_state_dict(few(1).state_dict())
    (greedy,) = BeamSearch(policy, 1, [])([[1, 3]], 1)
    (likeliest,) = reference.never = tuple(greedy.token_ids)
    (found,) = BeamSearch(policy, 2, [STOP], by="reward", reference=reference, plausible=0)([[1, 3]], 6)
    assert likeliest not in found.token_ids
    assert abs(found.log_ratio) < 100
    with pytest.raises(RunFailedError, match="after 0 tokens of an answer no token can be chosen"):
        BeamSearch(policy, 2, [STOP], by="reward", reference=reference, plausible=1)([[1, 3]], 6)
    broken = few(0)
    with torch.no_grad():
        broken.lm_head.weight[0] = torch.nan
    with pytest.raises(RunFailedError, match="log-probabilities are not finite"):
        BeamSearch(broken, 2, [STOP])([[1, 3]], 6)


def test_the_adapter_off_is_a_reference() -> None:
    own = BeamSearch(with_lora(llama()), 3, [STOP], by="reward")(PROMPTS, 8)
    merged = with_lora(llama()).merge_and_unload()  # type: ignore[operator]
    two = BeamSearch(merged, 3, [STOP], by="reward", reference=llama())(PROMPTS, 8)
    assert [each.token_ids for each in own] == [each.token_ids for each in two]
    assert all(each.log_ratio != 0 for each in own)
    assert [each.log_ratio for each in own] == pytest.approx([each.log_ratio for each in two], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"width": 0}, "width (0) must be a whole number of at least 1"),
        ({"width": 2.5}, "width (2.5) must be a whole number"),
        ({"width": 2, "prompts_per_batch": 0}, "prompts_per_batch (0)"),
        ({"width": 2, "by": "foo"}, "by ('foo') must be one of likelihood, reward"),
        (
            {"width": 2, "by": "reward", "reference": llama()},
            f"the policy has {FEW} tokens and the reference {VOCABULARY}",
        ),
        ({"width": 2, "plausible": 1.5}, "plausible (1.5)"),
        ({"width": 2, "by": "reward"}, "search by reward needs a reference"),
    ],
)
def test_impossible_searches_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(RefusedError) as refused:
        BeamSearch(few(0), stop_token_ids=[STOP], **arguments)
    assert says in str(refused.value)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    search = BeamSearch(few(0), 2, [STOP])
    with pytest.raises(RefusedError, match="prompt 2 is empty"):
        search([[1], []], 4)
    with pytest.raises(RefusedError, match=r"prompt 1 has 13 tokens; with 4 new ones .* model's 16 positions"):
        search([[1] * 13], 4)
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=STOP)
    with pytest.raises(RefusedError, match="MambaForCausalLM does not keep its past"):
        BeamSearch(MambaForCausalLM(config), 2, [STOP])(PROMPTS[:1], 4)
