r"""What reward functions read in a completion: its text, its boxes, its final answer.

Invariants: text from a model is only ever matched, never evaluated; a text of any length costs time linear in its
length.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]
Completion = str | Messages

MOST_ANSWER_CHARACTERS = 1000
"""No answer is longer: what claims to be is a model repeating itself."""

_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MARK = re.compile(r"####|\banswer\b\s*(?:is|:|=)+", re.IGNORECASE)


class Box(NamedTuple):
    r"""A `\boxed{...}`: `start` is its backslash, `end` is behind its closing brace."""

    start: int
    end: int
    content: str


def text_of(completion: Completion) -> str:
    """A plain completion itself; of messages, what the assistant said, a line end between two of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message) for message in completion if message.get("role", "assistant") == "assistant")


def texts_of(completions: Sequence[Completion]) -> list[str]:
    return [text_of(completion) for completion in completions]


def boxes(text: str) -> list[Box]:
    """The boxes that are closed, from left to right; one inside another is not counted."""
    found: list[Box] = []
    position = 0
    while opened := _BOX.search(text, position):
        end = _closing(text, opened.end())
        if end is None:  # nothing behind it can be closed outside it
            break
        found.append(Box(opened.start(), end + 1, text[opened.end() : end]))
        position = end + 1
    return found


def before_first_box(text: str) -> str:
    """The reasoning: all before the first box (whether it is closed or not), or the whole text."""
    first = _BOX.search(text)
    return text[: first.start()] if first else text


def up_to_first_box(text: str) -> str:
    """The text with nothing behind its first box, so that this box is the answer."""
    closed = boxes(text)
    return text[: closed[0].end] if closed else text


def final_answer(text: str) -> str | None:
    r"""What `text` gives as its answer, or None.

    In this order: the content of the last box; what follows the last `####`, `answer:` or `answer is` on its line, and
    of that what stands between dollars if it begins with one. The full stop at its end is no part of it.
    """
    if closed := boxes(text):
        return _trimmed(closed[-1].content)
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].lstrip(" \t\r\n*:").split("\n", 1)[0].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if line.startswith(opening) and closing in line[len(opening) :]:
            return _trimmed(line[len(opening) :].split(closing, 1)[0])
    return _trimmed(line)


def _content(message: dict[str, Any]) -> str:
    """A message's text: also where its content is a list of parts, and where a tool call leaves it empty."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def _closing(text: str, start: int) -> int | None:
    """The index of the brace that closes the one before `start`, or None; `\\{` and `\\}` are text."""
    depth = 1
    for found in _BRACE.finditer(text, start):
        depth += (found[0] == "{") - (found[0] == "}")
        if depth == 0:
            return found.start()
    return None


def _trimmed(answer: str) -> str | None:
    return answer.strip().strip("*").rstrip(" .").strip() or None
