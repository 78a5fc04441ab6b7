"""Reading a guess or an answer in what a model said.

Invariants: text is matched, never evaluated; any text is read without an exception, in time linear in its length.

The last number (or word) counts, since a model that reasons does so before it answers, and a model that does not says
nothing else. Where the text has a `<guess>...</guess>`, only the last of these is read: for models that go on talking.
The tag is not asked for, because small models cannot spell it.
"""

import re
from collections import deque
from fractions import Fraction

from llmrl.envs.protocol import Message

MOST_DIGITS = 100  # a longer "number" is a model repeating itself, and Python refuses to parse thousands of digits

# A sign belongs to the number only where no value stands right before it: "= -3" is negative, "1-10" ends in 10.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\w)\].])[-+])?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?!\w)"
)
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


def last_number(text: str) -> Fraction | None:
    """The last number in `text` (thousands commas, decimals, a sign and `$` are understood), or None."""
    matches = deque(_NUMBER.finditer(text.replace("\u2212", "-")), maxlen=1)
    if not matches:
        return None
    digits = matches[0].group().replace(",", "").replace("$", "")
    return Fraction(digits) if len(digits) <= MOST_DIGITS else None


def last_word(text: str, letters: int) -> str | None:
    """The last word of exactly `letters` English letters in `text`, in lower case, or None."""
    fitting = (m.group() for m in _WORD.finditer(text) if m.end() - m.start() == letters and m.group().isascii())
    words = deque(fitting, maxlen=1)
    return words[0].lower() if words else None
