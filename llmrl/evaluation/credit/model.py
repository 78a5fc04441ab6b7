"""A policy, its reference and their tokenizer: the credit of the tokens of given answers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmrl import models
from llmrl.config import ModelKeys
from llmrl.data.faults import RowFault
from llmrl.data.formats import Text
from llmrl.data.tokenization import Encoded, Encoder, check_chat_template, check_vocabulary
from llmrl.errors import RefusedError
from llmrl.evaluation.credit.answer import Credit
from llmrl.evaluation.credit.spans import token_spans
from llmrl.evaluation.implicit import ImplicitReward
from llmrl.learner.loading import (
    is_adapter,
    load_adapted,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    precision,
    stop_token_ids,
)
from llmrl.learner.sequences import Floats, Group, completion

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt and answers to it, all text or all lists of messages (of an answer one, the assistant's).

    extras: arguments for the chat template, such as `tools`.
    """

    prompt: Text
    answers: tuple[Text, ...]
    extras: dict[str, Any] = field(default_factory=dict)


class CreditModel:
    """A policy, its reference and their tokenizer."""

    def __init__(
        self,
        implicit: ImplicitReward,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Iterable[int] = (),
        max_positions: int | None = None,
    ) -> None:
        """`max_positions`: the longest sequence that both models take, where there is a limit."""
        self.implicit, self.tokenizer, self.max_positions = implicit, tokenizer, max_positions
        self.encoder = Encoder(tokenizer, set(stop_token_ids))

    @classmethod
    def load(
        cls,
        model: str,
        reference: str | None = None,
        beta: float = 0.1,
        *,
        tokens_per_microbatch: int = 4096,
        say: Say = lambda text: None,
    ) -> "CreditModel":
        """From folders or hub ids. Without a `reference`, `model` must be a LoRA adapter: its base is the reference
        then, the same weights with the adapter off.

        Raises RefusedError where there is no reference, or where the two do not have the same vocabulary.
        """
        path = _resolved("model", model, say)
        reference_path = None if reference is None else _resolved("reference", reference, say)
        if reference_path is None and not is_adapter(path):
            _named("model", lambda: load_config(path))  # what is not there is no whole model either
            raise RefusedError(
                f"model: {model} is a whole model and there is no reference: what it was trained from is not in it. "
                "Remedy: --reference FOLDER, the model_name_or_path of the run's config.yaml; only a LoRA adapter is "
                "its own reference, with the adapter off"
            )
        tokenizer = load_tokenizer(path)
        _refuse_other_vocabulary(tokenizer, path, reference_path)
        limits = [max_positions(each) for each in (path, reference_path) if each is not None]
        keys = ModelKeys(model_name_or_path=path)
        dtype, _ = precision(keys, "no", say)
        if reference_path is None:
            policy, other = load_adapted(path, keys, dtype, say), None
        else:
            policy, other = load_model(path, keys, dtype, say), load_model(reference_path, keys, dtype, say)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for each in (policy, other):
            if each is not None:
                each.to(device)
        implicit = ImplicitReward(policy, other, beta, tokens_per_microbatch, say)
        return cls(implicit, tokenizer, stop_token_ids(path), min((n for n in limits if n), default=None))

    def encoded(self, questions: Sequence[Question]) -> list[list[Encoded]]:
        """The token ids of each question's answers. Raises RefusedError naming the question (from 1)."""
        return [self._encoded(question, number) for number, question in enumerate(questions, 1)]

    def credits(
        self, questions: Sequence[Question], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[tuple[Credit, ...]]:
        """For each question its answers, token by token. `progress` hears of the questions done, and of how many."""
        encoded = self.encoded(questions)
        scored = self.implicit.logprobs(_groups(encoded), progress)
        return [
            tuple(self._credit(part, *of_both) for part, of_both in zip(parts, group, strict=True))
            for parts, group in zip(encoded, scored, strict=True)
        ]

    def drift(self, questions: Sequence[Question]) -> Floats:
        """`ImplicitReward.drift` at every token of the answers, one after the other."""
        drifts = self.implicit.drift(_groups(self.encoded(questions)))
        return np.concatenate([part for group in drifts for part in group])

    def _encoded(self, question: Question, number: int) -> list[Encoded]:
        prompt, answers = question.prompt, question.answers
        if isinstance(prompt, str):
            (found,) = self.encoder.plain([prompt], [[str(answer) for answer in answers]])
        else:
            check_chat_template(self.tokenizer, f"question {number}")
            spoken = [answer if isinstance(answer, list) else [_assistant(answer)] for answer in answers]
            (rendered,) = self.encoder.rendered([prompt], [spoken], [question.extras])
            if isinstance(rendered, RowFault):
                raise RefusedError(f"question {number}, {rendered}")
            found = rendered
        for place, part in enumerate(found, 1):
            self._check(part, f"question {number}, answer {place}")
        return found

    def _check(self, part: Encoded, where: str) -> None:
        if not part.prompt_ids:
            raise RefusedError(
                f"{where}: the prompt is empty, so that the first token has nothing to be predicted from"
            )
        if len(part.completion_ids) <= part.ends:
            raise RefusedError(f"{where}: empty, there is no token to give credit to; mend or leave out the row")
        length = len(part.prompt_ids) + len(part.completion_ids)
        if self.max_positions and length > self.max_positions:
            raise RefusedError(
                f"{where}: {length} tokens with its prompt, and the model takes {self.max_positions}; shorten it"
            )

    def _credit(self, part: Encoded, logprobs: Floats, reference_logprobs: Floats) -> Credit:
        text, spans = token_spans(self.encoder.decode, part.prompt_ids, part.completion_ids)
        ids = np.array(part.completion_ids, np.int64)
        return Credit(text, ids, spans, logprobs, reference_logprobs, self.implicit.beta, part.ends)


def _groups(encoded: list[list[Encoded]]) -> list[Group]:
    return [tuple(completion(part.prompt_ids, part.completion_ids) for part in parts) for parts in encoded]


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _resolved(key: str, name: str, say: Say) -> str:
    return _named(key, lambda: models.resolve(name, say))


def _named(key: str, work: Callable[[], T]) -> T:
    """What `work` gives; a refusal that names the key of training names this one."""
    try:
        return work()
    except RefusedError as error:
        raise RefusedError(str(error).replace("model_name_or_path", key)) from None


def _refuse_other_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, reference: str | None) -> None:
    """Both models must read the same ids as the same tokens, and embed all of them."""
    check_vocabulary(tokenizer, load_config(path))
    if reference is None:
        return
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(reference).get_vocab()
    different = (token for token in mine | theirs if mine.get(token) != theirs.get(token))
    if shown := list(islice(different, 3)):
        listed = ", ".join(f"{token!r} is {mine.get(token, 'none')} and {theirs.get(token, 'none')}" for token in shown)
        raise RefusedError(
            f"reference: the vocabularies of {path} ({len(mine)} tokens) and {reference} ({len(theirs)}) differ "
            f"({listed}), so their log-probabilities cannot be compared. Remedy: name the model that the policy was "
            "trained from"
        )
    check_vocabulary(tokenizer, load_config(reference))
