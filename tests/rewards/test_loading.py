"""Functions by name: built in, the user's own, reward models; and what is refused."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_tiny_model
from support.words import WORDS, word_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from llmrl.errors import RefusedError
from llmrl.rewards.functions import RewardFunction
from llmrl.rewards.keys import RewardFunctionKeys
from llmrl.rewards.loading import load
from llmrl.rewards.model import score
from llmrl.rewards.verifiers import Verifiers

POOL = Verifiers()
FILE = """
import asyncio

def length(completions, per=1, **columns):
    return [len(c) / per for c in completions]

async def later(completions, answer):
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answer)]

class Judge:
    async def __call__(self, completions, **columns):
        return [2.0 for _ in completions]

judge = Judge()
NUMBER = 3
"""
ARGUMENTS: dict[str, Any] = {"prompts": ["p"], "completions": ["abc"], "completion_ids": [[1]], "answer": ["abc"]}


def loaded(function: str, options: dict[str, Any] | None = None, said: list[str] | None = None) -> RewardFunction:
    entry = RewardFunctionKeys(function=function, options=options or {})
    return load(entry, POOL, (said if said is not None else []).append)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


def test_functions_of_a_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(f"{file}:length")(**ARGUMENTS) == [3.0]
    assert loaded(f"{file}:length", {"per": 2})(**ARGUMENTS) == [1.5]
    later = loaded(f"{file}:later")
    assert later.needs == (("answer",),)
    assert asyncio.run(later(**ARGUMENTS)) == [1.0]
    assert asyncio.run(loaded(f"{file}:judge")(**ARGUMENTS)) == [2.0]
    assert not later.bounded
    monkeypatch.chdir(file.parent)
    assert loaded("my_rewards.py:length")(**ARGUMENTS) == [3.0]


def test_functions_of_an_installed_module() -> None:
    conversation = {**ARGUMENTS, "completions": [[{"content": "<think>a</think>b"}]]}
    assert loaded("trl.rewards:think_format_reward")(**conversation) == [1.0]


def test_a_function_that_cannot_be_inspected_gets_everything() -> None:
    assert loaded("builtins:dict", {"x": 1})(**ARGUMENTS) == {**ARGUMENTS, "x": 1}


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("acuracy", {}, "no reward function `acuracy`; did you mean `accuracy`"),
        ("nowhere.py:f", {}, "nowhere.py: there is no such file"),
        ("no_such_package.rewards:f", {}, "no_such_package.rewards cannot be imported.*ModuleNotFoundError"),
        ("{file}:lenght", {}, "there is no `lenght` there; did you mean `length`"),
        ("{file}:NUMBER", {}, "NUMBER is int, not a function"),
        ("{file}:later", {"per": 2}, "takes no option `per`; it takes completions, answer"),
        ("{file}:length", {"prompts": 2}, "takes no option `prompts`"),
        ("boxed", {"presnt": 2}, "boxed has no option `presnt`; did you mean `present`"),
    ],
)
def test_refusals(file: Path, function: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        loaded(function.format(file=file), options)


def test_a_file_with_a_mistake_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(RefusedError, match=r"a.py cannot be loaded: .*a.py, line 2: ZeroDivisionError"):
        loaded(f"{tmp_path}/a.py:f")
    (tmp_path / "b.py").write_text("def f(:\n")
    with pytest.raises(RefusedError, match="SyntaxError"):
        loaded(f"{tmp_path}/b.py:f")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained reward model, as recipes/reward leaves it: the model with its head, and the tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    make_tiny_model(eos_token_id=2, max_position_embeddings=32).save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    model.save_pretrained(folder / "final")
    word_tokenizer().save_pretrained(folder / "final")
    word_tokenizer().save_pretrained(folder / "base")
    return str(folder / "final")


def test_a_reward_model_scores_the_tokens_that_it_was_trained_on(classifier: str) -> None:
    function = loaded(classifier, {"batch_size": 2})
    assert function.is_model
    tokenizer = PreTrainedTokenizerFast.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    prompts = [[{"role": "user", "content": text}] for text in ("red cat", "dog", "the cat sees")]
    answers = ["one", "the dog sees a cat", "two"]
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    found = asyncio.run(function(prompts=prompts, completions=completions, completion_ids=[[1]] * 3))
    texts = [
        f"<|start|>user {p[0]['content']}<|end|><|start|>assistant {a}<|end|>"
        for p, a in zip(prompts, answers, strict=True)
    ]
    expected = score(model, tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(found)) == 3
    plain = asyncio.run(function(prompts=["red", "red"], completions=[" cat", " dog"], completion_ids=[[1]] * 2))
    ids = tokenizer(["red cat<|end|>", "red dog<|end|>"], add_special_tokens=False)["input_ids"]
    assert plain == pytest.approx(score(model, ids, tokenizer.pad_token_id).tolist(), abs=1e-5)


def test_what_a_reward_model_cannot_read_has_no_score(classifier: str) -> None:
    long = " ".join(WORDS * 3)
    called: list[dict[str, Any]] = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    found = asyncio.run(loaded(classifier)(prompts=["red"] * 3, completions=[long, called, "cat"]))
    assert [value is None for value in found] == [True, True, False]
    assert asyncio.run(loaded(classifier, {"max_length": 2})(prompts=["red"], completions=["cat"])) == [None]


def test_what_is_no_reward_model_is_refused(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"base is no reward model .* LlamaForCausalLM"):
        loaded(str(Path(classifier).parent / "base"))
    with pytest.raises(RefusedError, match="is no built-in function and no model that can be loaded"):
        loaded(str(tmp_path))
    with pytest.raises(RefusedError, match=r"option `batch_size`.*It takes dtype, batch_size, max_length, wait_"):
        loaded(classifier, {"batch_size": 0})
