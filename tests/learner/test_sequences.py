"""Token sequences on their way through checkpoints and files."""

import json
from dataclasses import MISSING, fields

import numpy as np

from llmrl.learner.sequences import TokenSequence, restored, stored

WHOLE = TokenSequence(
    token_ids=np.array([3, 1, 4, 1, 5, 9]),
    scored=np.array([False, True, True, False, False, True]),
    turn_index=np.array([0, 0, 0, 0, 1, 1]),
    reference_logprobs=np.array([-0.1, -1 / 3, -7], np.float32),
    behaviour_logprobs=np.array([-0.2, -2 / 3, 0], np.float32),
    token_values={"success_rate": np.array([0.5, 0.25, 1 / 7], np.float32)},
    values={"reward": 1 / 3},
    weight=2.5,
    continues=True,
)


def test_no_field_is_lost() -> None:
    for each in fields(TokenSequence):  # so that a field that is added later is asked about, too
        assert each.default is MISSING or getattr(WHOLE, each.name) is not each.default, f"{each.name} is as by default"
    again = restored(json.loads(json.dumps(stored(WHOLE))))
    for name, value in vars(WHOLE).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
            assert getattr(again, name).dtype == value.dtype, name
    np.testing.assert_array_equal(again.token_values["success_rate"], WHOLE.token_values["success_rate"])
    assert (again.values, again.weight, again.continues) == (WHOLE.values, WHOLE.weight, WHOLE.continues)
    plain = TokenSequence(np.array([1, 2]), np.array([False, True]))
    assert (restored(stored(plain)).turn_index, restored(stored(plain)).reference_logprobs) == (None, None)
