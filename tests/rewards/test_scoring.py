"""Several weighted reward functions at once, and all that one of them can do wrong."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rewards.keys import RewardKeys
from llmrl.rewards.scoring import Scorer, Scores

PROMPTS = ["1+1?", "2+2?"]
COMPLETIONS = [r"\boxed{2}", r"\boxed{5}"]
IDS = [[5, 6], [5, 6, 7]]
COLUMNS = {"answer": ["2", "4"], "level": [1, 2]}


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scorer]]:
    """Makes scorers of functions, as if they stood in a module of the user's; `said` collects what they say."""
    made: list[Scorer] = []
    module = ModuleType("users_rewards")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(*entries: Any, said: list[str] | None = None, **settings: Any) -> Scorer:
        rewards = []
        for entry in entries:
            if callable(entry):
                setattr(module, entry.__name__, entry)
            rewards.append(f"users_rewards:{entry.__name__}" if callable(entry) else entry)
        keys = RewardKeys.model_validate({"rewards": rewards, **settings})
        made.append(Scorer(keys, (said if said is not None else []).append))
        return made[-1]

    yield make
    for one in made:
        one.close()


def score(scorer: Scorer, **settings: Any) -> Scores:
    return asyncio.run(scorer.score(PROMPTS, COMPLETIONS, IDS, COLUMNS, **settings))


def fixed(values: Any, name: str = "fixed") -> Callable[..., Any]:
    def function(**_: Any) -> Any:
        return values

    function.__name__ = name
    return function


def test_weighted_sum_and_metrics(scorer: Callable[..., Scorer]) -> None:
    made = scorer(
        {"function": "correct_number", "weight": 0.8},
        {"function": "exploration", "weight": 0.2, "options": {"scale": 2}},
        {"function": "boxed", "weight": 0, "name": "in_a_box"},
    )
    scores = score(made)
    assert scores.totals_S == pytest.approx([0.8 - 0.2 * 2 / 2, -0.2 * 2 / 3])
    assert scores.by_function["correct_number"] == [1.0, 0.0]
    assert scores.by_function["in_a_box"] == [1.0, 1.0]
    logged, tallies = made.noted()
    assert logged == {}
    assert tallies["rewards/in_a_box/no_score"] == 0


def test_the_sum_can_be_clipped(scorer: Callable[..., Scorer]) -> None:
    made = scorer({"function": "exploration", "options": {"scale": 1000}}, reward_clip=10)
    assert score(made).totals_S == [-10, -10]


def test_none_is_left_out_of_the_sum_and_all_none_is_no_score(scorer: Callable[..., Scorer]) -> None:
    first, second = fixed([1.0, None], "first"), fixed([None, None], "second")
    third = {"function": "boxed", "weight": 0}
    made = scorer(first, second, third)
    assert score(made).totals_S == [1.0, None]  # a function of weight 0 is no score
    assert made.tallies["second"].no_score == 2
    assert score(scorer(first, second, reward_missing="no_score")).totals_S == [None, None]
    assert score(scorer(first, reward_missing="no_score")).totals_S == [1.0, None]


def test_functions_get_what_trl_gives_them(scorer: Callable[..., Scorer]) -> None:
    seen: dict[str, Any] = {}

    def everything(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any,
        log_extra: Any = None, log_metric: Any = None, trainer_state: Any = None, **columns: Any,
    ) -> list[float]:  # fmt: skip
        seen.update(locals())
        log_extra("gold", answer)
        log_metric("share", 0.25)
        return [0.0, 0.0]

    def only_these(completions: Any, level: Any, factor: int = 1) -> list[float]:
        return [factor * value for value in level]

    scorer(only_these)
    made = scorer(everything, {"function": "users_rewards:only_these", "options": {"factor": 3}})
    scores = score(made, trainer_state="state")
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, IDS)
    assert (seen["answer"], seen["columns"], seen["trainer_state"]) == (["2", "4"], {"level": [1, 2]}, "state")
    assert scores.by_function["only_these"] == [3.0, 6.0]
    assert scores.extra == {"gold": ["2", "4"]}
    assert made.noted()[0] == {"share": [0.25]}
    assert made.noted()[0] == {}  # of no call


def test_functions_run_at_the_same_time_and_the_loop_goes_on(scorer: Callable[..., Scorer]) -> None:
    both = threading.Barrier(2, timeout=30)

    def one(**_: Any) -> list[float]:
        both.wait()
        return [1.0, 1.0]

    def two(**_: Any) -> list[float]:
        both.wait()
        return [1.0, 1.0]

    async def three(**_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0, 1.0]

    assert score(scorer(one, two, three)).totals_S == [3.0, 3.0]


def test_a_synchronous_function_is_called_from_one_thread_at_a_time(scorer: Callable[..., Scorer]) -> None:
    inside, most = 0, 0

    def counting(**_: Any) -> list[float]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return [0.0, 0.0]

    made = scorer(counting)

    async def many() -> None:
        await asyncio.gather(*(made.score(PROMPTS, COMPLETIONS, IDS, COLUMNS) for _ in range(5)))

    asyncio.run(many())
    asyncio.run(many())  # in another event loop
    assert (most, made.tallies["counting"].calls) == (1, 10)


@pytest.mark.parametrize(
    "returned", [(1, True), np.array([1.0, 1.0]), torch.tensor([1, 1]), [np.float32(1), torch.tensor(1.0)]]
)
def test_numbers_of_any_kind(scorer: Callable[..., Scorer], returned: Any) -> None:
    totals = score(scorer(fixed(returned))).totals_S
    assert totals == [1.0, 1.0]
    assert all(type(total) is float for total in totals)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.nan, "1.0", [1.0], 10**400, object()])
def test_what_is_no_finite_number_is_no_score(scorer: Callable[..., Scorer], bad: Any) -> None:
    said: list[str] = []
    made = scorer(fixed([0.5, bad]), said=said)
    for _ in range(5):
        assert score(made).totals_S == [0.5, None]
    tally = made.tallies["fixed"]
    assert (tally.no_score, tally.invalid, tally.failures) == (5, 5, 0)
    assert len(said) == 1
    assert "reward function fixed gave" in said[0]
    assert "no score" in said[0]


def test_what_lies_outside_of_a_range_is_no_score(
    scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardKeys, "score_ranges", {"judge": (0.0, 1.0)})
    said: list[str] = []
    made = scorer(fixed([1.0, 2.5], "judge"), fixed([7.0, -7.0], "free"), said=said)
    assert score(made).by_function == {"judge": [1.0, None], "free": [7.0, -7.0]}
    assert "judge gave 2.5 (float), no number from 0 to 1, in a call in which 1 of 2 completions got none" in said[0]
    failing = scorer(fixed([100, -0.01], "judge"), said=said, reward_max_failures=2)
    assert score(failing).totals_S == [None, None]
    with pytest.raises(RunFailedError, match=r"judge failed 2 times .* 100 \(int\), which is no number from 0 to 1"):
        score(failing)


@pytest.mark.parametrize("count", [1, 3])
def test_a_column_that_is_logged_has_an_entry_for_each_completion(scorer: Callable[..., Scorer], count: int) -> None:
    def plain(completions: Any, log_extra: Any) -> list[float]:
        log_extra("fine", completions)
        return [1.0, 2.0]

    def notes(completions: Any, log_extra: Any) -> list[float]:
        log_extra("length", [5] * count)
        return [1.0, 2.0]

    with pytest.raises(
        RunFailedError, match=f"function notes logged {count} values of length with log_extra; expected 2"
    ):
        score(scorer(plain, notes))


def test_only_nan_is_a_failing_function(scorer: Callable[..., Scorer]) -> None:
    made = scorer(fixed([float("nan")] * 2), reward_max_failures=2)
    assert score(made).totals_S == [None, None]
    with pytest.raises(RunFailedError, match=r"fixed failed 2 times in a row; the last time it returned nan \(float\)"):
        score(made)


def test_only_none_is_not_a_failure(scorer: Callable[..., Scorer]) -> None:
    made = scorer(fixed([None, None]), reward_max_failures=1)
    assert score(made).totals_S == score(made).totals_S == [None, None]
    assert made.tallies["fixed"].failures == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"reward function fixed returned 1 values; expected a list of 2 numbers"),
        ([1.0] * 3, "returned 3 values"),
        (1.0, r"returned 1.0 \(float\); expected a list of 2"),
        (None, r"returned None \(NoneType\)"),
        ({"a": 1}, "returned {'a': 1}"),
        (torch.tensor(1.0), "returned tensor"),
    ],
)
def test_what_is_plainly_a_bug_ends_the_run_at_once(scorer: Callable[..., Scorer], returned: Any, message: str) -> None:
    with pytest.raises(RunFailedError, match=message):
        score(scorer(fixed(returned)))


def test_a_function_that_forgets_to_be_async_is_a_bug(scorer: Callable[..., Scorer]) -> None:
    async def inner() -> list[float]:
        return [1.0, 1.0]

    def forgetful(**_: Any) -> Any:
        return inner()

    with pytest.raises(RunFailedError, match="coroutine"):
        score(scorer(forgetful))


def test_a_missing_column_is_named_before_the_run_and_in_it(scorer: Callable[..., Scorer]) -> None:
    def wants(completions: Any, gold: Any) -> list[float]:
        return [0.0] * len(completions)

    made = scorer(wants, "accuracy", {"function": "exact_match", "options": {"column": "level"}})
    with pytest.raises(
        RefusedError, match=r"rows.jsonl: the reward function wants needs the column `gold`; there are answer"
    ):
        made.check(COLUMNS, "rows.jsonl")
    with pytest.raises(RunFailedError, match="reward function wants needs the column `gold`, and gets answer"):
        score(made)
    with pytest.raises(RefusedError, match="accuracy needs the column `answer` or `solution`"):
        made.check(["gold"], "rows.jsonl")
    made.check(["gold", "solution", "level"], "rows.jsonl")


def test_a_parameter_of_ones_own_that_nothing_fills_gets_the_names_there_are(scorer: Callable[..., Scorer]) -> None:
    def old(completion: Any, answer: Any) -> list[float]:
        return [0.0] * len(answer)

    words = r"called prompts, completions, completion_ids, .*rename `completion` \(did you mean `completions`\?\)"
    with pytest.raises(RefusedError, match=f"there are answer, level. .*{words}"):
        scorer(old).check(COLUMNS, "rows.jsonl")
    with pytest.raises(RefusedError, match="Name another column in its options"):
        scorer("accuracy").check(["gold"], "rows.jsonl")


def test_what_raises_is_no_score_and_ends_the_run_when_it_goes_on(scorer: Callable[..., Scorer]) -> None:
    said: list[str] = []
    fail = True

    def unlucky(**_: Any) -> list[float]:
        if fail:
            raise KeyError("no such thing")
        return [1.0, 1.0]

    made = scorer(unlucky, fixed([2.0, 2.0]), said=said, reward_max_failures=3)
    for _ in range(2):
        scores = score(made)
        assert scores.totals_S == [2.0, 2.0]
        assert scores.by_function["unlucky"] == [None, None]
    fail = False
    assert score(made).totals_S == [3.0, 3.0]
    fail = True
    score(made)
    score(made)  # the count began anew
    with pytest.raises(
        RunFailedError, match=r"(?s)unlucky failed 3 times in a row.*in unlucky.*KeyError: 'no such thing'"
    ):
        score(made)
    tally = made.tallies["unlucky"]
    assert (tally.failures, tally.calls, tally.no_score) == (5, 5, 8)
    assert len(said) == 4
    assert "raise KeyError" in said[0]
    assert "functions.py" not in said[0]  # only what is the user's
    assert [text.count("\n") for text in said[1:]] == [0, 0, 0]
    assert all("KeyError: 'no such thing'" in text for text in said)


@pytest.mark.parametrize(
    ("completions", "hint"),
    [
        ([[{"role": "assistant", "content": "4"}]] * 2, 'completion[0]["content"]'),
        (COMPLETIONS, "Its completions are text here"),
    ],
)
def test_a_function_for_the_other_kind_of_row_is_told_what_completions_are(
    scorer: Callable[..., Scorer], completions: list[Any], hint: str
) -> None:
    def reads_text(completions: list[Any], **_: Any) -> list[float]:
        return [float(said.strip() == "4") for said in completions]

    def reads_messages(completions: list[Any], **_: Any) -> list[float]:
        return [float(said[0]["content"] == "4") for said in completions]

    said: list[str] = []
    function = reads_messages if completions is COMPLETIONS else reads_text
    asyncio.run(scorer(function, said=said).score(PROMPTS, completions, IDS, COLUMNS))
    assert hint in said[0]


def test_asynchronous_functions_that_raise_or_cancel_themselves(scorer: Callable[..., Scorer]) -> None:
    async def raises(**_: Any) -> list[float]:
        raise ValueError("async")

    async def cancels(**_: Any) -> list[float]:
        raise asyncio.CancelledError

    made = scorer(raises, cancels, fixed([1.0, 1.0]))
    assert score(made).totals_S == [1.0, 1.0]
    assert made.tallies["raises"].failures == made.tallies["cancels"].failures == 1


def test_leaving_the_program_is_a_failure_like_others(scorer: Callable[..., Scorer]) -> None:
    def leaves(**_: Any) -> list[float]:
        raise SystemExit(3)

    def stops(**_: Any) -> list[float]:
        raise StopIteration

    assert score(scorer(leaves, stops, fixed([1.0, 1.0]))).totals_S == [1.0, 1.0]


def test_what_hangs_is_left_behind_and_said(scorer: Callable[..., Scorer]) -> None:
    said: list[str] = []
    release = threading.Event()

    def hangs(**_: Any) -> list[float]:
        release.wait(60)
        return [1.0, 1.0]

    async def hangs_too(**_: Any) -> list[float]:
        while True:  # and swallows its cancellation
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if release.is_set():
                    raise
                release.set()

    made = scorer(hangs, hangs_too, fixed([1.0, 1.0]), said=said, reward_timeout_seconds=0.2, reward_max_failures=2)
    assert score(made).totals_S == [1.0, 1.0]
    release.clear()
    assert made.tallies["hangs"].abandoned == 1
    assert any("hangs failed" in text and "left behind (1 so far)" in text for text in said)
    assert any("hangs_too failed" in text and "within 0.2 s" in text for text in said)
    with pytest.raises(RunFailedError, match="2 times in a row; the last time it gave no answer within"):
        score(made)
    release.set()


def test_a_verification_that_hangs_costs_its_completion_only(scorer: Callable[..., Scorer]) -> None:
    made = scorer("accuracy", verifier_timeout_seconds=1.0, reward_timeout_seconds=0.1)
    texts = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{2x+14}{2}}", r"\boxed{y+7}"]
    found = asyncio.run(made.score(["p"] * 3, texts, [[1]] * 3, {"answer": ["x+7"] * 3}))
    assert found.totals_S == [None, 1.0, 0.0]
    _, tallies = made.noted()
    assert tallies["verifier/killed"] == 1
    assert tallies["rewards/accuracy/no_score"] == 1
    assert tallies["rewards/accuracy/failures"] == 0
    assert not any(made.noted()[1].values())  # since the last time


def test_verifiers_that_cannot_start_end_the_run(scorer: Callable[..., Scorer]) -> None:
    made = scorer("accuracy", reward_max_failures=2)
    made.pool.memory_mb = 20

    def verify() -> Scores:
        return asyncio.run(made.score(["p"], [r"\boxed{x+1}"], [[1]], {"answer": ["y"]}))

    assert verify().totals_S == [None]
    with pytest.raises(RunFailedError, match=r"(?s)accuracy failed 2 times in a row.*did not start"):
        verify()


def test_cancelling_a_call_cancels_its_functions(scorer: Callable[..., Scorer]) -> None:
    ended: list[str] = []

    async def long(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("long")
        return []

    async def run() -> None:
        task = asyncio.ensure_future(scorer(long).score(PROMPTS, COMPLETIONS, IDS, COLUMNS))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == ["long"]


def test_columns_of_another_length_are_the_callers_mistake(scorer: Callable[..., Scorer]) -> None:
    with pytest.raises(ValueError, match="2 completions, but 1 answer"):
        asyncio.run(scorer("boxed").score(PROMPTS, COMPLETIONS, IDS, {"answer": [1]}))
