"""Problems with known answers, as prompts that a model is to answer.

Invariant: a prompt's ids are those of the chat template with its generation prompt (of the plain text, where the
tokenizer has no template), so a model is asked as it was trained.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Protocol

from datasets import Dataset, DatasetDict, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.columns import MEND, missing, read_extras, read_text_or_dialogue
from llmrl.data.faults import RowFault, refusal, sound
from llmrl.data.mapping import mapped
from llmrl.data.messages import Message, kind_of
from llmrl.data.sources import find_source
from llmrl.data.splits import whole
from llmrl.data.tokenization import Encoder, check_chat_template


class ProblemKeys(Protocol):
    """The keys read here; `llmrl.config`'s TaskEvaluationKeys has them."""

    @property
    def dataset_name(self) -> str: ...
    @property
    def dataset_config(self) -> str | None: ...
    @property
    def dataset_test_split(self) -> str: ...
    @property
    def prompt_column(self) -> str: ...
    @property
    def answer_column(self) -> str: ...
    @property
    def limit(self) -> int | None: ...


def prepare_problems(
    keys: ProblemKeys,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
    *,
    dataset: Dataset | DatasetDict | None = None,
) -> Dataset:
    """Problems with columns `prompt_ids` (int32 list), `prompt` (what was asked) and `answer` as text, `row` (from 1).

    The first `limit` rows. A prompt is text or messages; text is one user turn where the tokenizer has a chat template.
    Raises RefusedError naming source, row, column and remedy.
    """
    source = find_source(keys.dataset_name if dataset is None else dataset, keys.dataset_config)
    split = keys.dataset_test_split
    rows = whole(source.rows(split, "task_evaluation.dataset_test_split"), source.names.get(split, ""))
    for name in (keys.prompt_column, keys.answer_column):
        if name not in rows.table.column_names:
            raise missing(name, rows.table.column_names, rows.where)
    problems = _Problems(keys, Encoder(tokenizer), rows.where)
    chosen = sound(rows.select(range(min(len(rows), keys.limit or len(rows)))), problems.read)
    prepared = mapped(chosen, problems.batch, ("prompt_ids",), {"prompt": Value("string"), "answer": Value("string")})
    say(f"data: {rows.where}: {len(prepared)} of {len(rows)} problems to answer")
    return prepared


class _Problems:
    """Reading and rendering of the rows of one source."""

    def __init__(self, keys: ProblemKeys, encoder: Encoder, where: str) -> None:
        self.keys, self.encoder, self.where = keys, encoder, where

    def read(self, row: dict[str, Any]) -> tuple[str | list[Message], str]:
        """(prompt, answer) of a row; raises RowFault."""
        prompt = read_text_or_dialogue(row[self.keys.prompt_column], self.keys.prompt_column)
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise RowFault(self.keys.prompt_column, f"empty; {MEND}")
        if self.encoder.tokenizer.chat_template and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            check_chat_template(self.encoder.tokenizer, self.where)
        answer = row[self.keys.answer_column]
        if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
            given = "empty" if isinstance(answer, str) else kind_of(answer)
            raise RowFault(self.keys.answer_column, f"{given} where text or a number is expected; {MEND}")
        # Written out in digits, as people write an answer: never 1e-05.
        return prompt, format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer)

    def batch(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        """Token ids, text and answer of each row."""
        problems = [self.read(row) for row in rows]
        texts = self._texts([prompt for prompt, _ in problems], rows)
        faults = {number: text for number, text in zip(numbers, texts, strict=True) if isinstance(text, RowFault)}
        if faults:
            raise refusal(self.where, faults)
        ids = self.encoder.ids([str(text) for text in texts])
        start = [] if self.encoder.tokenizer.chat_template else self.encoder.start_ids
        return [
            {"prompt_ids": start + prompt_ids, "prompt": _shown(prompt), "answer": answer, "row": number}
            for prompt_ids, (prompt, answer), number in zip(ids, problems, numbers, strict=True)
        ]

    def _texts(self, prompts: list[str | list[Message]], rows: list[dict[str, Any]]) -> list[str | RowFault]:
        if not self.encoder.tokenizer.chat_template:
            return [prompt for prompt in prompts if isinstance(prompt, str)]
        dialogues = [prompt for prompt in prompts if isinstance(prompt, list)]
        return self.encoder.render([(d, True, read_extras(row)) for d, row in zip(dialogues, rows, strict=True)])


def _shown(prompt: str | list[Message]) -> str:
    """What was asked, for a reader: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
