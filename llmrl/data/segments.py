"""Segments of behaviour as token ids, with what says which of them is preferred.

Invariants: what is scored are the tokens that the policy chose, the stop token of each of its turns included; what
users, tools and the chat template wrote is context. A turn is tokenised behind the very prompt that the policy would
see there; where that prompt does not begin with the ids so far (a template that rewrites earlier turns), a new piece
begins, so that no id is ever edited. No segment is empty, no piece longer than `max_length`; whatever was dropped, cut
or made in an unusual way is counted and said; the same data, tokenizer and keys give the same rows and fingerprint.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from datasets import Dataset, DatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.faults import RowFault, refusal, sound
from llmrl.data.lengths import LengthKeys, OverlongError, fit
from llmrl.data.mapping import Fingerprint, combined, mapped
from llmrl.data.preferences import check_training
from llmrl.data.segment_formats import Comparable, Format, Segment, find_format
from llmrl.data.splits import Rows, SplitKeys, train_and_heldout
from llmrl.data.tokenization import Encoded, Encoder, check_chat_template
from llmrl.errors import RefusedError

Say = Callable[[str], None]

CONTEXT = -1
ID_COLUMNS = ("token_ids", "turns", "piece_lengths", "piece_counts")
COUNTED = {
    "dropped_faulty": "rows dropped as faulty",
    "dropped_overlong_prompts": "rows dropped because max_length leaves no room for a prompt and what follows",
    "dropped_overlong_completions": "rows dropped because a segment does not fit into max_length",
    "truncated_completions": "segments cut at their end to fit into max_length; they lose their stop token",
    "truncated_prompts": "prompts cut at their start to fit into max_length",
    "retokenised_boundaries": "turns tokenised apart from their prompt, for a token would span the boundary",
    "rerendered_prompts": "turns put behind the prompt that generation sees, which the chat template writes "
    "differently when an answer follows",
    "rewritten_histories": "turns before which the chat template rewrites what was said: each begins a new piece",
    "without_stop_token": "segments after which the chat template writes no stop token",
    "open_ends": "segments cut out of longer turns (ends: false), which get no stop token",
}


class SegmentKeys(SplitKeys, LengthKeys, Protocol):
    """The keys read here; `llmrl.config`'s DataKeys has them."""


class Piece(NamedTuple):
    """A run of ids in which every turn follows what stood before. turns: of each token the number of its turn in the
    segment, from 0; CONTEXT where it is not the policy's."""

    token_ids: list[int]
    turns: list[int]

    @property
    def prompt_length(self) -> int:
        """Tokens before the policy's first."""
        return next(index for index, turn in enumerate(self.turns) if turn != CONTEXT)


@dataclass(frozen=True)
class SegmentData:
    """Rows of two and more segments, to train on and held out. `segments_of` gives a row's segments.

    train, heldout: ID_COLUMNS, `values` (a number for each segment: see `format`) and `row` (in the source, from 1).
    format: how the rows were written; its `value` says whether values are labels or scores. counts: `rows` read,
    `train_rows` and `heldout_rows` kept, and COUNTED. fingerprint: of ids and values; no path or name goes into it.
    """

    train: Dataset
    heldout: Dataset | None
    format: Format
    counts: dict[str, int]
    fingerprint: str


def segments_of(row: dict[str, Any]) -> list[list[Piece]]:
    """The pieces of each segment of a prepared row."""
    pieces, start = [], 0
    for length in row["piece_lengths"]:
        end = start + length
        pieces.append(Piece(row["token_ids"][start:end], row["turns"][start:end]))
        start = end
    each = iter(pieces)
    return [[next(each) for _ in range(count)] for count in row["piece_counts"]]


def prepare_segments(
    config: SegmentKeys,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    dataset: Dataset | DatasetDict | None = None,
    stop_token_ids: Collection[int] = (),
    faulty_rows: Literal["error", "drop"] = "error",
) -> SegmentData:
    """Read, check, render and tokenise segments (formats: `llmrl.data.segment_formats`); see `prepare_preferences`.

    Raises RefusedError naming source, row, column and remedy.
    """
    parts = [rows for rows in train_and_heldout(config, say, dataset) if rows is not None]
    found = [find_format(rows.table.column_names, rows.table[0], rows.where) for rows in parts]
    if found[-1] is not found[0]:
        raise RefusedError(
            f"{parts[-1].where}: {found[-1].name}, but {parts[0].where} has {found[0].name}; give both in one format"
        )
    encoder = Encoder(tokenizer, stop_token_ids)
    counts = Counter(dict.fromkeys(("rows", "train_rows", "heldout_rows", *COUNTED), 0))
    prepared, fingerprints = [], []
    for rows, name in zip(parts, ("train_rows", "heldout_rows"), strict=False):
        preparation = _Preparation(config, encoder, found[0], rows.where, faulty_rows == "drop", counts)
        part = mapped(
            preparation.sound(rows),
            preparation.batch,
            ID_COLUMNS,
            {"values": List(Value("float64"))},
            preparation.fingerprint,
        )
        counts.update({"rows": len(rows), name: len(part)})
        if name == "train_rows":
            last_ids = segments_of(part[0])[0][-1].token_ids if len(part) else None
            check_training(rows, last_ids, preparation.sure_to_stop, encoder, counts, _changes(counts))
            if preparation.plain and tokenizer.chat_template:
                say(f"data: {preparation.plain} rows are text and no messages: taken as it stands, without a template")
        prepared.append(part)
        fingerprints.append(preparation.fingerprint)
    _report(counts, found[0], say)
    _report_shared_starts(prepared, say)
    heldout = prepared[1] if len(prepared) > 1 and len(prepared[1]) else None
    return SegmentData(prepared[0], heldout, found[0], dict(counts), combined(fingerprints))


class _Preparation:
    """The rows of one source on their way to token ids. `plain`: rows of text; `sure_to_stop`: kept segments that hold
    their stop token, or are not meant to."""

    def __init__(
        self, keys: SegmentKeys, encoder: Encoder, format: Format, where: str, drops_faulty: bool, counts: Counter[str]
    ) -> None:
        self.keys, self.encoder, self.format, self.where = keys, encoder, format, where
        self.drops_faulty, self.counts, self.fingerprint = drops_faulty, counts, Fingerprint()
        self.plain, self.sure_to_stop = 0, 0

    def sound(self, rows: Rows) -> Rows:
        """The rows that can be compared, read before any is tokenised; others are refused together, or dropped."""
        kept = sound(rows.columns(self.format.columns), self._check, drop=self.drops_faulty)
        self.counts["dropped_faulty"] += len(rows) - len(kept)
        return kept

    def _check(self, row: dict[str, Any]) -> None:
        conversational = [segment.conversational for segment in self.format.read(row).segments]
        if any(conversational):
            check_chat_template(self.encoder.tokenizer, self.where)
        self.plain += not any(conversational)

    def batch(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        """Token ids of the rows that are kept."""
        read = [self.format.read(row) for row in rows]
        taken = iter(_encoded([segment for row in read for segment in row.segments], self.encoder))
        kept = []
        for row, number in zip(read, numbers, strict=True):
            turns = [next(taken) for _ in row.segments]
            if (found := self._kept(row, turns, number)) is not None:
                kept.append(found)
        values = [np.asarray(row["values"], "<f4").view("<i4").tolist() for row in kept]
        self.fingerprint.update("values", values)
        return kept

    def _kept(self, row: Comparable, turns: list[list[Encoded] | RowFault], number: int) -> dict[str, Any] | None:
        """The row as it is trained on, or None if it is dropped."""
        try:
            encoded = [_sound_turns(segment, found) for segment, found in zip(row.segments, turns, strict=True)]
            fitted = self._fitted(row, [_chained(found) for found in encoded])
        except RowFault as fault:
            if not self.drops_faulty:
                raise refusal(self.where, {number: fault}) from None
            self.counts["dropped_faulty"] += 1
            return None
        except OverlongError as overlong:
            column = row.segments[0].places[0]
            self.counts[overlong.dropped(self.keys, f"{self.where}, row {number}", column)] += 1
            return None
        self._count(row, encoded, fitted)
        return _as_columns(fitted) | {"values": list(row.values), "row": number}

    def _fitted(self, row: Comparable, segments: list[list[Piece]]) -> list[list[Piece]]:
        """Each piece cut to max_length; pieces that follow the same prompt keep the same of it."""
        fitted: dict[tuple[int, int], Piece] = {}
        cut = {"truncated_prompts": 0, "truncated_completions": 0}
        for prompt_ids, places in _by_prompt(segments).items():
            pieces = [segments[s][p] for s, p in places]
            fitting = fit(
                list(prompt_ids),
                [piece.token_ids[len(prompt_ids) :] for piece in pieces],
                self.keys.max_length,
                self.keys.truncation_mode,
            )
            cut["truncated_prompts"] += fitting.cut_prompts
            cut["truncated_completions"] += fitting.cut_completions
            for place, piece, ids in zip(places, pieces, fitting.completions, strict=True):
                turns = piece.turns[len(prompt_ids) : len(prompt_ids) + len(ids)]
                fitted[place] = _trimmed(fitting.prompt_ids + ids, [CONTEXT] * len(fitting.prompt_ids) + turns)
        result = [[fitted[s, p] for p in range(len(pieces))] for s, pieces in enumerate(segments)]
        if self.format.value == "label" and result[0] == result[1]:
            when = "cut to max_length (raise it, or set truncation_mode)" if any(cut.values()) else "tokenised"
            first, second = (segment.places[1] for segment in row.segments)
            raise RowFault(second, f"equal to `{first}` once {when}, so neither is preferred; mend or remove the row")
        self.counts.update(cut)
        return result

    def _count(self, row: Comparable, encoded: list[list[Encoded]], fitted: list[list[Piece]]) -> None:
        for segment, turns, pieces in zip(row.segments, encoded, fitted, strict=True):
            self.counts["retokenised_boundaries"] += sum(turn.retokenised for turn in turns)
            self.counts["rerendered_prompts"] += sum(turn.rerendered for turn in turns)
            self.counts["rewritten_histories"] += len(pieces) - 1
            self.counts["open_ends"] += not segment.ends
            self.counts["without_stop_token"] += segment.ends and not turns[-1].ends
            last = turns[-1].completion_ids
            whole = pieces[-1].token_ids[-len(last) :] == last
            self.sure_to_stop += not segment.ends or (turns[-1].ends and whole)


def _encoded(segments: Sequence[Segment], encoder: Encoder) -> list[list[Encoded] | RowFault]:
    """The policy's turns of each segment, each behind its own prompt."""
    encoded: list[list[Encoded] | RowFault] = [[] for _ in segments]
    plain = [i for i, segment in enumerate(segments) if not segment.conversational]
    texts = [(segments[i].prompt, (segments[i].completion,)) for i in plain]
    for i, turn in zip(plain, encoder.plain(*_columns(texts)), strict=True):
        encoded[i] = turn
    owners, requests = [], []
    for i, segment in enumerate(segments):
        if segment.conversational:
            said: Any = segment.completion
            own = [k for k, message in enumerate(said) if message["role"] == "assistant"]
            requests += [([*segment.prompt, *said[:k]], [[said[k]]], segment.extras) for k in own]
            owners += [i] * len(own)
    prompts, answers, extras = _columns(requests, 3)
    for i, found in zip(owners, encoder.rendered(prompts, answers, extras), strict=True):
        known = encoded[i]
        if not isinstance(known, RowFault):
            encoded[i] = found if isinstance(found, RowFault) else [*known, *found]
    return encoded


def _columns(rows: Sequence[tuple[Any, ...]], width: int = 2) -> list[list[Any]]:
    return [[row[k] for row in rows] for k in range(width)]


def _sound_turns(segment: Segment, turns: list[Encoded] | RowFault) -> list[Encoded]:
    """The turns, the last without its stop token where the segment goes on; raises RowFault."""
    if isinstance(turns, RowFault):
        raise RowFault(segment.places[0], str(turns).removeprefix("column `prompt`: "))
    if not turns[0].prompt_ids:
        raise RowFault(
            segment.places[0],
            "empty, and the tokenizer puts no token before an answer, so that its first token has nothing to be "
            "predicted from; give a prompt",
        )
    if any(len(turn.completion_ids) <= turn.ends for turn in turns):
        raise RowFault(segment.places[1], "an empty completion once it is tokenised; mend or remove the row")
    last = turns[-1]
    if not segment.ends and last.ends:
        turns = [*turns[:-1], replace(last, completion_ids=last.completion_ids[:-1], ends=False)]
    return turns


def _chained(turns: list[Encoded]) -> list[Piece]:
    """Turns in one row of ids as long as each prompt begins with what stood before."""
    pieces: list[Piece] = []
    for number, turn in enumerate(turns):
        if pieces and turn.prompt_ids[: len(pieces[-1].token_ids)] == pieces[-1].token_ids:
            before = pieces.pop()
        else:
            before = Piece([], [])
        added = len(turn.prompt_ids) - len(before.token_ids)
        own = [*before.turns, *[CONTEXT] * added, *[number] * len(turn.completion_ids)]
        pieces.append(Piece(turn.prompt_ids + turn.completion_ids, own))
    return pieces


def _by_prompt(segments: list[list[Piece]]) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """(segment, piece) of all pieces by the ids before the policy's first."""
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for s, pieces in enumerate(segments):
        for p, piece in enumerate(pieces):
            found.setdefault(tuple(piece.token_ids[: piece.prompt_length]), []).append((s, p))
    return found


def _trimmed(ids: list[int], turns: list[int]) -> Piece:
    """Without what stands behind the policy's last token."""
    end = max(index for index, turn in enumerate(turns) if turn != CONTEXT) + 1
    return Piece(ids[:end], turns[:end])


def _as_columns(segments: list[list[Piece]]) -> dict[str, list[int]]:
    pieces = [piece for segment in segments for piece in segment]
    return {
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "turns": [turn for piece in pieces for turn in piece.turns],
        "piece_lengths": [len(piece.token_ids) for piece in pieces],
        "piece_counts": [len(segment) for segment in segments],
    }


def _changes(counts: Counter[str]) -> str:
    return "; ".join(f"{counts[name]} {text}" for name, text in COUNTED.items() if counts[name])


def _report(counts: Counter[str], format: Format, say: Say) -> None:
    kept = counts["train_rows"] + counts["heldout_rows"]
    heldout = f" and {counts['heldout_rows']} held out" if counts["heldout_rows"] else ""
    say(
        f"data: {kept} of {counts['rows']} rows of {format.name} kept, {counts['train_rows']} to train on{heldout}: "
        + (_changes(counts) or "none dropped, none cut")
    )


def _report_shared_starts(prepared: list[Dataset], say: Say) -> None:
    """Held-out segments whose start is trained on measure less than they seem to: said, for it may be meant."""
    if len(prepared) < 2:
        return
    trained, heldout = ([_starts(row) for row in part.select_columns([*ID_COLUMNS])] for part in prepared)
    known = {start for starts in trained for start in starts}
    if shared := sum(any(start in known for start in starts) for starts in heldout):
        say(f"data: segments of {shared} of {len(heldout)} held-out rows start where some that are trained on do")


def _starts(row: dict[str, Any]) -> list[int]:
    """A hash of each segment's ids before the policy's first."""
    firsts = [pieces[0] for pieces in segments_of(row)]
    return [hash(tuple(piece.token_ids[: piece.prompt_length])) for piece in firsts]
