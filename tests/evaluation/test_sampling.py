"""`llmrl sample`: what it writes is what was sampled, whatever it is made into, and what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pairs import assistant, keys, user
from support.recipe_run import ROOT, make_model
from support.words import WORDS, word_tokenizer
from transformers import AutoModelForCausalLM

from llmrl import cli
from llmrl.config.parse import parse
from llmrl.data.scored import prepare_scored
from llmrl.errors import RefusedError
from llmrl.evaluation.sampling.keys import ASKING, SampleKeys
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import completion

REWARD = "def words(completions, level, **columns):\n    return [None if l == 3 else float(l) for l in level]\n"
SCORED = {
    "prompt": "2+2=", "completions": ["4", "5", "four", "4 and"], "rewards": [1.0, 0.0, 2.0, -1.0],
    "ended": [True, True, True, False], "answer": "4",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What there is to sample from: a model and prompts, a run with its rollouts, a file of samples."""
    root = tmp_path_factory.mktemp("sampling")
    make_model(root / "model")
    (root / "reward.py").write_text(REWARD)
    prompts = [{"prompt": " ".join(WORDS[i : i + 3]), "level": i} for i in range(4)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (root / "other.jsonl").write_text('{"prompt": "red", "level": 1}\n{"prompt": null, "level": 1}\n')
    (root / "samples.jsonl").write_text(json.dumps(SCORED) + "\n")
    (root / "bad.jsonl").write_text(json.dumps({**SCORED, "rewards": [1.0]}) + "\n")
    run = root / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(f"model_name_or_path: {root / 'model'}\nchat_template_kwargs: {{thinking: false}}")
    for step in (2, 10):
        lines = [line(f"{word} {step}", reward) for word, reward in (("one", 1.0), ("two", 0.0))]
        (run / "rollouts" / f"step_{step}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (root / "empty").mkdir()
    (root / "empty" / "config.yaml").write_text("model_name_or_path: x\n")
    return {"root": str(root), **{path.stem: str(path) for path in root.iterdir()}}


def line(said: str, reward: float) -> dict[str, Any]:
    return {
        "row": 5, "reward": reward, "end_state": "completed", "ends_in_stop": True, "num_turns": 1,
        "opening": [user("red")], "messages": [assistant(said)],
    }  # fmt: skip


def command(files: dict[str, str], output: Path, *words: str) -> list[str]:
    return ["sample", "--output", str(output), *(word.format(**files) for word in words)]


def asking(*words: str) -> tuple[str, ...]:
    model = ("--model", "{model}", "--prompts", "{prompts}", "--rewards", "{reward}:words")
    return (*model, "--samples_per_prompt", "3", "--max_new_tokens", "6", *words)


def made(files: dict[str, str], tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    output = tmp_path / "new" / "made.jsonl"
    assert cli.run(command(files, output, *words)) == 0
    rows = [json.loads(text) for text in output.read_text().splitlines()]
    output.unlink()
    return rows


def test_what_is_sampled_is_read_back_token_for_token(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made(files, tmp_path, *asking())
    assert "4 of 4 prompts, 12 samples" in capsys.readouterr().out
    assert [row["rewards"] for row in rows] == [[0.0] * 3, [1.0] * 3, [2.0] * 3, [None] * 3]
    assert [row["level"] for row in rows] == [0, 1, 2, 3]
    output = tmp_path / "scored.jsonl"
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RefusedError, match="row 4, column `rewards`: 0 of 3"):
        prepare_scored(keys(dataset_name=str(output)), word_tokenizer(), print)
    data = prepare_scored(keys(dataset_name=str(output)), word_tokenizer(), print, faulty_rows="drop")
    assert [row["completion_ids"] for row in data.train] == [row["completion_ids"] for row in rows[:3]]
    # The log-probabilities in the file are the learner's own, so prompts and samples are those that the model saw.
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    learner = Learner(model, LearnerOptions(), say=lambda text: None)
    groups = [tuple(completion(row["prompt_ids"], ids) for ids in row["completion_ids"]) for row in data.train]
    for row, found in zip(data.train, learner.logprobs(groups), strict=True):
        for given, scored in zip(row["logprobs"], found, strict=True):
            assert np.allclose(given, scored, atol=1e-4)


def test_a_file_of_samples_becomes_other_forms(files: dict[str, str], tmp_path: Path) -> None:
    def of(form: str, *words: str) -> list[dict[str, Any]]:
        return made(files, tmp_path, "--from_samples", "{samples}", "--form", form, *words)

    def texts(form: str, *words: str) -> list[tuple[str, str]]:
        return [(row["chosen"], row["rejected"]) for row in of(form, *words)]

    assert of("scored") == [SCORED]
    assert texts("pairs") == [("4", "5")]
    assert texts("pairs", "--right_above", "1", "--pairs_per_prompt", "9") == [("four", "4"), ("four", "5")]
    assert texts("pairs", "--right_above", "1", "--max_rows", "1") == [("four", "4")]
    assert texts("best_and_worst") == [("four", "5")]
    assert [row["completion"] for row in of("best", "--right_above", "null")] == ["four"]
    (row,) = of("segments")
    assert row["answer"] == "4"
    assert [(s["prompt"], s["completion"], s["score"], s["ends"]) for s in row["segments"]] == [
        ("2+2=", "4", 1.0, True), ("2+2=", "5", 0.0, True), ("2+2=", "four", 2.0, True), ("2+2=", "4 and", -1.0, False)
    ]  # fmt: skip


def test_a_runs_rollouts_become_rows_step_by_step(files: dict[str, str], tmp_path: Path) -> None:
    rows = made(files, tmp_path, "--from_run", "{run}", "--form", "pairs")
    assert [row["chosen"] for row in rows] == [[assistant("one 2")], [assistant("one 10")]]
    assert (rows[0]["prompt"], rows[0]["chat_template_kwargs"]) == ([user("red")], {"thinking": False})
    (row,) = made(files, tmp_path, "--from_run", "{run}", "--steps", "10", "--form", "segments")
    assert [segment["score"] for segment in row["segments"]] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "give one source of answers"),
        (["--model", "{model}"], 2, "prompts: name what the model is to be asked"),
        (["--from_run", "{run}", "--seed", "1"], 2, "seed is for answers from model"),
        (["--from_samples", "{samples}", "--steps", "1"], 2, "steps is for answers from from_run"),
        (["--from_samples", "{samples}", "--form", "pairs", "--right_above", "null"], 2, "best_and_worst"),
        (["--from_samples", "{bad}", "--form", "pairs"], 2, "row 1, column `rewards`: 1 entries for 4"),
        (["--from_samples", "{prompts}"], 2, "no column `completions`"),
        (["--from_samples", "{samples}", "--form", "pairs", "--least_rows", "9"], 1, "only 1 rows of form pairs"),
        (["--from_run", "{root}"], 2, "is not a run directory"),
        (["--from_run", "{empty}"], 2, "has no rollouts; none is there"),
        (["--from_run", "{run}", "--steps", "2,3"], 2, "no rollouts of step 3; those of steps 2, 10 are there"),
        (asking("--prompts", "{other}"), 2, "row 2, column `prompt`: null"),
        (asking("--rewards", "correct_number"), 2, "the reward function correct_number needs"),
        (asking("--max_new_tokens", "100000"), 2, "row 1, column `prompt`: "),
        (asking("--model", "{root}"), 2, "model: the folder"),
        (asking("--split", "test"), 2, "no split `test`"),
        (asking("--prompts", "{root}/nothing.jsonl"), 2, "check prompts"),
    ],
)
def test_a_mistake_leaves_no_file(
    files: dict[str, str], tmp_path: Path, words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command(files, tmp_path / "made.jsonl", *words)) == code
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over_and_a_dry_run_writes_nothing(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for output, says in ((there, "is there already"), (there / "below.jsonl", "cannot be written below")):
        assert cli.run(command(files, output, "--from_samples", "{samples}")) == 2
        assert says in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert cli.run(command(files, tmp_path / "dry.jsonl", *asking(), "--dry-run")) == 0
    assert "# answers  3 of " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


def test_the_quickstart_asks_for_pairs_by_keys_that_there_are() -> None:
    spec = importlib.util.spec_from_file_location("quickstart_run", ROOT / "recipes/quickstart/run.py")
    assert spec is not None
    assert spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = quickstart  # dataclasses look their module up
    spec.loader.exec_module(quickstart)
    for preset, most in (("laptop", 112), ("tiny", 960)):
        words = quickstart.sampling("model", "problems", "pairs.jsonl", preset)
        assert words[:3] == ["-m", "llmrl.cli", "sample"]
        config = parse(SampleKeys, words[3:]).config
        assert (config.form, config.max_rows, config.least_rows, config.pairs_per_prompt) == ("pairs", most, 32, 2)


def test_the_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sample", "--help"]) == 0
    text = capsys.readouterr().out
    shared = {name for name in ASKING if name.startswith(("reward_", "verifier_"))}  # docs/rewards.md has them
    assert [name for name in SampleKeys.model_fields if f"--{name}" not in text and name not in shared] == []
