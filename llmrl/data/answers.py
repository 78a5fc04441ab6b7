"""Prompts with their answers, tokenised together, and what must hold of their tokens whatever the format."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llmrl.data.faults import RowFault
from llmrl.data.tokenization import Encoded, Encoder


class Request(NamedTuple):
    """A prompt and its answers: texts, or lists of messages with the arguments of their template."""

    prompt: Any
    answers: Sequence[Any]
    extras: dict[str, Any]


def encoded(requests: Sequence[Request], encoder: Encoder) -> list[list[Encoded] | RowFault]:
    """The answers of each request; texts and dialogues each in one go."""
    plain = [i for i, request in enumerate(requests) if isinstance(request.prompt, str)]
    spoken = [i for i, request in enumerate(requests) if not isinstance(request.prompt, str)]

    def parts(indices: list[int]) -> tuple[list[Any], list[Any]]:
        return [requests[i].prompt for i in indices], [requests[i].answers for i in indices]

    extras = [requests[i].extras for i in spoken]
    results = [*encoder.plain(*parts(plain)), *encoder.rendered(*parts(spoken), extras)]
    found = dict(zip((*plain, *spoken), results, strict=True))
    return [found[i] for i in range(len(requests))]


def check_not_empty(encoded: Encoded, prompt_column: str, column: str) -> None:
    """Raises RowFault where there is nothing to predict a first token from, or no token but the end."""
    check_prompt(encoded, prompt_column)
    if len(encoded.completion_ids) <= encoded.ends:
        raise RowFault(column, "an empty completion once it is tokenised; mend or remove the row")


def check_prompt(encoded: Encoded, column: str = "prompt") -> None:
    """Raises RowFault where an answer's first token has nothing to be predicted from."""
    if not encoded.prompt_ids:
        raise RowFault(
            column,
            "empty, and the tokenizer puts no token before an answer, so that its first token has nothing to be "
            "predicted from; give a prompt",
        )
