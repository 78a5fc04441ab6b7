"""Reading a guess or an answer in what a model said.

Invariants: text is matched, never evaluated; any text is read without an exception, in time linear in its length.

The last number (or word) counts, since a model that reasons does so before it answers, and a model that does not says
nothing else. Where the text has a `<guess>...</guess>`, only the last of these is read: for models that go on talking.
The tag is not asked for, because small models cannot spell it.
"""

import re
from collections import deque

from llmrl.envs.protocol import Message

_WORD = re.compile(r"[^\W\d_]+")
_OPEN, _CLOSE = "<guess>", "</guess>"


def said(message: Message) -> str:
    """The text of a message; empty where it only calls tools."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def guess_part(text: str) -> str:
    """What the last `<guess>...</guess>` holds, or the whole text where there is none."""
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, end) if end >= 0 else -1
    return text[start + len(_OPEN) : end] if start >= 0 else text


def last_word(text: str, letters: int) -> str | None:
    """The last word of exactly `letters` English letters in `text`, in lower case, or None."""
    fitting = (m.group() for m in _WORD.finditer(text) if m.end() - m.start() == letters and m.group().isascii())
    words = deque(fitting, maxlen=1)
    return words[0].lower() if words else None
