r"""The reward functions that come with llmrl, by name.

Each factory takes a function's options and returns a `RewardFunction` with the signature that reward functions have in
TRL: `reward(prompts, completions, completion_ids, **columns) -> list[float | None]`, where `columns` are the data's,
one entry a completion, and None is no score. `build` checks the options first. What a completion says is
`texts.text_of`.

Invariants: nothing here evaluates what a model wrote; what may hang on it (computer algebra, a pattern of the user's)
runs in a child process; the rest costs time linear in the text.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, validate_call

from llmrl.config.nearest import nearest
from llmrl.errors import RefusedError
from llmrl.rewards import shaping
from llmrl.rewards.answers import final_number, is_correct
from llmrl.rewards.maths import verified
from llmrl.rewards.texts import boxes, final_answer, text_of, texts_of, up_to_first_box
from llmrl.rewards.verifiers import Verifiers

Rewards = list[float | None]
Column = Annotated[str, Field(min_length=1)]
Tokens = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

ARGUMENTS = ("prompts", "completions", "completion_ids")  # what functions get beside columns, and read
GOLD_COLUMNS = ("answer", "solution")
REPEATED_NGRAM = 4  # by which a guard tells a response that repeats itself


@dataclass(frozen=True)
class RewardFunction:
    """A reward function and what is known of it.

    `needs`: of each group of columns it takes the first that is there. `bounded`: it cannot hang, so that no limit is
    put on a whole call (its work is limited piece by piece). `is_model`: it reads what the policy read, dialogues also
    where prompts and completions are text. `is_logit`: its scores are of any size. `own`: it is the user's.
    """

    call: Callable[..., Any]
    needs: tuple[tuple[str, ...], ...] = ()
    bounded: bool = False
    is_model: bool = False
    is_logit: bool = False
    own: bool = False

    def __call__(self, **arguments: Any) -> Any:
        return self.call(**arguments)

    def remedy(self, missing: tuple[str, ...], columns: Iterable[str]) -> str:
        """What to do where there is no such column but `columns`."""
        if not self.own:
            return "Name another column in its options, or add it to the data"
        close = get_close_matches(missing[0], [*ARGUMENTS, *columns], n=1)
        meant = f" (did you mean `{close[0]}`?)" if close else ""
        return (
            f"Its parameters are called {', '.join(ARGUMENTS)}, or as columns are: rename `{missing[0]}`{meant}, add "
            "the column to the data, give the parameter a default, or its value in the entry's options"
        )


def correct_number(*, column: Column = "answer", first_box: bool = False, require_box: bool = False) -> RewardFunction:
    """1.0 where the completion's final number is that of `column`, exactly; else 0.0.

    `first_box`: the first box is graded and not the last, as by RLSP's authors. `require_box`: without a box, 0.0.
    """

    def reward(completions: Sequence[Any], **columns: Any) -> Rewards:
        return [judge(text, gold) for text, gold in zip(texts_of(completions), columns[column], strict=True)]

    def judge(text: str, gold: Any) -> float | None:
        if gold is None or (isinstance(gold, str) and final_number(gold) is None):
            return None
        if require_box and not boxes(text):
            return 0.0
        return float(is_correct(up_to_first_box(text) if first_box else text, gold))

    return RewardFunction(reward, needs=((column,),), bounded=True)


def accuracy(
    *,
    column: Column | None = None,
    first_box: bool = False,
    require_box: bool = False,
    pool: Verifiers | None = None,
) -> RewardFunction:
    """1.0 where the completion's answer is mathematically equal to that of `column` (`answer` or else `solution`).

    What counts as the answer of a text is `texts.final_answer`, for the right one too; equality is math-verify's.
    `first_box`: the first box is graded and not the last. `require_box`: without a box, 0.0.
    """
    pool = pool or Verifiers()
    names = (column,) if column else GOLD_COLUMNS

    async def reward(completions: Sequence[Any], **columns: Any) -> Rewards:
        golds = columns[next(name for name in names if name in columns)]
        texts = texts_of(completions)
        if first_box:
            texts = [up_to_first_box(text) for text in texts]
        scores = await verified_all(pool, golds, texts)
        return [0.0 if require_box and not boxes(text) else score for text, score in zip(texts, scores, strict=True)]

    return RewardFunction(reward, needs=(names,), bounded=True)


async def verified_all(pool: Verifiers, golds: Sequence[Any], texts: Sequence[str]) -> Rewards:
    """`maths.verified` of each text, as many at once as the pool has processes."""
    pairs = zip(golds, texts, strict=True)
    answers = await asyncio.gather(*(verified(pool, "" if gold is None else str(gold), text) for gold, text in pairs))
    return [answer.value for answer in answers]


def exact_match(
    *, column: Column = "answer", part: Literal["whole", "answer"] = "whole", ignore_case: bool = False
) -> RewardFunction:
    """1.0 where the text is that of `column`, up to blanks; `part` answer: where the completion's final answer is."""

    def shape(text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if ignore_case else text

    def reward(completions: Sequence[Any], **columns: Any) -> Rewards:
        return [judge(text, gold) for text, gold in zip(texts_of(completions), columns[column], strict=True)]

    def judge(text: str, gold: Any) -> float | None:
        if gold is None:
            return None
        said = final_answer(text) if part == "answer" else text
        return float(said is not None and shape(said) == shape(str(gold)))

    return RewardFunction(reward, needs=((column,),), bounded=True)


def format(*, pattern: Column | None = None, pool: Verifiers | None = None) -> RewardFunction:
    """1.0 where the text has the form, else 0.0: `<think>` at its start and nowhere else, and `</think>` after it, as
    TRL's `think_format_reward`; or a regular expression that matches from its start (`.` takes line ends)."""
    if pattern is None:
        return RewardFunction(lambda completions, **_: [_thinks(text) for text in texts_of(completions)], bounded=True)
    try:
        re.compile(pattern)
    except re.error as error:
        raise RefusedError(f"pattern {pattern!r} is no regular expression: {error}") from None
    pool = pool or Verifiers()

    async def reward(completions: Sequence[Any], **_: Any) -> Rewards:
        texts = texts_of(completions)
        found = await asyncio.gather(*(pool.ask("match", pattern=pattern, text=text) for text in texts))
        return [answer.value for answer in found]

    return RewardFunction(reward, bounded=True)


def _thinks(text: str) -> float:
    return float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text)


def boxed(*, present: Finite = 1.0, absent: Finite = 0.0) -> RewardFunction:
    r"""`present` where the text has a (closed) `\boxed{...}`, else `absent`; RLSP's authors: 0 and -0.5."""

    def reward(completions: Sequence[Any], **_: Any) -> Rewards:
        return [present if boxes(text) else absent for text in texts_of(completions)]

    return RewardFunction(reward, bounded=True)


def exploration(
    *,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1000.0,
    unit: Literal["tokens", "characters"] = "tokens",
    before_box: bool = False,
    distinct_lines: bool = False,
    cap: Annotated[float, Field(ge=1)] | None = None,
    worst: Finite | None = None,
    max_completion_len: Tokens | None = None,
    most_repeated: Annotated[float, Field(gt=0, lt=1)] | None = None,
) -> RewardFunction:
    """RLSP's reward for length, -scale / tokens; nothing else given, as published (`shaping.ReasoningLength` counts).

    The authors' code is `unit: characters, before_box: true`. Guards against padding, ours: `distinct_lines`; `cap`,
    more tokens than which earn nothing; `worst`, the least that anybody gets and what those get who ran into
    `max_completion_len` tokens or of whose 4-grams a share above `most_repeated` occurred before.
    """
    if worst is None and (max_completion_len or most_repeated):
        raise RefusedError("max_completion_len and most_repeated need `worst`: what a response gets that they catch")
    count = shaping.ReasoningLength(unit == "characters", before_box, distinct_lines, cap)

    def reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        return [judge(text_of(said), ids) for said, ids in zip(completions, completion_ids, strict=True)]

    def judge(text: str, ids: Sequence[int]) -> float:
        value = shaping.exploration(count(text, len(ids)), scale)
        if worst is None:
            return value
        caught = (max_completion_len is not None and len(ids) >= max_completion_len) or (
            most_repeated is not None and shaping.repeated_share(ids, REPEATED_NGRAM) > most_repeated
        )
        return worst if caught else max(value, worst)

    return RewardFunction(reward, bounded=True)


def cosine(
    *,
    max_len: Tokens,
    min_value_wrong: Finite = -10.0,
    max_value_wrong: Finite = 0.0,
    min_value_correct: Finite = 1.0,
    max_value_correct: Finite = 2.0,
    exceed_value: Finite = -10.0,
    exceed_margin: Annotated[int, Field(ge=0)] = 16,
    verifier: Literal["accuracy", "correct_number"] = "accuracy",
    column: Column | None = None,
    pool: Verifiers | None = None,
) -> RewardFunction:
    """Correctness that depends on length by a cosine: short right answers and long wrong ones get the higher values.

    Options as in TRL's `get_cosine_scaled_reward`; values as published (arXiv 2502.03373, the authors' code), with
    `exceed_value` for whatever comes within `exceed_margin` tokens of `max_len`.
    """
    judge = accuracy(column=column, pool=pool) if verifier == "accuracy" else correct_number(column=column or "answer")

    async def reward(completion_ids: Sequence[Sequence[int]], **arguments: Any) -> Rewards:
        found = judge(completion_ids=completion_ids, **arguments)
        right = await found if verifier == "accuracy" else found
        return [None if r is None else value(bool(r), len(ids)) for r, ids in zip(right, completion_ids, strict=True)]

    def value(correct: bool, length: int) -> float:
        if length + exceed_margin >= max_len:
            return exceed_value
        ends = (max_value_correct, min_value_correct), (min_value_wrong, max_value_wrong)
        return shaping.cosine(correct, length, max_len, *ends)

    return RewardFunction(reward, needs=judge.needs, bounded=True)


def repetition(*, ngram_size: Tokens = 3, max_penalty: Annotated[float, Field(le=0)] = -1.0) -> RewardFunction:
    """`max_penalty` times the share of the completion's token n-grams that occurred before, as in TRL."""

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        return [max_penalty * shaping.repeated_share(ids, ngram_size) for ids in completion_ids]

    return RewardFunction(reward, bounded=True)


def soft_overlong(*, max_completion_len: Tokens, soft_punish_cache: Annotated[int, Field(ge=0)]) -> RewardFunction:
    """DAPO's punishment of what comes within `soft_punish_cache` tokens of `max_completion_len`, 0 down to -1."""
    if soft_punish_cache > max_completion_len:
        raise RefusedError(f"soft_punish_cache {soft_punish_cache} exceeds max_completion_len {max_completion_len}")

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        return [shaping.soft_overlong(len(ids), max_completion_len, soft_punish_cache) for ids in completion_ids]

    return RewardFunction(reward, bounded=True)


FUNCTIONS: dict[str, Callable[..., RewardFunction]] = {
    "accuracy": accuracy,
    "boxed": boxed,
    "correct_number": correct_number,
    "cosine": cosine,
    "exact_match": exact_match,
    "exploration": exploration,
    "format": format,
    "repetition": repetition,
    "soft_overlong": soft_overlong,
}


def build(name: str, options: dict[str, Any], pool: Verifiers | None = None) -> RewardFunction:
    """The function of that name with these options (text is read as the number that it is).

    Raises RefusedError for an unknown name or option, a value of the wrong type or out of range, a missing option.
    """
    if name not in FUNCTIONS:
        raise RefusedError(f"there is no reward function `{name}`; did you mean `{nearest(name, FUNCTIONS)}`?")
    factory = FUNCTIONS[name]
    known = {key for key in factory.__annotations__ if key not in ("return", "pool")}
    for key in options:
        if key not in known:
            hint = f"did you mean `{nearest(key, known)}`? It takes {', '.join(sorted(known))}"
            raise RefusedError(f"{name} has no option `{key}`; {hint}")
    shared = {"pool": pool} if "pool" in factory.__annotations__ else {}
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(factory)(**options, **shared)
    except RefusedError as error:
        raise RefusedError(f"{name}: {error}") from None
    except ValidationError as error:
        raise RefusedError("; ".join(_mistake(name, details) for details in error.errors())) from None


def _mistake(name: str, details: Any) -> str:
    option = details["loc"][0]
    if details["type"] == "missing_keyword_only_argument":
        return f"{name} needs the option `{option}`"
    return f"{name}: option `{option}`: {details['msg']}, got {details['input']!r}"
