"""`llmrl credit`: its keys, the rows that it reads, and where its map goes. Loads without torch."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from llmrl.config.keys import Positive, Text
from llmrl.config.steps import AnswerStepKeys
from llmrl.data.steps import Segmenter, segmenter
from llmrl.errors import RefusedError

if TYPE_CHECKING:
    from llmrl.evaluation.credit.model import CreditModel, Question
    from llmrl.evaluation.credit.numbers import Pair


class CreditKeys(AnswerStepKeys):
    """What is looked at, and where the map goes."""

    model: Text
    """The policy: a folder such as runs/dpo-tiny/final, a hub id, `starter` or `smollm2`."""
    reference: Text | None = None
    """What the policy was trained from; not needed where `model` is a LoRA adapter."""
    data: Text
    """Preference pairs: a file (JSONL, Parquet, CSV) or a hub id, in any format that llmrl trains on."""
    rows: list[Positive] = Field(default=[1, 2, 3], min_length=1)
    """Rows of the data, from 1, such as 1,2,3."""
    output: Text | None = None
    """An HTML page to write; without it the map is shown in the terminal."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """The beta that the policy was trained with: what rewards are multiplied by."""
    tokens_per_microbatch: Positive = 4096
    """Tokens in one forward pass: less needs less memory."""


def run(keys: CreditKeys, say: Callable[[str], None]) -> None:
    """Score the rows and show them, or write the page. Raises RefusedError before a model is loaded, where it can."""
    if keys.output is not None:
        _check_output(Path(keys.output))
    split = segmenter(keys)
    questions = read_questions(keys.data, keys.rows)
    _try(split, questions)
    from llmrl.evaluation.credit.model import CreditModel

    model = CreditModel.load(
        keys.model, keys.reference, keys.beta, tokens_per_microbatch=keys.tokens_per_microbatch, say=say
    )
    try:
        model.encoded(questions)
    except RefusedError as error:
        raise RefusedError(_in_the_data(str(error), keys)) from None
    pairs, drift = _pairs(model, questions, keys.rows), model.drift(questions)
    from llmrl.evaluation.credit.numbers import summary

    numbers = summary(pairs, drift)
    if keys.output is not None:
        from llmrl.evaluation.credit.page import page

        _write(Path(keys.output), page(pairs, facts(keys), numbers, split))
        say(keys.output)
        return
    from rich.console import Console

    from llmrl.evaluation.credit.terminal import show
    from llmrl.runs.console import SafeStream

    screen = Console(file=SafeStream(sys.stdout), highlight=False)  # type: ignore[arg-type]
    show(pairs, numbers, split, screen)


def facts(keys: CreditKeys) -> dict[str, str]:
    """What the map was made of."""
    reference = keys.reference or "the model with its adapter off"
    return {"model": keys.model, "reference": reference, "data": keys.data, "beta": f"{keys.beta:g}"}


def read_questions(data: str, rows: Sequence[int]) -> "list[Question]":
    """These rows (from 1) of the data, each as a prompt with its chosen and its rejected answer."""
    from llmrl.data.faults import RowFault, refusal
    from llmrl.data.formats import check_columns, read_pair
    from llmrl.data.sources import load_rows
    from llmrl.evaluation.credit.model import Question

    table = load_rows(data)
    if beyond := [row for row in rows if row > len(table)]:
        raise RefusedError(f"rows: {data} has {len(table)} rows, so there is no row {beyond[0]}; name rows from 1 on")
    check_columns(table.column_names, table[0], data)
    questions = []
    for row in rows:
        try:
            pair = read_pair(table[row - 1])
        except RowFault as fault:
            raise refusal(data, {row: fault}) from None
        questions.append(Question(pair.prompt, (pair.chosen, pair.rejected), pair.extras))
    return questions


def _try(split: Segmenter, questions: "list[Question]") -> None:
    """Divide the answers once as they stand in the data: a function of the user's that fails does so before a model is
    loaded."""
    for question in questions:
        for answer in question.answers:
            split(_as_text(answer))


def _pairs(model: "CreditModel", questions: "list[Question]", rows: Sequence[int]) -> "list[Pair]":
    from llmrl.evaluation.credit.numbers import Pair

    found = model.credits(questions)
    return [
        Pair(row, _as_text(question.prompt), chosen, rejected)
        for row, question, (chosen, rejected) in zip(rows, questions, found, strict=True)
    ]


def _as_text(text: "str | list[dict[str, Any]]") -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in text)


def _in_the_data(message: str, keys: CreditKeys) -> str:
    """What was said of a question, said of its row."""

    def row(match: re.Match[str]) -> str:
        return f"{keys.data}, row {keys.rows[int(match[1]) - 1]}"

    return re.sub(r"^question (\d+)", row, message)


def _check_output(page: Path) -> None:
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise RefusedError(f"output: {page} cannot be written: name a file in a folder that is there")


def _write(page: Path, text: str) -> None:
    from llmrl.files import write_text

    try:
        write_text(page, text)
    except OSError as error:
        raise RefusedError(f"output: {page} cannot be written: {error.strerror or error}") from None
