"""Groups of random token sequences for the learner's tests."""

import numpy as np

from llmrl.learner.sequences import Group, completion

VOCABULARY = 97


def random_pairs(
    draw: np.random.Generator, count: int, longest_prompt: int = 40, longest_completion: int = 20
) -> list[Group]:
    """Pairs of ragged lengths that share their prompts."""

    def tokens(low: int, high: int) -> np.ndarray:
        return draw.integers(0, VOCABULARY, draw.integers(low, high + 1))

    pairs = []
    for _ in range(count):
        prompt = tokens(2, longest_prompt)
        pairs.append(
            (completion(prompt, tokens(1, longest_completion)), completion(prompt, tokens(1, longest_completion)))
        )
    return pairs


def branching_group(draw: np.random.Generator) -> Group:
    """Five sequences: a prompt, two of the completions sharing a further run, one that is a beginning of another."""
    prompt, middle = draw.integers(0, VOCABULARY, 20), draw.integers(0, VOCABULARY, 15)
    tails = [draw.integers(0, VOCABULARY, n) for n in (5, 9, 12, 7)]
    bodies = [np.concatenate([middle, tails[0]]), np.concatenate([middle, tails[1]]), tails[2], tails[3], middle]
    return tuple(completion(prompt, body) for body in bodies)
