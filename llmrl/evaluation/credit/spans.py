"""Which characters of a text a token stands for."""

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
