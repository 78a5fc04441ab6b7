"""Which characters of a text a token stands for, and which of its steps it belongs to."""

import re
from collections.abc import Callable, Sequence

Span = tuple[int, int]

CONTEXT = 8
"""Tokens decoded in front of the one that is looked at: some tokenizers treat the beginning of a text differently."""
INCOMPLETE = "\ufffd"


def token_spans(
    decode: Callable[[Sequence[int]], str], context_ids: Sequence[int], ids: Sequence[int]
) -> tuple[str, list[Span]]:
    """The text of `ids` behind `context_ids`, and the characters [start, end) of it that each token stands for.

    The spans follow one another and cover the text. Tokens that only together make a character share its span.
    """
    text, spans, held = "", list[Span](), 0
    window = list(context_ids[-CONTEXT:])
    before = decode(window)
    for number, token in enumerate(ids, 1):
        window.append(int(token))
        now = decode(window)
        held += 1
        if now.endswith(INCOMPLETE) and number < len(ids):
            continue
        piece = now[len(before) :]
        spans += [(len(text), len(text) + len(piece))] * held
        text, held = text + piece, 0
        window = window[-CONTEXT:]
        before = decode(window)
    return text, spans


def step_spans(text: str, ends: str) -> list[Span]:
    """The steps of a text: each reaches to the end of a match of the regular expression `ends`, the last to the text's.

    What would be a step of nothing but blanks belongs to the next one, or to the last.
    """
    spans: list[Span] = []
    start = 0
    for end in [*(match.end() for match in re.finditer(ends, text)), len(text)]:
        if text[start:end].strip():
            spans.append((start, end))
            start = end
    if not spans:
        return [(0, len(text))]
    return [*spans[:-1], (spans[-1][0], len(text))]


def step_of(span: Span, steps: Sequence[Span], text: str) -> int:
    """The step (from 0) of a token: that of its first character which is not blank, of a blank token of its first.

    A tokenizer may have one token for a line's end and the next line's beginning, and what it says is the latter.
    """
    piece = text[slice(*span)]
    at = span[0] + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)
    return next((index for index, (_, end) in enumerate(steps) if at < end), len(steps) - 1)
