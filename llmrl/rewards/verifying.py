"""What runs in the child processes of a `Verifiers`: judgements that can hang or crash on what a model wrote.

Invariant: nothing here imports torch.
"""

import logging
import re
from typing import Any

from llmrl.children.serving import Request, serve


def equal(request: Request) -> float:
    """1.0 where `answer` equals `gold`, both LaTeX or plain mathematics without dollars or boxes, by math-verify; else
    0.0. Raises ValueError for a `gold` that cannot be read."""
    from math_verify import verify  # type: ignore[import-untyped]

    gold = _parsed(request["gold"])
    if not gold:
        raise ValueError(f"the right answer {request['gold']!r} cannot be read")
    return float(verify(gold, _parsed(request["answer"]), timeout_seconds=None, raise_on_error=True))


def _parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # In a box, so that the whole text is the expression. Only the child's end bounds the time: math-verify's own
    # limits are alarms, which C code ignores.
    return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


def match(request: Request) -> float:
    """1.0 where the regular expression `pattern` matches at the start of `text`; `.` takes line ends too, `$` any."""
    return float(re.match(request["pattern"], request["text"], re.DOTALL | re.MULTILINE) is not None)


def prepare() -> None:
    """Load and compile what would else cost the first request its time."""
    logging.disable(logging.WARNING)  # math-verify warns of each limit that it is told to do without
    equal({"gold": r"\frac{x}{2}", "answer": "x/2"})


if __name__ == "__main__":
    serve({"equal": equal, "match": match}, prepare)
