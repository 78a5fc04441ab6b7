"""The comparison of offline methods: its commands are ones that the recipes take, what is done stays done, and the
table says what the runs say. (That it trains is what the recipes' own tests show.)"""

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.recipe_run import ROOT

from llmrl.config.parse import parse
from llmrl.evaluation.sampling.keys import SampleKeys
from llmrl.trainers import METHODS

TRAINERS = {"sft_best": "sft", "brain": "brain_offline"}
"""Of those whose name in the comparison is another."""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "compare"))
    spec = importlib.util.spec_from_file_location("compare_run", ROOT / "recipes" / "compare" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_command_is_one_that_its_recipe_takes(compare: Any, tmp_path: Path) -> None:
    args = compare.parsed(["--output_dir", str(tmp_path), "--steps", "7"])
    for name, method in compare.METHODS.items():
        words = compare.command(args, method, tmp_path / "seed_3", tmp_path / "out", 3)
        script = next(i for i, word in enumerate(words) if word.endswith("run.py") or word.endswith("run_offline.py"))
        assert Path(words[script]).exists()
        config = parse(import_module(METHODS[TRAINERS.get(name, name)]).Config, words[script + 1 :]).config
        assert (config.max_steps, config.seed) == (7, 3)
        assert config.task_evaluation.dataset_name == "data/arithmetic/problems"
        per_step = {
            "sft_best": lambda c: c.sequences_per_step,
            "cpl": lambda c: 2 * c.comparisons_per_step,
            "brain": lambda c: compare.SAMPLES_PER_PROMPT * c.prompts_per_step,
            "direct_advantage": lambda c: 64,  # the actions of its states are as many as they are
        }.get(name, lambda c: 2 * c.pairs_per_step)
        assert per_step(config) == compare.COMPLETIONS_PER_STEP, name


def test_the_samples_are_asked_for_by_a_command_that_llmrl_takes(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(console: object, title: str, words: list[str], root: Path) -> float:
        assert words[:3] == ["-m", "llmrl.cli", "sample"]
        keys = parse(SampleKeys, words[3:]).config
        assert (keys.seed, keys.form, [entry.function for entry in keys.rewards]) == (4, "scored", ["accuracy", "mine"])
        raise KeyboardInterrupt  # nothing more is to be run

    monkeypatch.setattr(compare, "run_shown", shown)
    with pytest.raises(KeyboardInterrupt):
        compare.main(["--seeds", "4", "--rewards", "accuracy", "mine", "--output_dir", str(tmp_path)])


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_what_is_done_is_not_done_again_and_the_table_says_it(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing_to_run(*_: object) -> float:
        raise AssertionError("everything is done")

    monkeypatch.setattr(compare, "run_shown", nothing_to_run)
    row = {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "completions": [said("2"), said("3"), said("4"), said("5")],
        "rewards": [1.0, 0.0, 0.0, 0.0],
    }
    for seed, after in enumerate((0.5, 0.6, 0.7)):
        folder = tmp_path / f"seed_{seed}"
        (folder / "dpo").mkdir(parents=True)
        (folder / "scored.jsonl").write_text(json.dumps(row) + "\n")
        summary = {"status": "completed", "steps": 60, "num_tokens": 1000 + seed, "seconds": 10.0}
        summary |= {"eval_before": {"task": {"accuracy": 0.45}}, "eval_after": {"task": {"accuracy": after}}}
        (folder / "dpo" / "summary.json").write_text(json.dumps(summary))
    assert compare.main(["--methods", "dpo", "--output_dir", str(tmp_path)]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "seed_0" / "pairs.jsonl").read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(said("2"), said("3")), (said("2"), said("4"))]
    assert not (tmp_path / "seed_0" / "best.jsonl").exists()  # which nobody asked for
    # 0.6 -+ 4.303 x 0.1 / sqrt(3)
    line = "| DPO | 50.0%, 60.0%, 70.0% | 60.0% [35.2%, 84.8%] | +15.0 points | 60 | 1,001 | 10 |"
    assert line in (tmp_path / "table.md").read_text()
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "start: 45.0%" in capsys.readouterr().out


def test_a_directory_is_one_comparisons(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other methods and seeds join what is there; what was made with other settings is never taken for this one's."""
    monkeypatch.setattr(compare, "shared_samples", lambda *_: None)
    run = {"before": 0.4, "after": 0.5, "steps": 60, "num_tokens": 1, "seconds": 1.0}
    monkeypatch.setattr(compare, "trained", lambda *_: run)
    for words in (["--methods", "vpo", "--seeds", "1"], ["--methods", "dpo", "--seeds", "0", "1"]):
        assert compare.main([*words, "--output_dir", str(tmp_path)]) == 0
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"vpo 1", "dpo 0", "dpo 1"}
    assert [line.split(" | ")[0] for line in (tmp_path / "table.md").read_text().splitlines()[2:]] == ["| DPO", "| VPO"]
    with pytest.raises(SystemExit, match="a comparison with --steps 60, and here it is 5"):
        compare.main(["--steps", "5", "--output_dir", str(tmp_path)])


def test_samples_that_teach_nothing_end_it(compare: Any, tmp_path: Path) -> None:
    folder = tmp_path / "seed_0"
    folder.mkdir()
    row = {"prompt": "1 + 1?", "completions": ["3", "4"], "rewards": [0.0, 0.0]}
    (folder / "scored.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match=r"scored.jsonl: only 0 rows of form pairs"):
        compare.main(["--methods", "dpo", "--seeds", "0", "--output_dir", str(tmp_path)])
