"""Segments of behaviour as token ids, with what says which of them is preferred.

Invariants: what is scored are the tokens that the policy chose, the stop token of each of its turns included; what
users, tools and the chat template wrote is context. A turn is tokenised behind the very prompt that the policy would
see there; where that prompt does not begin with the ids so far (a template that rewrites earlier turns), a new piece
begins, so that no id is ever edited. No segment is empty, no piece longer than `max_length`; whatever was dropped, cut
or made in an unusual way is counted and said; the same data, tokenizer and keys give the same rows and fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.answers import Request, check_not_empty, encoded
from llmrl.data.faults import RowFault
from llmrl.data.lengths import fit
from llmrl.data.preparing import COUNTED, Options, Part, PreparationKeys, Prepared, Reading, Say
from llmrl.data.segment_formats import Comparable, Format, Segment, find_format
from llmrl.data.splits import Rows
from llmrl.data.tokenization import Encoded, Encoder
from llmrl.errors import RefusedError

CONTEXT = -1
ID_COLUMNS = ("token_ids", "turns", "piece_lengths", "piece_counts")
VALUES = {"values": List(Value("float64"))}
COUNTED_SEGMENTS = COUNTED | {
    "dropped_overlong_prompts": "rows dropped because max_length leaves no room for a prompt and what follows",
    "dropped_overlong_completions": "rows dropped because a segment does not fit into max_length",
    "truncated_completions": "segments cut at their end to fit into max_length; they lose their stop token",
    "retokenised_boundaries": "turns tokenised apart from their prompt, for a token would span the boundary",
    "rerendered_prompts": "turns put behind the prompt that generation sees, which the chat template writes "
    "differently when an answer follows",
    "without_stop_token": "segments after which the chat template writes no stop token",
    "rewritten_histories": "turns before which the chat template rewrites what was said: each begins a new piece",
    "open_ends": "segments cut out of longer turns (ends: false), which get no stop token",
}


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
class SegmentData(Prepared):
    """Rows of two and more segments: ID_COLUMNS and `values`, a number for each segment. `segments_of` gives a row's
    segments.

    format: how the rows were written; its `value` says whether values are labels or scores. fingerprint: also of the
    values.
    """

    format: Format


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
    config: PreparationKeys, tokenizer: PreTrainedTokenizerBase, say: Say, **options: Unpack[Options]
) -> SegmentData:
    """Read, check, render and tokenise segments (formats: `llmrl.data.segment_formats`).

    Raises RefusedError naming source, row, column and remedy.
    """
    reading = Reading(config, tokenizer, say, COUNTED_SEGMENTS, **options)
    parts = [rows for rows in (reading.train, reading.heldout) if rows is not None]
    format, *others = [find_format(rows.table.column_names, rows.table[0], rows.where) for rows in parts]
    if others and others[0] is not format:
        raise RefusedError(
            f"{parts[-1].where}: {others[0].name}, but {parts[0].where} has {format.name}; give both in one format"
        )
    train, heldout = reading.prepared(lambda rows: _Rows(reading, rows, format))
    reading.report(f"rows of {format.name} kept")
    _report_shared_starts(train, heldout, say)
    return SegmentData(train, heldout, dict(reading.counts), reading.fingerprint, format)


class _Rows(Part[Comparable, list[list[Encoded] | RowFault]]):
    """Rows of segments, the tokens of each: of the policy's turns in each segment."""

    noun = "rows"
    id_columns = ID_COLUMNS
    others = VALUES

    def __init__(self, reading: Reading, rows: Rows, format: Format) -> None:
        super().__init__(reading, rows)
        self.format = format

    def columns(self) -> Sequence[str]:
        return self.format.columns

    def read(self, row: dict[str, Any]) -> Comparable:
        return self.format.read(row)

    def tokens(self, rows: list[Comparable]) -> list[list[list[Encoded] | RowFault]]:
        taken = iter(_encoded([segment for row in rows for segment in row.segments], self.encoder))
        return [[next(taken) for _ in row.segments] for row in rows]

    def fitted(self, read: Comparable, tokens: list[list[Encoded] | RowFault]) -> dict[str, Any]:
        turns = [_sound_turns(segment, found) for segment, found in zip(read.segments, tokens, strict=True)]
        fitted = self._fitted(read, [_chained(found) for found in turns])
        self._count(read, turns, fitted)
        return _as_columns(fitted) | {"values": list(read.values)}

    def answer_ids(self, row: dict[str, Any]) -> list[int]:
        return segments_of(row)[0][-1].token_ids

    def prompt_column(self, read: Comparable) -> str:
        return read.segments[0].places[0]

    def note(self, kept: list[dict[str, Any]]) -> None:
        values = [np.asarray(row["values"], "<f4").view("<i4").tolist() for row in kept]
        self.fingerprint.update("values", values)

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
            self.ended += not segment.ends or (turns[-1].ends and whole)


def _encoded(segments: Sequence[Segment], encoder: Encoder) -> list[list[Encoded] | RowFault]:
    """The policy's turns of each segment, each behind its own prompt."""
    requests = [_requests(segment) for segment in segments]
    answers = iter(encoded([request for own in requests for request in own], encoder))
    return [_turns([next(answers) for _ in own]) for own in requests]


def _requests(segment: Segment) -> list[Request]:
    said: Any = segment.completion
    if not segment.conversational:
        return [Request(segment.prompt, [said], segment.extras)]
    own = [k for k, message in enumerate(said) if message["role"] == "assistant"]
    return [Request([*segment.prompt, *said[:k]], [[said[k]]], segment.extras) for k in own]


def _turns(answers: list[list[Encoded] | RowFault]) -> list[Encoded] | RowFault:
    """The only answer to each of a segment's requests, or the first fault."""
    turns: list[Encoded] = []
    for answer in answers:
        if isinstance(answer, RowFault):
            return answer
        turns += answer
    return turns


def _sound_turns(segment: Segment, turns: list[Encoded] | RowFault) -> list[Encoded]:
    """The turns, the last without its stop token where the segment goes on; raises RowFault."""
    if isinstance(turns, RowFault):
        raise RowFault(segment.places[0], str(turns).removeprefix("column `prompt`: "))
    for turn in turns:
        check_not_empty(turn, *segment.places)
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


def _report_shared_starts(train: Dataset, heldout: Dataset | None, say: Say) -> None:
    """Held-out segments whose start is trained on measure less than they seem to: said, for it may be meant."""
    if heldout is None:
        return
    trained, asked = ([_starts(row) for row in part.select_columns([*ID_COLUMNS])] for part in (train, heldout))
    known = {start for starts in trained for start in starts}
    if shared := sum(any(start in known for start in starts) for starts in asked):
        say(f"data: segments of {shared} of {len(asked)} held-out rows start where some that are trained on do")


def _starts(row: dict[str, Any]) -> list[int]:
    """A hash of each segment's ids before the policy's first."""
    firsts = [pieces[0] for pieces in segments_of(row)]
    return [hash(tuple(piece.token_ids[: piece.prompt_length])) for piece in firsts]
