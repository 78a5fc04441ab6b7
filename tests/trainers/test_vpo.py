"""VPO as whole runs of a tiny model: DPO where alpha is 0, calibration from each source, resumed bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.recipe_run import final_weights, make_pairs, metrics, run_method, write_config

from llmrl.config.parse import parse
from llmrl.errors import RefusedError
from llmrl.learner.sequences import TokenSequence
from llmrl.trainers.vpo import calibration
from llmrl.trainers.vpo import offline as vpo
from llmrl.trainers.vpo.calibration import FILE, read_answers, write_answers


def run(tmp: Path, *arguments: str, method: str = "vpo", code: int = 0, **settings: Any) -> Path:
    """A run of `method`; its directory."""
    output = str(tmp / settings.pop("name", "run"))
    config = write_config(tmp, output_dir=output, **settings)
    assert run_method(method, config, *arguments) == code
    return Path(output)


def with_column(tmp: Path) -> None:
    rows = [json.loads(line) for line in make_pairs(tmp / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["calibration"] = [row["chosen"], " seven eight"][: 1 + number % 2]
    (tmp / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_alpha_0_is_dpo_weight_for_weight(tmp_path: Path) -> None:
    ours = run(tmp_path, alpha=0, name="vpo")
    theirs = run(tmp_path, method="dpo", name="dpo")
    assert final_weights(ours) == final_weights(theirs)
    assert (ours / "evals.json").read_text() == (theirs / "evals.json").read_text()
    assert [line["loss"] for line in metrics(ours)] == [line["loss"] for line in metrics(theirs)]


@pytest.mark.parametrize("calibrated", ["chosen", "both", "column"])
def test_pessimism_makes_the_answers_that_calibrate_likelier(tmp_path: Path, calibrated: str) -> None:
    """From exactly 0: where the reference is precomputed, the answers are packed as in training. In a column they are
    here the rejected ones, so that each source has a mean log-ratio of its own."""
    rows = [json.loads(line) for line in make_pairs(tmp_path / "pairs.jsonl").read_text().splitlines()]
    texts = [json.dumps({**row, "calibration": [row["rejected"]]}) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(texts))
    alpha, beta = 5.0, 0.1
    lines = metrics(run(tmp_path, alpha=alpha, beta=beta, calibration=calibrated))
    assert lines[0]["calibration/log_ratio"] == 0.0
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    last = lines[-1]
    chosen, rejected = last["rewards/chosen"] / beta, last["rewards/rejected"] / beta
    expected = {"chosen": chosen, "both": (chosen + rejected) / 2, "column": rejected}
    assert expected[calibrated] == pytest.approx(last["calibration/log_ratio"], rel=1e-4)
    assert last["calibration/log_ratio"] > 0.1
    assert abs(chosen - rejected) > 0.1
    assert last["calibration_loss"] == pytest.approx(-alpha * beta * last["calibration/log_ratio"], rel=1e-4)


def test_a_resumed_run_keeps_its_samples_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = {"calibration": "reference", "calibration_samples": 2, "calibration_max_tokens": 5, "save_steps": 3}
    whole = run(tmp_path, name="whole", max_steps=6, **settings)
    lines = [json.loads(line) for line in (whole / FILE).read_text().splitlines()]
    assert len(lines) == 24  # the rows of 6 steps of 4 pairs, and no others
    assert all(len(line["texts"]) == 2 for line in lines)
    assert len({text for line in lines for text in line["texts"]}) > 20

    resume = ("--resume_from_checkpoint", str(whole / "checkpoints" / "step_3"))
    weights = final_weights(whole)
    again = run(tmp_path, *resume, name="whole", max_steps=6, **settings)
    assert final_weights(again) == weights
    assert "drawn again" not in (whole / "notes.log").read_text()
    lost = "{"
    edited = "".join(json.dumps({**line, "sequences": line["sequences"][:1]}) + "\n" for line in lines)
    for text in (lost, edited):  # drawn again from the initial weights, the same
        (whole / FILE).write_text(text)
        (whole / "notes.log").unlink()
        redrawn = run(tmp_path, *resume, name="whole", max_steps=6, **settings)
        assert final_weights(redrawn) == weights
        assert "drawn again" in (whole / "notes.log").read_text()
        assert [json.loads(line) for line in (whole / FILE).read_text().splitlines()] == lines


def test_samples_end_at_max_length_and_do_not_depend_on_it(tmp_path: Path) -> None:
    settings = {"calibration": "reference", "max_steps": 1}
    short = read_answers(run(tmp_path, name="short", max_length=16, **settings) / FILE)
    long = read_answers(run(tmp_path, name="long", **settings) / FILE)
    assert short.keys() == long.keys()
    assert max(len(group[0].token_ids) for group in short.values()) == 16
    assert max(len(group[0].token_ids) for group in long.values()) > 16
    for row, (answer,) in short.items():
        (longer,) = long[row]
        assert longer.token_ids[: len(answer.token_ids)].tolist() == answer.token_ids.tolist()


def test_answers_are_kept_as_they_are(tmp_path: Path) -> None:
    turns = TokenSequence(np.arange(6), np.array([0, 1, 1, 0, 0, 1], np.bool_))
    further = TokenSequence(np.arange(3), np.array([0, 0, 1], np.bool_), continues=True)
    write_answers(tmp_path / "rollouts" / "a.jsonl", {3: (turns, further), 1: ()}, str)
    found = read_answers(tmp_path / "rollouts" / "a.jsonl")
    assert found.keys() == {1, 3}
    assert found[1] == ()
    for kept, sequence in zip(found[3], (turns, further), strict=True):
        np.testing.assert_array_equal(kept.token_ids, sequence.token_ids)
        np.testing.assert_array_equal(kept.scored, sequence.scored)
        assert kept.continues == sequence.continues
    assert read_answers(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -1}, ["alpha"]),
        ({"alpha": 1e30}, ["alpha", "10000"]),
        ({"calibration": "column"}, ["no column `calibration`", "pairs.jsonl"]),
        ({"calibration_samples": 2}, ["calibration_samples", "calibration chosen"]),
        ({"calibration": "rejected"}, ["calibration", "chosen"]),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: list[str]
) -> None:
    folder = run(tmp_path, code=2, **settings)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(word in message for word in words), message
    assert not folder.exists()


def test_samples_of_a_model_that_is_nowhere_whole_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "zero_stage", lambda accelerator: 3)
    folder = run(tmp_path, code=2, calibration="reference")
    message = capsys.readouterr().err
    assert all(word in message for word in ("calibration: reference", "ZeRO-3", "calibration: column")), message
    assert not folder.exists()


def test_a_faulty_calibration_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_column(tmp_path)
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    rows[6] = json.dumps({**json.loads(rows[6]), "calibration": [""]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    run(tmp_path, code=2, calibration="column")
    message = capsys.readouterr().err
    assert all(word in message for word in ("row 7", "`calibration`", "empty")), message


def test_the_arithmetic_counts_calibration_answers(tmp_path: Path) -> None:
    def described(**settings: Any) -> dict[str, Any]:
        config = parse(vpo.VPOConfig, ["--config", str(write_config(tmp_path, **settings))]).config
        return vpo.describe(config, 2)

    assert described()["sequences per step"] == 8
    assert described(calibration="reference", calibration_samples=3)["sequences per step"] == "5 of each pair"
    assert described(alpha=0.2)["calibration"] == "chosen, weight alpha x beta = 0.02 a nat"
    with pytest.raises(RefusedError, match="pairs_per_step 1"):
        described(pairs_per_step=1)
