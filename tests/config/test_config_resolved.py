"""The resolved file, and the fingerprint that decides which checkpoints a run may go on from."""

from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from llmrl.config import (
    DataKeys,
    Housekeeping,
    Keys,
    ModelKeys,
    OptimizationKeys,
    RunKeys,
    TaskEvaluationKeys,
    differing_keys,
    fingerprint,
    result_keys,
    to_yaml,
)


class Section(Keys):
    """A section."""

    kind: str = "slow"
    """Kind."""
    patience: Annotated[float, Housekeeping()] = 1.0
    """Patience."""
    options: dict[str, int] = Field(default_factory=dict)
    """Options."""


class Toy(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy."""

    method: Literal["toy"] = "toy"
    pause: Annotated[float, Housekeeping()] = 0.0
    engine: Section = Field(default_factory=Section)
    task_evaluation: TaskEvaluationKeys | None = None


def toy(**keys: object) -> Toy:
    return Toy.model_validate(
        {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "learning_rate": 1e-4, **keys}
    )


def test_the_method_comes_first_and_every_key_is_there():
    values = yaml.safe_load(to_yaml(toy()))
    assert next(iter(values)) == "method"
    assert set(values) == set(Toy.model_fields) - {"resume_from_checkpoint"}


def test_resuming_is_not_baked_in():
    assert "resume" not in to_yaml(toy(resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "text", ["no", "null", "1e-4", "010", "2024-01-01", "yes", "~", "1:30", "0x1F", "a: b", "# x", "é"]
)
def test_text_that_looks_like_something_else_is_quoted_for_old_readers_and_new(text: str):
    assert yaml.safe_load(to_yaml(toy(run_name=text)))["run_name"] == text


def test_paths_stay_as_they_were_given():
    assert yaml.safe_load(to_yaml(toy(dataset_name="../data/x.jsonl")))["dataset_name"] == "../data/x.jsonl"


@pytest.mark.parametrize(
    "housekeeping",
    [
        {"output_dir": "elsewhere"}, {"run_name": "x"}, {"save_steps": 3}, {"save_total_limit": None},
        {"eval_steps": 3}, {"logging_steps": 5}, {"report_to": "wandb"}, {"push_to_hub": True},
        {"hub_model_id": "me/x"}, {"resume_from_checkpoint": "latest"},
        {"tokens_per_microbatch": 64}, {"gradient_checkpointing": True},
        {"pause": 1.0}, {"engine": {"patience": 3.0}},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_change_the_weights_does_not_change_the_fingerprint(housekeeping: dict[str, object]):
    assert fingerprint(toy(**housekeeping)) == fingerprint(toy())


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-4}, {"seed": 1}, {"dataset_name": "e"}, {"max_steps": 5}, {"max_length": 8},
        {"use_peft": True}, {"lora_r": 4}, {"model_name_or_path": "n"}, {"eval_rows": 3}, {"warmup_ratio": 0.1},
        {"engine": {"kind": "fast"}}, {"engine": {"options": {"a": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_weights_changes_it_and_is_named(change: dict[str, object]):
    other = toy(**change)
    assert fingerprint(other) != fingerprint(toy())
    key, value = next(iter(change.items()))
    key = f"{key}.{next(iter(value))}" if isinstance(value, dict) else key
    assert [line.split(":")[0] for line in differing_keys(other, result_keys(toy()))] == [key]


def test_a_stored_file_is_compared_by_the_same_keys():
    config = toy(engine={"kind": "fast", "patience": 3.0, "options": {"a": 1}})
    assert result_keys(config, yaml.safe_load(to_yaml(config))) == result_keys(config)
    assert result_keys(toy(), {"seed": 3, "engine": {"patience": 9.0}, "unknown": 1}) == {"seed": 3}


def test_a_key_that_an_older_version_did_not_have_is_named_as_absent():
    stored = result_keys(toy())
    del stored["seed"]
    stored["gone"] = 3
    assert differing_keys(toy(), stored) == ["seed: (absent) -> 42", "gone: 3 -> (absent)"]
