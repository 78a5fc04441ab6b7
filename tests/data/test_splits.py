"""Training and held-out rows: disjoint, also in their prompts, whatever the order of the file."""

from types import SimpleNamespace
from typing import Any

from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.data.splits import Rows, train_and_heldout


def keys(**changed: Any) -> SimpleNamespace:
    values = {
        "dataset_name": "unused", "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test",
        "eval_rows": 64,
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def divided(rows: Dataset | DatasetDict, **changed: Any) -> tuple[Rows, Rows | None, str]:
    said: list[str] = []
    train, heldout = train_and_heldout(keys(**changed), said.append, rows)
    return train, heldout, "\n".join(said)


def pairs(count: int, per_prompt: int = 1) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i // per_prompt}?", "chosen": f"a{i}", "rejected": "b"} for i in range(count)]
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 20))
def test_rows_are_on_one_side_and_so_are_prompts(count: int, per_prompt: int, wanted: int) -> None:
    rows = pairs(count, per_prompt)
    train, heldout, _ = divided(rows, eval_rows=wanted)
    numbers = [*train.numbers, *(heldout.numbers if heldout else [])]
    assert sorted(numbers) == list(range(1, count + 1))
    for part in (train, heldout):
        for index, number in enumerate(part.numbers if part else []):
            assert part is not None
            assert part.table[index] == rows[number - 1]
    if heldout:
        assert len(heldout) <= min(wanted, max(count // 10, 1))
        assert not set(train.table["prompt"]) & set(heldout.table["prompt"])


def test_the_choice_does_not_depend_on_the_order_of_the_file() -> None:
    rows = pairs(200)
    _, heldout, _ = divided(rows, eval_rows=10)
    _, again, _ = divided(rows.select(list(range(199, -1, -1))), eval_rows=10)
    assert heldout is not None
    assert again is not None
    assert len(heldout) == 10
    assert set(heldout.table["prompt"]) == set(again.table["prompt"])


def test_dialogues_with_the_same_implicit_prompt_stay_together() -> None:
    begin = "\n\nHuman: {}\n\nAssistant:"
    rows = [
        {"chosen": begin.format(i // 2) + f" a{i}", "rejected": begin.format(i // 2) + f" b{i}"} for i in range(100)
    ]
    train, heldout, _ = divided(Dataset.from_list(rows), eval_rows=10)
    assert heldout is not None
    prompts = [{text.split("Assistant:")[0] for text in part.table["chosen"]} for part in (train, heldout)]
    assert len(heldout) == 10
    assert not prompts[0] & prompts[1]


def test_the_sources_own_test_split_is_taken_whole() -> None:
    train, heldout, said = divided(DatasetDict(train=pairs(50), test=pairs(30)), eval_rows=10)
    assert heldout is not None
    assert (len(train), len(heldout)) == (50, 30)
    assert "30 rows held out" in said


def test_nothing_is_held_out_when_nothing_is_wanted() -> None:
    train, heldout, said = divided(DatasetDict(train=pairs(50), test=pairs(30)), eval_rows=0)
    assert heldout is None
    assert len(train) == 50
    assert "none held out" in said


def test_one_prompt_for_all_rows_cannot_be_divided_and_that_is_said() -> None:
    train, heldout, said = divided(pairs(20, per_prompt=20))
    assert heldout is None
    assert len(train) == 20
    assert "too few different prompts" in said


def test_the_number_of_rows_on_each_side_is_said() -> None:
    _, _, said = divided(pairs(100), eval_rows=10)
    assert "90 rows to train on, 10 held out" in said
