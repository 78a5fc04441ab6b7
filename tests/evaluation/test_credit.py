"""The credit of an answer's tokens: numbers by hand, spans that match the text, two folders or one adapter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import make_tiny_model
from support.words import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmrl.data.steps import by_delimiter, step_ends
from llmrl.errors import RefusedError
from llmrl.evaluation.credit.answer import Credit
from llmrl.evaluation.credit.model import CreditModel, Question
from llmrl.evaluation.credit.numbers import Scale
from llmrl.evaluation.credit.spans import token_spans

QUESTION = Question("the cat sees", ("a red dog", "one two three four"))
SPOKEN = Question(
    [{"role": "user", "content": "the cat"}],
    ([{"role": "assistant", "content": "likes red"}], [{"role": "assistant", "content": "sees a dog"}]),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy and its reference, an adapter on the reference, and that adapter merged."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("reference", 1)):
        make_tiny_model(seed=seed).save_pretrained(root / name)
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(root / "reference")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    for folder in root.iterdir():
        word_tokenizer().save_pretrained(folder)
    return {folder.name: str(folder) for folder in root.iterdir()}


def test_the_api_is_a_computation_by_hand(folders: dict[str, str]) -> None:
    model = CreditModel.load(folders["policy"], folders["reference"], beta=0.5)
    ((chosen, rejected),) = model.credits([QUESTION])
    tokenizer = word_tokenizer()
    for credit, answer in ((chosen, "a red dog"), (rejected, "one two three four")):
        prompt = tokenizer("the cat sees")["input_ids"]
        ids = prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        assert credit.token_ids.tolist() == ids[len(prompt) :]
        by_hand = []
        for name in ("policy", "reference"):
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folders[name])(torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(ids[1:])[:, None]
            by_hand.append(logits.log_softmax(-1).gather(1, targets)[len(prompt) - 1 :, 0].numpy())
        assert credit.logprobs == pytest.approx(by_hand[0], abs=2e-5)
        assert credit.rewards == pytest.approx(0.5 * (by_hand[0] - by_hand[1]), abs=2e-5)
        assert credit.cumulative == pytest.approx(np.cumsum(credit.rewards), abs=1e-4)
        assert credit.total == pytest.approx(float(credit.cumulative[-1]), abs=1e-4)


def test_an_adapter_needs_no_reference_and_gives_what_two_folders_give(folders: dict[str, str]) -> None:
    own = CreditModel.load(folders["adapter"]).credits([QUESTION, SPOKEN])
    two = CreditModel.load(folders["merged"], folders["reference"]).credits([QUESTION, SPOKEN])
    for ours, theirs in zip(own, two, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.text == b.text
            assert a.rewards == pytest.approx(b.rewards, abs=1e-5)
            assert np.abs(a.rewards).max() > 1e-3
    against_itself = CreditModel.load(folders["reference"], folders["reference"])
    assert not against_itself.credits([QUESTION])[0][0].rewards.any()
    assert np.abs(against_itself.drift([QUESTION])).max() < 1e-6


def test_dialogues_are_rendered_and_their_end_is_scored(folders: dict[str, str]) -> None:
    ((chosen, rejected),) = CreditModel.load(folders["policy"], folders["reference"]).credits([SPOKEN])
    assert chosen.text.split() == ["likes", "red", "<|end|>"]
    assert chosen.ends
    assert len(rejected.spans) == 4


def test_what_cannot_be_scored_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"model: .* is a whole model and there is no reference.*--reference FOLDER"):
        CreditModel.load(folders["policy"])
    with pytest.raises(RefusedError, match=r"^reference: there is no folder \./nowhere"):
        CreditModel.load(folders["policy"], "./nowhere")
    make_tiny_model().save_pretrained(tmp_path)
    other = word_tokenizer()
    other.add_tokens(["purple"])
    other.save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match=r"reference: the vocabularies .* differ \('purple' is none and 23\)"):
        CreditModel.load(folders["policy"], str(tmp_path))
    model = CreditModel.load(folders["policy"], folders["reference"])
    with pytest.raises(RefusedError, match=r"question 2, answer 2: empty, there is no token to give credit to"):
        model.credits([QUESTION, Question("the cat", ("a dog", ""))])
    with pytest.raises(RefusedError, match=r"question 1: .*prompt is empty|question 1, answer 1: the prompt is empty"):
        model.credits([Question("", ("a dog", "red"))])
    with pytest.raises(RefusedError, match=r"question 1, answer 1: 304 tokens with its prompt, .* takes 256"):
        model.credits([Question("the cat sees", ("red " * 300,))])


# -- spans and steps ---------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that most characters beyond ASCII are several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("answer", ["7 + 6 = 13\nAnswer: 13", "naïve 🙂🙂 café", "日本語\n\n終わり", " a", "é"])
def test_spans_cover_the_text_and_a_character_of_several_tokens_is_shared(answer: str) -> None:
    tokenizer = byte_tokenizer()
    prompt, ids = (tokenizer(text)["input_ids"] for text in ("问 x", answer))
    text, spans = token_spans(tokenizer.decode, prompt, ids)
    assert text == answer
    assert len(spans) == len(ids) == len(answer.encode())
    for character in range(len(answer)):
        assert spans.count((character, character + 1)) == len(answer[character].encode())


def test_a_torn_character_at_the_end_keeps_its_place() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab🙂")["input_ids"][:-1]
    text, spans = token_spans(tokenizer.decode, [], ids)
    assert text.startswith("ab")
    assert spans[:2] == [(0, 1), (1, 2)]
    assert spans[2:] == [(2, len(text))] * 3


def test_a_blank_that_a_tokenizer_drops_at_the_beginning_is_kept_in_the_middle() -> None:
    pieces = {1: " the", 2: " cat", 3: " sat"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    assert token_spans(decode, [1], [2, 3]) == (" cat sat", [(0, 4), (4, 8)])


@pytest.mark.parametrize("delimiter", ["\n", r"\n\n", " ", "🙂", r"\d"])
def test_steps_are_those_that_direct_advantage_trains(delimiter: str) -> None:
    """Of the same ids the same token ends, wherever characters of several tokens, blanks and the ending token lie."""
    tokenizer, draw = byte_tokenizer(), np.random.default_rng(0)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_tokens(["\nAnswer: ", "\n\n", "6\n4", " \n"])
    split = by_delimiter(delimiter)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    several = 0
    for _ in range(60):
        pieces = draw.choice(
            ["12 + 3 = 15", "\n", "\n\n", " ", "🙂", "é", "\nAnswer: ", "6\n4", " \n"], draw.integers(1, 12)
        )
        ids = [*tokenizer("".join(pieces))["input_ids"], tokenizer.eos_token_id]
        text, spans = token_spans(tokenizer.decode, [], ids)
        nothing = np.zeros(len(ids), np.float32)
        steps = Credit(text, np.array(ids), spans, nothing, nothing, 1.0, ends=True).steps(split)
        assert [step.tokens[-1] + 1 for step in steps] == step_ends(ids, split, decode)
        assert "".join(step.text for step in steps) == text
        several += len(steps) > 1
    assert several > 20


def test_step_sums_by_hand() -> None:
    """Tokens 1=|1|\\n2|=3|</s>: the third reaches over the line's end, and is needed to end it."""
    text = "1=1\n2=3</s>"
    spans = [(0, 2), (2, 3), (3, 5), (5, 7), (7, 11)]
    mine = np.array([-1.0, -2.0, -0.5, -4.0, -0.25], np.float32)
    theirs = np.array([-2.0, -1.0, -1.0, -1.0, -0.75], np.float32)
    credit = Credit(text, np.arange(5), spans, mine, theirs, 0.5, ends=True)
    assert credit.rewards.tolist() == [0.5, -0.5, 0.25, -1.5, 0.25]
    first, second = credit.steps()
    assert (first.text, first.tokens.tolist(), first.reward) == ("1=1\n2", [0, 1, 2], 0.25)
    assert first.mean == pytest.approx(0.25 / 3)
    assert (second.text, second.tokens.tolist(), second.reward) == ("=3</s>", [3, 4], -1.25)
    assert (second.logprob, second.reference_logprob) == (-4.25, -1.75)
    assert (Scale(1.0, 2).lowest([first, second]), Scale(1.0, 2).lowest([first])) == (1, None)
    assert sum(step.reward for step in credit.steps(by_delimiter("="))) == pytest.approx(credit.total)
