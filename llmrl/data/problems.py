"""Problems with known answers, as prompts that a model is to answer."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Protocol

from datasets import Dataset, DatasetDict, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.asking import Asking
from llmrl.data.columns import MEND, missing
from llmrl.data.faults import RowFault, sound
from llmrl.data.formats import Text
from llmrl.data.mapping import mapped
from llmrl.data.messages import kind_of
from llmrl.data.sources import find_source
from llmrl.data.splits import whole
from llmrl.data.tokenization import Encoder


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
    problems = _Problems(keys, Asking(Encoder(tokenizer), rows.where))
    chosen = sound(rows.select(range(min(len(rows), keys.limit or len(rows)))), problems.read)
    prepared = mapped(chosen, problems.batch, ("prompt_ids",), {"prompt": Value("string"), "answer": Value("string")})
    say(f"data: {rows.where}: {len(prepared)} of {len(rows)} problems to answer")
    return prepared


class _Problems:
    """Reading and rendering of the rows of one source."""

    def __init__(self, keys: ProblemKeys, asking: Asking) -> None:
        self.keys, self.asking = keys, asking

    def read(self, row: dict[str, Any]) -> tuple[Text, str]:
        """(prompt, answer) of a row; raises RowFault."""
        prompt = self.asking.read(row, self.keys.prompt_column)
        answer = row[self.keys.answer_column]
        if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
            given = "empty" if isinstance(answer, str) else kind_of(answer)
            raise RowFault(self.keys.answer_column, f"{given} where text or a number is expected; {MEND}")
        # Written out in digits, as people write an answer: never 1e-05.
        return prompt, format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer)

    def batch(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        """Token ids, text and answer of each row."""
        problems = [self.read(row) for row in rows]
        ids = self.asking.ids([prompt for prompt, _ in problems], rows, numbers)
        return [
            {"prompt_ids": prompt_ids, "prompt": _shown(prompt), "answer": answer, "row": number}
            for prompt_ids, (prompt, answer), number in zip(ids, problems, numbers, strict=True)
        ]


def _shown(prompt: Text) -> str:
    """What was asked, for a reader: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
