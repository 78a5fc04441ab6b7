"""What an environment's methods may return, and what is said of the rest."""

from typing import Any

import numpy as np
import pytest

from llmrl.envs.protocol import StepResult
from llmrl.envs.returned import opening, step_result

MESSAGE = {"role": "user", "content": "red"}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([MESSAGE], ([MESSAGE], None)),
        ((MESSAGE,), ([MESSAGE], None)),
        (([MESSAGE], [{"name": "add"}]), ([MESSAGE], [{"name": "add"}])),
        (([MESSAGE], None), ([MESSAGE], None)),
        ("red", ("red", None)),
    ],
)
def test_openings(returned: Any, expected: Any) -> None:
    assert opening(returned) == expected


@pytest.mark.parametrize("returned", [None, 7, [7], ["red"], ([MESSAGE], "add"), MESSAGE])
def test_what_is_no_opening(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"init\(\) returned .*expected a list of messages, or \(messages, tools\)"):
        opening(returned)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (StepResult([], True, {"won": 1}), StepResult([], True, {"won": 1.0})),
        (([MESSAGE],), StepResult([MESSAGE], False, {})),
        (((), np.bool_(True), {"won": np.float32(0.5)}), StepResult([], True, {"won": 0.5})),
    ],
)
def test_results(returned: Any, expected: StepResult) -> None:
    found = step_result(returned)
    assert found == expected
    assert [type(value) for value in found.rewards.values()] == [float] * len(found.rewards)


@pytest.mark.parametrize("returned", [None, "red", [MESSAGE], (), ([], True, 1.0), ("red", True), ([], True, {}, {})])
def test_what_is_no_result(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"step\(\) returned .*expected \(messages, done, rewards by name\)"):
        step_result(returned)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None, "much"])
def test_rewards_that_are_no_finite_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"the reward won .*no finite number"):
        step_result(([], True, {"won": value}))
