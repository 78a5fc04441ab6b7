r"""Rewards for the form of an answer: its length, its repetitions.

Each is a pure function of one completion; `functions.py` makes reward functions of them. With n the completion's
length in tokens:

    exploration    -C / n                                                                       (RLSP)
    cosine         m + (M - m) (1 + cos(pi n / L)) / 2, M at n = 0, m at n = L                  (Demystifying long CoT)
    repetition     p (1 - distinct n-grams / n-grams)                                           (TRL; sparse)
    soft overlong  0 up to L - B; (L - B - n) / B inside the buffer; -1 beyond L                (DAPO, Eq. 13)

RLSP: Ye et al., "On the Emergence of Thinking in LLMs I", arXiv 2502.06773, Sec. 3. Cosine: Yeo et al., "Demystifying
Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373, App. C. DAPO: Yu et al., arXiv 2503.14476. All of them are
at most 0 save the cosine; all rise with what they encourage.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llmrl.rewards.texts import before_first_box

CHARACTERS_PER_TOKEN = 4
"""By which the authors of RLSP estimate tokens in their reward server."""


def exploration(length: float, scale: float) -> float:
    """-C / n: at most 0, rising with the length n (tokens, at least one is counted); `scale` is C."""
    return -scale / max(length, 1.0)


@dataclass(frozen=True)
class ReasoningLength:
    """How the length that RLSP rewards is counted, in tokens.

    `characters`: characters / 4, the authors' estimate, instead of the tokens sampled. `before_box`: only what stands
    before the first box, since text behind the graded answer is not thought. `distinct_lines`: a line counts once,
    since models under this reward repeat themselves. `cap`: no more than so many tokens. Where only a part of the text
    counts, its tokens are taken to be that part of all tokens.
    """

    characters: bool = False
    before_box: bool = False
    distinct_lines: bool = False
    cap: float | None = None

    def __call__(self, text: str, num_tokens: int) -> float:
        """Tokens of `text`, which was sampled as `num_tokens` tokens, its end token included."""
        part = before_first_box(text) if self.before_box else text
        if self.distinct_lines:
            part = "\n".join(dict.fromkeys(line.strip() for line in part.splitlines() if line.strip()))
        if self.characters:
            length = len(part) / CHARACTERS_PER_TOKEN
        else:
            length = num_tokens * len(part) / len(text) if len(part) < len(text) else float(num_tokens)
        return length if self.cap is None else min(length, self.cap)


def cosine(
    correct: bool,
    length: int,
    max_len: int,
    value_correct: tuple[float, float],
    value_wrong: tuple[float, float],
) -> float:
    """The value at `length`, gliding from a pair's first number at 0 to its second at `max_len` and beyond."""
    shortest, longest = value_correct if correct else value_wrong
    share = min(length / max_len, 1.0)
    return longest + 0.5 * (shortest - longest) * (1.0 + math.cos(math.pi * share))


def repeated_share(items: Sequence[Hashable], ngram_size: int) -> float:
    """Share of the n-grams that occurred before: 0 where all are distinct or there are none, below 1."""
    total = len(items) - ngram_size + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(items[i : i + ngram_size]) for i in range(total)}) / total


def soft_overlong(length: int, max_len: int, buffer: int) -> float:
    """0 down to -1 over the last `buffer` tokens before `max_len`; -1 beyond."""
    if length <= max_len - buffer:
        return 0.0
    return max((max_len - buffer - length) / buffer, -1.0) if buffer else -1.0
