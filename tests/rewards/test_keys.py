"""How a configuration says what is rewarded."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config import parse, parse_file, to_yaml
from llmrl.errors import RefusedError
from llmrl.rewards.keys import RewardKeys

YAML = """
rewards:
  - function: accuracy
    weight: 0.8
  - function: exploration
    weight: 0.2
    options: {scale: 250, before_box: true, unit: characters}
  - boxed
  - function: my/rewards.py:polite
    options: {words: [please, "3"], most: 3}
reward_clip: 10
"""


def test_a_file_gives_functions_weights_and_typed_options_and_can_be_given_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML)
    keys = parse_file(RewardKeys, tmp_path / "a.yaml")
    assert [(entry.function, entry.weight) for entry in keys.rewards] == [
        ("accuracy", 0.8), ("exploration", 0.2), ("boxed", 1.0), ("my/rewards.py:polite", 1.0),
    ]  # fmt: skip
    assert keys.rewards[1].options == {"scale": 250, "before_box": True, "unit": "characters"}
    assert keys.rewards[3].options == {"words": ["please", "3"], "most": 3}
    assert [entry.label for entry in keys.rewards] == ["accuracy", "exploration", "boxed", "polite"]
    (tmp_path / "b.yaml").write_text(to_yaml(keys))
    assert parse_file(RewardKeys, tmp_path / "b.yaml") == keys


def test_the_command_line_takes_names_and_lists() -> None:
    keys = parse(RewardKeys, ["--rewards", "accuracy,format"]).config
    assert [entry.function for entry in keys.rewards] == ["accuracy", "format"]
    keys = parse(RewardKeys, ["--rewards", "[{function: org/model, weight: 2, name: judge}]"]).config
    assert (keys.rewards[0].label, keys.rewards[0].weight) == ("judge", 2)
    assert parse(RewardKeys, ["--rewards", "org/model"]).config.rewards[0].label == "model"


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[{functio: boxed}]", "unknown key `functio`; did you mean `function`"),
        ("[{weight: 1}]", "key `function` is missing"),
        ("[{function: boxed, weight: much}]", "`weight`: .*number"),
        ("boxed,boxed", "two functions are called `boxed`; give each a `name`"),
        ("[a/f.py:f, b/f.py:f]", "two functions are called `f`"),
        ("[{function: boxed, weight: 0}]", "every weight is 0"),
        ("[]", "key `rewards`"),
    ],
)
def test_mistakes(rewards: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        parse(RewardKeys, ["--rewards", rewards])


def test_keys_load_without_heavy_libraries() -> None:
    program = (
        "import sys, llmrl.rewards.keys; sys.exit(bool({'torch', 'transformers', 'math_verify'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
