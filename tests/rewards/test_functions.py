"""The built-in reward functions against numbers worked out by hand and against TRL's."""

import asyncio
import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward, think_format_reward
from trl.rewards import get_soft_overlong_punishment as trl_soft_overlong

from llmrl.errors import RefusedError
from llmrl.rewards.functions import FUNCTIONS, build
from llmrl.rewards.shaping import ReasoningLength, repeated_share, soft_overlong
from llmrl.rewards.verifiers import Verifiers

POOL = Verifiers(processes=2, seconds=20.0)


@pytest.fixture(scope="module", autouse=True)
def _close_pool() -> Iterator[None]:
    yield
    POOL.close()


def call(
    name: str, completions: list[Any], lengths: list[int] | None = None, options: Any = None, **columns: Any
) -> Any:
    """The scores of built-in `name`; completions have `lengths` different tokens, one a character when not given."""
    lengths = lengths or [len(c) for c in completions]
    found = build(name, options or {}, POOL)(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[list(range(n)) for n in lengths],
        **columns,
    )
    return asyncio.run(found) if inspect.isawaitable(found) else found


# RLSP, page's T1: C 1000, alpha 0.8; each row (text, right answer, tokens) and the three combinations of the rewards.
CORRECT, WRONG, UNBOXED = r"\boxed{10}", r"\boxed{11}", "no idea"


@pytest.mark.parametrize(
    ("text", "length", "equation_1", "code", "code_and_judge"),
    [
        (CORRECT, 500, 0.4, -1.0, -0.68),
        (WRONG, 4000, -0.05, -0.25, -0.08),
        (UNBOXED, 4096, -0.048828125, -0.744140625, -0.4753125),
    ],
)
def test_rlsp_combinations(text: str, length: int, equation_1: float, code: float, code_and_judge: float) -> None:
    (right,) = call("correct_number", [text], [length], {"first_box": True, "require_box": True}, answer=["10"])
    (longer,) = call("exploration", [text], [length])
    (penalty,) = call("boxed", [text], [length], {"present": 0.0, "absent": -0.5})
    assert 0.8 * right + 0.2 * longer == pytest.approx(equation_1, abs=1e-9)
    assert right + longer + penalty == pytest.approx(code, abs=1e-9)
    assert 0.8 * (right + longer + penalty) + 0.2 * 0.6 == pytest.approx(code_and_judge, abs=1e-9)


def test_rlsp_right_and_wrong_tie_where_the_page_says() -> None:
    at_250, at_1000 = call("exploration", ["", ""], [250, 1000])
    assert 0.8 + 0.2 * at_250 == 0.0  # Eq. 1: right at 250 tokens is worth as much as wrong at infinitely many
    assert 1.0 + at_1000 == 0.0


def test_rlsp_slope_and_the_length_that_a_kl_penalty_leaves() -> None:
    low, high = call("exploration", ["", ""], [499, 501])
    assert 0.2 * (high - low) / 2 == pytest.approx(8e-4, rel=1e-5)
    for scale, best in ((200.0, 282.84271), (1000.0, 632.45553)):
        lengths = list(range(1, 1000))
        values = call("exploration", [""] * len(lengths), lengths, {"scale": scale})
        totals = [value - 0.05 * 0.05 * n for value, n in zip(values, lengths, strict=True)]
        assert abs(lengths[totals.index(max(totals))] - best) <= 1


def test_rlsp_as_the_authors_code_grades_the_first_box_and_counts_characters_before_it() -> None:
    texts = [r"2*3=6, 6+4=10. \boxed{10} Check: \boxed{11}", "2*3=6, 6+4=10.", r"\boxed{10}"]
    right = call("correct_number", texts, options={"first_box": True, "require_box": True}, answer=["10"] * 3)
    assert right == [1.0, 0.0, 1.0]
    assert call("correct_number", texts[:1], answer=["10"]) == [0.0]  # the last box
    longer = call("exploration", texts, options={"scale": 2, "unit": "characters", "before_box": True})
    penalty = call("boxed", texts, options={"present": 0, "absent": -0.5})
    totals = [sum(parts) for parts in zip(right, longer, penalty, strict=True)]
    assert totals[0] == pytest.approx(0.46666667, abs=1e-8)
    assert totals[1] == pytest.approx(-1.07142857, abs=1e-8)
    # The authors' server divides by zero here and gives 0, more than for a right answer of 500 tokens at C = 1000.
    assert totals[2] == -1.0


def test_exploration_guards() -> None:
    padded = "step one\n\nstep two\nstep one\n  step one\nso \\boxed{1}\nstep three"
    assert ReasoningLength(characters=True, distinct_lines=True, before_box=True)(padded, 99) == 20 / 4
    assert ReasoningLength(distinct_lines=True, before_box=True)(padded, 100) == 100 * 20 / len(padded)
    assert ReasoningLength()(padded, 100) == 100
    assert ReasoningLength(cap=60)(padded, 100) == 60
    assert ReasoningLength()("", 0) == 0
    options = {"worst": -3, "max_completion_len": 800, "most_repeated": 0.2}
    assert call("exploration", [""] * 4, [799, 800, 100, 0], options) == [-1000 / 799, -3, -3, -3]
    repeated = build("exploration", options)(prompts=[""], completions=[""], completion_ids=[[1, 2, 3, 4] * 150])
    assert repeated == [-3]
    with pytest.raises(RefusedError, match="need `worst`"):
        build("exploration", {"max_completion_len": 800})


def test_exploration_rises_with_length_and_never_exceeds_zero() -> None:
    values = call("exploration", [""] * 50, list(range(50)))
    assert values == sorted(values)
    assert all(value < 0 and math.isfinite(value) for value in values)


@pytest.mark.parametrize(
    ("length", "right", "wrong"),
    [
        (0, 2, -10),
        (3584, 1.85355339, -8.53553391),
        (7168, 1.5, -5),
        (14319, 1.00000347, -0.000034696136),
        (14320, -10, -10),
        (20000, -10, -10),
    ],
)
def test_cosine(length: int, right: float, wrong: float) -> None:
    options = {"max_len": 14336, "verifier": "correct_number"}
    found = call("cosine", [CORRECT, WRONG], [length] * 2, options, answer=["10", "10"])
    assert found == pytest.approx([right, wrong], abs=1e-8)


def test_cosine_as_in_trl() -> None:
    values = {"min_value_wrong": -1.0, "max_value_wrong": -0.5, "min_value_correct": 0.5, "max_value_correct": 1.0}
    lengths = [0, 10, 50, 99, 100, 150] * 2
    texts = [CORRECT] * 6 + [WRONG] * 6
    ours = call("cosine", texts, lengths, {"max_len": 1000, "exceed_margin": 0, **values}, solution=["10"] * 12)
    theirs = get_cosine_scaled_reward(1000, **values)(
        completions=[[{"content": text}] for text in texts],
        solution=["$10$"] * 12,
        completion_ids=[[1] * n for n in lengths],
    )
    assert ours == pytest.approx(theirs)


def test_repetition() -> None:
    assert build("repetition", {})(completion_ids=[[1, 2, 3, 1, 2, 3, 1, 2]]) == [-0.5]


def test_repetition_as_in_trl() -> None:
    sequences = [[], [1], [5] * 5, [1, 2, 3, 4], [1, 2, 1, 2, 1, 2, 9], list(range(20)) * 2]
    for size in (1, 2, 3, 5):
        ours = build("repetition", {"ngram_size": size, "max_penalty": -0.7})(completion_ids=sequences)
        assert ours == pytest.approx(get_repetition_penalty_reward(size, -0.7)(sequences))
    assert repeated_share("abab", 2) == pytest.approx(1 / 3)


def test_soft_overlong() -> None:
    lengths = [16384, 17408, 18432, 20480, 20481, 10, 30000]
    assert [soft_overlong(n, 20480, 4096) for n in lengths] == [0, -0.25, -0.5, -1, -1, 0, -1]
    for longest, buffer in ((100, 20), (100, 100), (100, 0)):
        ours = call(
            "soft_overlong", [""] * 200, list(range(200)), {"max_completion_len": longest, "soft_punish_cache": buffer}
        )
        assert ours == trl_soft_overlong(longest, buffer)([[0] * n for n in range(200)])


def test_format_as_in_trl() -> None:
    texts = [
        "<think>\na\n</think>\nb", "<think>a</think>", "<think>a", "x<think>a</think>", "<think><think>a</think>",
        "<think>a</think> <think>b</think>", "", "\n<think>a</think>", "</think><think>",
    ]  # fmt: skip
    assert call("format", texts) == think_format_reward([[{"content": text}] for text in texts])


def test_format_with_a_pattern_of_ones_own() -> None:
    options = {"pattern": r"<answer>(\d+)</answer>$"}
    assert call("format", ["<answer>12</answer>", "<answer>a</answer>", "so <answer>12</answer>"], None, options) == [
        1,
        0,
        0,
    ]
    pool = Verifiers(processes=1, seconds=1.0)
    hanging = build("format", {"pattern": "(a+)+b"}, pool)
    found = asyncio.run(hanging(completions=["a" * 60, "ab"]))
    pool.close()
    assert found == [None, 1.0]
    with pytest.raises(RefusedError, match=r"format: pattern '\(' is no regular expression"):
        build("format", {"pattern": "("})


def test_accuracy() -> None:
    texts = [r"\boxed{\frac{2}{4}}", r"\boxed{2}", "no", r"\boxed{0.5} \boxed{7}"]
    assert call("accuracy", texts, answer=["1/2"] * 4) == [1, 0, 0, 0]
    assert call("accuracy", texts, options={"first_box": True}, solution=[r"So \boxed{\frac12}."] * 4) == [1, 0, 0, 1]
    unboxed = ["Answer: 1/2", "\\boxed{1/2\nAnswer: 1/2"]
    assert call("accuracy", unboxed, answer=["1/2"] * 2) == [1, 1]
    assert call("accuracy", [texts[0], *unboxed], options={"require_box": True}, answer=["1/2"] * 3) == [1, 0, 0]
    assert call("accuracy", texts, options={"column": "gold"}, gold=["1/2", None, "", 7], answer=[0] * 4) == [
        1,
        None,
        None,
        1,
    ]


def test_accuracy_of_a_conversation() -> None:
    said = [[{"role": "assistant", "content": "Let me see."}, {"role": "assistant", "content": r"\boxed{5}"}]]
    assert call("accuracy", said, answer=["5"]) == [1]


def test_correct_number_without_a_number_to_compare_with_is_no_score() -> None:
    assert call("correct_number", ["5", "5", "5", "5"], answer=[5, "five", None, "#### 5"]) == [1, None, None, 1]


def test_exact_match() -> None:
    texts = ["Paris", " Paris\n", "paris", "The answer is Paris."]
    assert call("exact_match", texts, answer=["Paris"] * 4) == [1, 1, 0, 0]
    assert call("exact_match", texts, options={"ignore_case": True}, answer=["Paris"] * 4) == [1, 1, 1, 0]
    assert call("exact_match", texts, options={"part": "answer"}, answer=["Paris"] * 4) == [0, 0, 0, 1]
    assert call("exact_match", ["a"], options={"column": "gold"}, gold=[None]) == [None]


def test_boxed() -> None:
    assert call("boxed", [r"\boxed{1}", r"\boxed{1", "1"]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acuracy", {}, "no reward function `acuracy`; did you mean `accuracy`"),
        ("accuracy", {"colum": "a"}, "accuracy has no option `colum`; did you mean `column`"),
        ("accuracy", {"pool": 3}, "no option `pool`"),
        ("cosine", {}, "cosine needs the option `max_len`"),
        ("cosine", {"max_len": "long"}, "cosine: option `max_len`: .*'long'"),
        ("cosine", {"max_len": 0}, "option `max_len`"),
        ("exploration", {"scale": -1}, "option `scale`"),
        ("exploration", {"unit": "words"}, "option `unit`"),
        ("boxed", {"absent": math.nan}, "option `absent`"),
        ("repetition", {"max_penalty": 1}, "option `max_penalty`"),
        ("soft_overlong", {"max_completion_len": 10, "soft_punish_cache": 11}, "soft_overlong: soft_punish"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_when_the_function_is_built(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        build(name, options)


def test_every_function_says_what_it_does() -> None:
    assert all(factory.__doc__ for factory in FUNCTIONS.values())
