"""Rows on their way to token ids: what preference pairs, scored samples and segments have in common.

A format says in a `Part` how its rows are read, tokenised and fitted into max_length; all else is here:

    reading = Reading(config, tokenizer, say, COUNTED, **options)
    train, heldout = reading.prepared(lambda rows: _Pairs(reading, rows))
    reading.report("pairs kept")

Invariants: every row of both parts is read before any is tokenised; a row that cannot be used is refused by its file
and number, or dropped and counted; training rows of which none teaches when to stop are refused.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from llmrl.data.faults import RowFault, refusal, sound
from llmrl.data.lengths import LengthKeys, OverlongError
from llmrl.data.mapping import Fingerprint, combined, mapped
from llmrl.data.splits import Rows, SplitKeys, train_and_heldout
from llmrl.data.tokenization import Encoder, check_chat_template
from llmrl.errors import RefusedError

Say = Callable[[str], None]

COUNTED = {
    "dropped_faulty": "rows dropped as faulty",
    "dropped_overlong_prompts": "rows dropped because max_length leaves no room for prompt and completion",
    "dropped_overlong_completions": "rows dropped because a completion does not fit into max_length",
    "truncated_completions": "completions cut to fit into max_length; they lose their stop token",
    "truncated_prompts": "prompts cut at their start to fit into max_length",
    "retokenised_boundaries": "completions tokenised apart from their prompt, for a token would span the boundary",
    "rerendered_prompts": "completions put behind the prompt that generation sees, which the chat template writes "
    "differently when an answer follows",
    "without_stop_token": "completions in which the chat template writes no stop token",
}
"""What may happen to a row, in the words of pairs; others add their own and say some of these otherwise."""


class PreparationKeys(SplitKeys, LengthKeys, Protocol):
    """The keys read here; `llmrl.config`'s DataKeys has them."""


class Options(TypedDict, total=False):
    """What every `prepare_` function takes beside the configuration.

    dataset: used instead of `config.dataset_name`; rows: the same, read already, to train on and held out.
    stop_token_ids: where generation stops besides the tokenizer's EOS.
    faulty_rows: what happens to rows that cannot be trained on (an empty completion, say); `drop` counts them.
    """

    dataset: Dataset | DatasetDict | None
    rows: tuple[Rows, Rows | None]
    stop_token_ids: Collection[int]
    faulty_rows: Literal["error", "drop"]


@dataclass(frozen=True)
class Prepared:
    """Rows to train on and held out, with the column `row` (in the source, from 1) beside their format's own.

    heldout: None where there is none. counts: `rows` read, `train_rows` and `heldout_rows` kept, and all that was
    dropped or changed, by the names of COUNTED and of the format's own. fingerprint: of what is trained on and held
    out, in order; no path, name or version goes into it.
    """

    train: Dataset
    heldout: Dataset | None
    counts: dict[str, int]
    fingerprint: str


class Reading:
    """One source with what is said and counted of it. counted: names and words of what may happen to a row."""

    def __init__(
        self,
        keys: PreparationKeys,
        tokenizer: PreTrainedTokenizerBase,
        say: Say,
        counted: Mapping[str, str],
        **options: Unpack[Options],
    ) -> None:
        self.keys, self.say, self.counted = keys, say, counted
        self.train, self.heldout = options.get("rows") or train_and_heldout(keys, say, options.get("dataset"))
        self.encoder = Encoder(tokenizer, options.get("stop_token_ids", ()))
        self.drops_faulty = options.get("faulty_rows") == "drop"
        self.counts: Counter[str] = Counter(dict.fromkeys(("rows", "train_rows", "heldout_rows", *counted), 0))
        self.fingerprint = ""

    def prepared(self, part_of: "Callable[[Rows], Part[Any, Any]]") -> tuple[Dataset, Dataset | None]:
        """The rows to train on and those held out, as token ids; None where none is held out or left."""
        parts = [part_of(rows) for rows in (self.train, self.heldout) if rows is not None]
        read = [part.sound() for part in parts]
        tables = []
        for part, rows, name in zip(parts, read, ("train_rows", "heldout_rows"), strict=False):
            table = part.tokenised(rows)
            self.counts.update({"rows": len(part.rows), name: len(table)})
            if part is parts[0]:
                part.check_training(table)
                self._say_plain(part)
            tables.append(table)
        self.fingerprint = combined([part.fingerprint for part in parts])
        return tables[0], tables[1] if len(tables) > 1 and len(tables[1]) else None

    def changes(self) -> str:
        """What was dropped and changed, in words."""
        return "; ".join(f"{self.counts[name]} {words}" for name, words in self.counted.items() if self.counts[name])

    def report(self, kept: str) -> None:
        """Say what became of the rows; kept: of what and how, `pairs kept`."""
        counts = self.counts
        heldout = f" and {counts['heldout_rows']} held out" if counts["heldout_rows"] else ""
        self.say(
            f"data: {counts['train_rows'] + counts['heldout_rows']} of {counts['rows']} {kept}, "
            f"{counts['train_rows']} to train on{heldout}: " + (self.changes() or "none dropped, none cut")
        )

    def _say_plain(self, part: "Part[Any, Any]") -> None:
        if part.noun and part.plain and self.encoder.tokenizer.chat_template:
            self.say(f"data: {part.plain} {part.noun} are text and no messages: taken as it stands, without a template")


class ReadRow(Protocol):
    """A row as its format reads it."""

    @property
    def conversational(self) -> bool: ...


ReadT = TypeVar("ReadT", bound=ReadRow)
TokensT = TypeVar("TokensT")


class Part(ABC, Generic[ReadT, TokensT]):
    """The rows of one part, to train on or held out, on their way to token ids.

    noun: what rows are called where it is said that they are text; None: it is not. id_columns: lists of ids, which the
    fingerprint covers; others: further columns, by name, as `datasets` features. ended: kept answers that hold their
    stop token, or are not meant to; plain: rows that are text and no messages.
    """

    noun: ClassVar[str | None] = None
    id_columns: Sequence[str]
    others: Mapping[str, Any] = {}

    def __init__(self, reading: Reading, rows: Rows) -> None:
        self.reading, self.rows = reading, rows
        self.keys, self.encoder, self.counts = reading.keys, reading.encoder, reading.counts
        self.fingerprint = Fingerprint()
        self.ended, self.plain = 0, 0

    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The columns that are read; raises RefusedError where one is missing."""

    @abstractmethod
    def read(self, row: dict[str, Any]) -> ReadT:
        """A row of the source; raises RowFault."""

    @abstractmethod
    def tokens(self, rows: list[ReadT]) -> Sequence[TokensT | RowFault]:
        """The tokens of each row."""

    @abstractmethod
    def fitted(self, read: ReadT, tokens: TokensT) -> dict[str, Any]:
        """The columns of a row within max_length, with what was changed counted; raises RowFault and OverlongError."""

    @abstractmethod
    def answer_ids(self, row: dict[str, Any]) -> Sequence[int]:
        """An answer of a prepared row, to show how it ends."""

    def prompt_column(self, read: ReadT) -> str:
        """Where the prompt of a row that is too long stands."""
        return "prompt"

    def note(self, kept: list[dict[str, Any]]) -> None:
        """Add the columns that are no ids to the fingerprint."""

    def sound(self) -> Rows:
        """The rows that can be read; the others are refused together, or dropped."""
        return sound(self.rows.columns(self.columns()), self._check, drop=self.reading.drops_faulty)

    def tokenised(self, rows: Rows) -> Dataset:
        """The token ids of the sound rows that are kept."""
        self.counts["dropped_faulty"] += len(self.rows) - len(rows)
        return mapped(rows, self._batch, self.id_columns, self.others, self.fingerprint)

    def check_training(self, table: Dataset) -> None:
        """Refuse training rows of which none is left, or that would never teach the policy when to stop."""
        where = self.rows.where
        if not len(table):
            changes = self.reading.changes()
            raise RefusedError(f"{where}: empty after checking, all {len(self.rows)} rows were dropped: {changes}")
        if self.ended:
            return
        if self.counts["without_stop_token"]:
            stop_ids = sorted(self.encoder.stop_ids)
            stops = ", ".join(self.encoder.tokenizer.convert_ids_to_tokens(stop_ids)) or "there is none"
            end = self.encoder.decode(self.answer_ids(table[0])[-8:])
            raise RefusedError(
                f"{where}: the chat template never ends an answer with a stop token ({stops}), so the model would not "
                f"learn to stop; an answer ends with {end!r}. Set eos_token in tokenizer_config.json to the token that "
                "ends a turn, or use a template that ends turns with EOS"
            )
        raise RefusedError(
            f"{where}: max_length cuts the end off every completion, so the model would not learn to stop; raise "
            "max_length, or set truncation_mode: drop"
        )

    def _check(self, row: dict[str, Any]) -> None:
        if self.read(row).conversational:
            check_chat_template(self.encoder.tokenizer, self.rows.where)
        else:
            self.plain += 1

    def _batch(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        read = [self.read(row) for row in rows]
        parts = zip(read, self.tokens(read), numbers, strict=True)
        kept = [made for part in parts if (made := self._kept(*part)) is not None]
        self.note(kept)
        return kept

    def _kept(self, read: ReadT, tokens: TokensT | RowFault, number: int) -> dict[str, Any] | None:
        """The row as it is trained on, or None if it is dropped."""
        where = self.rows.where
        try:
            if isinstance(tokens, RowFault):
                raise tokens
            return {**self.fitted(read, tokens), "row": number}
        except RowFault as fault:
            if not self.reading.drops_faulty:
                raise refusal(where, {number: fault}) from None
            self.counts["dropped_faulty"] += 1
        except OverlongError as overlong:
            self.counts[overlong.dropped(self.keys, f"{where}, row {number}", self.prompt_column(read))] += 1
        return None
