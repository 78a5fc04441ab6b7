"""Which segments are compared with which: what a row of segments, of pairs or of scored samples becomes.

| data | a comparison is |
|---|---|
| compared segments, preference pairs | the row's two segments, by its label |
| scored segments or samples, `dense` | all of the row's segments, each pair of them by its scores |
| the same, `sparse` | two of the row's segments: the i-th best against the i-th of the lower half, each segment in one |
| scored samples, `across` | two samples of different prompts, each sample in one, by their advantages: the reward less the mean of its prompt's |

Invariants: a comparison is made of a row's scores and its place alone, so that every rank and a resumed run make the
same; ties stay, with label 0.5; samples that find no partner are counted and said.
"""  # noqa: E501

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmrl.data.order import epoch_order
from llmrl.data.preparing import Options, PreparationKeys, Say
from llmrl.data.scored import prepare_scored
from llmrl.data.segment_formats import Format, find_format, refuse_two_formats
from llmrl.data.segments import CONTEXT, Piece, prepare_segments, segments_of
from llmrl.data.splits import train_and_heldout
from llmrl.errors import RefusedError

Mode = Literal["dense", "sparse", "across"]
Place = tuple[int, int]
"""Row and segment in it, from 0."""
ROUNDING = 1e-9
"""Advantages that differ by less, in the largest reward of their rows, are equal: a mean is rounded."""


class Comparison(NamedTuple):
    """Segments by their places, and what is known of each: the label of both, or the rank of its score."""

    places: tuple[Place, ...]
    values: tuple[float, ...]


class Comparisons:
    """Comparisons as rows: `segments` (of each its pieces) and `values`."""

    def __init__(
        self, rows: Dataset, read: Callable[[dict[str, Any]], list[list[Piece]]], comparisons: list[Comparison]
    ) -> None:
        self._rows, self._read, self.comparisons = rows, read, comparisons

    def __len__(self) -> int:
        return len(self.comparisons)

    def __getitem__(self, index: int) -> dict[str, Any]:
        places, values = self.comparisons[index]
        read = {row: self._read(self._rows[row]) for row in {row for row, _ in places}}
        return {"segments": [read[row][segment] for row, segment in places], "values": list(values)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class ComparisonData:
    """What is compared in training, and held out. `value`: whether the values of a comparison are a `label` (0 the
    first is preferred, 1 the second) or `score`s; counts, fingerprint: of the rows."""

    train: Comparisons
    heldout: Comparisons | None
    value: Literal["label", "score"]
    counts: dict[str, int]
    fingerprint: str


def prepare_comparisons(
    config: PreparationKeys, tokenizer: PreTrainedTokenizerBase, say: Say, *, mode: Mode, **options: Unpack[Options]
) -> ComparisonData:
    """Read, check and tokenise rows of any format above, and make comparisons of them.

    mode: of scored rows; those with a label are compared as they stand, and take no mode but dense. Raises RefusedError
    naming source, row, column and remedy.
    """
    rows = options.get("rows") or train_and_heldout(config, say, options.get("dataset"))
    for part in rows:
        if part is not None:
            refuse_two_formats(part.table.column_names, part.where)
    train, options = rows[0], {**options, "rows": rows}
    if "completions" in train.table.column_names:
        scored = prepare_scored(config, tokenizer, say, **options)
        parts = [_made(part, "rewards", _samples_of, mode, say) for part in (scored.train, scored.heldout)]
        return _data(parts, _value(mode), scored.counts, scored.fingerprint)
    format = find_format(train.table.column_names, train.table[0], train.where)
    if mode != "dense":
        _check_mode(mode, format, train.where)
    data = prepare_segments(config, tokenizer, say, **options)
    if format.value == "label":
        parts = [_labelled(part) for part in (data.train, data.heldout)]
        return _data(parts, "label", data.counts, data.fingerprint)
    parts = [_made(part, "values", segments_of, mode, say) for part in (data.train, data.heldout)]
    return _data(parts, _value(mode), data.counts, data.fingerprint)


def _check_mode(mode: Mode, format: Format, where: str) -> None:
    """Refuse a way of comparing, other than dense, that rows of this format do not take."""
    if format.value == "label":
        raise RefusedError(
            f"{where}: comparisons {mode} would be ignored: {format.name} have a label, which says what is compared. "
            "Leave it out, or give data with scores"
        )
    if mode == "across":
        raise RefusedError(
            f"{where}: comparisons across needs samples of a prompt, whose mean "
            "reward is known, and these are scored segments. Give scored samples (`prompt`, `completions`, `rewards`), "
            "or put segments that are to be compared into one row, with advantages as their scores"
        )


def dense(scores: Sequence[Sequence[float]]) -> list[Comparison]:
    """Of each row one: all of its segments, whose values are the ranks of their scores (0 the lowest; equal scores
    have the same), which a float32 tells apart whatever the scores are."""
    return [_whole(row, _ranks(own)) for row, own in enumerate(scores)]


def _whole(row: int, values: Sequence[float]) -> Comparison:
    return Comparison(tuple((row, i) for i in range(len(values))), tuple(values))


def _ranks(scores: Sequence[float]) -> list[float]:
    rank_of = {score: float(rank) for rank, score in enumerate(sorted(set(scores)))}
    return [rank_of[score] for score in scores]


def sparse(scores: Sequence[Sequence[float]]) -> list[Comparison]:
    """Of each row as many as half its segments: by rank, the upper half against the lower. Of an odd number the middle
    one is in none."""
    found = []
    for row, own in enumerate(scores):
        ranked = sorted(range(len(own)), key=lambda i: -own[i])
        half = len(own) // 2
        for better, worse in zip(ranked[:half], ranked[-half:], strict=True):
            found.append(_pair((row, better), (row, worse), own[better], own[worse]))
    return found


def across(rewards: Sequence[Sequence[float]]) -> list[Comparison]:
    """Samples of different rows, drawn at random, by advantage. Samples left over, all of one row, are in none."""
    advantages = [[reward - math.fsum(other / len(own) for other in own) for reward in own] for own in rewards]
    rounding = [ROUNDING * max(map(abs, own)) for own in rewards]
    places = [(row, i) for row, own in enumerate(advantages) for i in range(len(own))]
    waiting: list[Place] = []
    found = []
    for index in epoch_order(len(places), seed=0, epoch=0):
        (row, i) = place = places[index]
        if waiting and waiting[0][0] != row:
            other = waiting.pop()
            equal_within = max(rounding[other[0]], rounding[row])
            found.append(_pair(other, place, advantages[other[0]][other[1]], advantages[row][i], equal_within))
        else:
            waiting.append(place)
    return found


def _pair(
    first: Place, second: Place, first_score: float, second_score: float, equal_within: float = 0.0
) -> Comparison:
    equal = abs(first_score - second_score) <= equal_within
    label = 0.5 if equal else float(second_score > first_score)
    return Comparison((first, second), (label, label))


def _made(
    rows: Dataset | None, column: str, read: Callable[[dict[str, Any]], list[list[Piece]]], mode: Mode, say: Say
) -> Comparisons | None:
    """The comparisons of scored rows."""
    if rows is None:
        return None
    scores = rows[column][:]
    comparisons = {"dense": dense, "sparse": sparse, "across": across}[mode](scores)
    left_out = sum(map(len, scores)) - sum(len(comparison.places) for comparison in comparisons)
    if left_out:
        say(f"data: {left_out} of {sum(map(len, scores))} segments find no partner ({mode}) and are left out")
    if mode != "dense":
        ties = sum(comparison.values[0] == 0.5 for comparison in comparisons)
        say(f"data: {len(comparisons)} comparisons ({mode}), {ties} of them ties")
    return Comparisons(rows, read, comparisons)


def _labelled(rows: Dataset | None) -> Comparisons | None:
    """The two segments of each row."""
    if rows is None:
        return None
    return Comparisons(rows, segments_of, [_whole(row, labels) for row, labels in enumerate(rows["values"][:])])


def _samples_of(row: dict[str, Any]) -> list[list[Piece]]:
    """The samples of a row of ScoredData as segments of one piece."""
    prompt = row["prompt_ids"]
    return [[Piece([*prompt, *ids], [CONTEXT] * len(prompt) + [0] * len(ids))] for ids in row["completion_ids"]]


def _value(mode: Mode) -> Literal["label", "score"]:
    return "score" if mode == "dense" else "label"


def _data(
    parts: Sequence[Comparisons | None], value: Literal["label", "score"], counts: dict[str, int], fingerprint: str
) -> ComparisonData:
    train, heldout = parts
    if not train:
        raise RefusedError(
            "there is nothing to compare: comparisons across needs samples of two prompts and more; give more, or use "
            "comparisons dense"
        )
    return ComparisonData(train, heldout or None, value, counts, fingerprint)
