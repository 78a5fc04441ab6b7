"""The benchmarks of the online methods run in miniature, and what they compare is the same; speed is not asserted."""

import json
from pathlib import Path

import pytest
from benchmarks.test_benchmarks import run, table_rows
from support.benchmark_run import run_benchmark
from support.recipe_run import ROOT


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_rl_step_quick(tmp_path: Path) -> None:
    """TRL's own update of the same rollouts has the same loss and gradient, before and after an optimizer step."""
    document, measurements = tmp_path / "benchmarks.md", tmp_path / "measurements.json"
    where = ["--document", str(document), "--measurements", str(measurements)]
    run_benchmark("rl_step.py", "--quick", "--threads", "1", *where, log=tmp_path / "log")
    done = json.loads(measurements.read_text())
    update, whole = (next(found for name, found in done.items() if name.startswith(k)) for k in ("update", "grpo"))
    for toolkit in ("trl", "trl_selecting"):
        for figure in ("losses", "grad_norms"):
            assert update[0]["llmrl"][figure] == pytest.approx(update[0][toolkit][figure], abs=1e-5)
    first, second = update[0]["llmrl"]["losses"]
    assert abs(first) > 1e-3
    assert first != second
    for one in whole[0].values():
        assert len(one["laps"]) == len(one["rewards"]) == len(one["rollout_seconds"]) == 2
        assert all(tokens >= 16 for _, tokens in one["rewards"])
        assert all(norm > 0 for norm in one["grad_norms"])
    assert len(table_rows(document, "tiny")[0]) == 11
    assert [len(row) for row in table_rows(document, "grpo, tiny")] == [10, 4]


@pytest.mark.slow
def test_loop_memory_quick(tmp_path: Path) -> None:
    """All ways learn from the same number of tokens, or it fails; LOOP's step needs no second model."""
    document = tmp_path / "benchmarks.md"
    run_benchmark("loop_memory.py", "--quick", "--threads", "1", "--document", str(document), log=tmp_path / "log")
    rows = table_rows(document, "tiny")
    assert [row[0] for row in rows] == ["tiny, full", "tiny, LoRA"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
def test_collector_quick(tmp_path: Path) -> None:
    """The bare engine samples what the collector does, or it fails."""
    document = tmp_path / "benchmarks.md"
    run("collector.py", "--quick", "--threads", "1", "--engines", "huggingface", "--document", str(document))
    throughput, sleeper = table_rows(document, "huggingface")
    assert int(throughput[1]) > 8
    assert float(sleeper[5]) > 0.5
    assert {row[0] for row in table_rows(document, "generate")} == {"generate", "generate_batch"}
    assert "6 answers of\n`generate` and 6 of `generate_batch` are the same" in document.read_text()


def test_given_rollouts_are_the_same_for_both_toolkits(benchmarks: None) -> None:
    import rl_worker
    from rl_workloads import Cell, given_steps

    cell = Cell("update", "tiny", 24, 2, 2, vocabulary=64)
    step = given_steps(cell)[1]
    assert step == given_steps(cell)[1] != given_steps(cell)[0]
    batch, groups = rl_worker.padded_batch(step), rl_worker.token_groups(step)
    sequences = [sequence for group in groups for sequence in group]
    assert len(sequences) == len(batch["prompt_ids"]) == 16
    assert batch["num_items_in_batch"] == sum(s.num_scored for s in sequences)
    for i, sequence in enumerate(sequences):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1].tolist()
        answer = batch["completion_ids"][i][batch["completion_mask"][i] == 1].tolist()
        assert sequence.token_ids.tolist() == prompt + answer
        assert sequence.token_ids[sequence.scored].tolist() == answer
        assert sequence.token_values["advantages"].tolist() == [batch["advantages"][i].item()] * len(answer)
    assert not batch["prompt_mask"][:, 0].all()
    assert not batch["completion_mask"][:, -1].all()


def test_a_difference_ends_the_benchmark(benchmarks: None) -> None:
    import rl_step
    from rl_workloads import Cell

    cell = Cell("update", "tiny", 24, 2, 2)
    equal = {"losses": [0.1, 0.2], "grad_norms": [3.0, 4.0]}
    same = {toolkit: dict(equal) for toolkit in rl_step.TOOLKITS}
    rl_step.check_equal(cell, [same])
    for wrong in (
        {"losses": [0.1, 0.20002]},
        {"grad_norms": [3.0, 4.0001]},
        {"losses": [0.1]},
        {"losses": [0.1, float("nan")]},
        {"grad_norms": [float("nan"), 4.0]},
    ):
        with pytest.raises(SystemExit, match="tiny, prompts of 24"):
            rl_step.check_equal(cell, [same, same | {"trl_selecting": equal | wrong}])


def test_a_step_is_counted_once_warm(benchmarks: None) -> None:
    from rl_step import per_step, tokens_a_step

    one = {"laps": [[10.0, 5.0], [11.0, 5.5], [14.0, 6.5]], "rewards": [[0.1, 100], [0.1, 30], [0.1, 50]]}
    assert [per_step(one, 0), per_step(one, 1)] == [2.0, 0.75]
    assert tokens_a_step(one) == 40
    single = {"laps": [[10.0, 5.0]], "rewards": [[0.1, 100]]}
    assert [per_step(single, 1), tokens_a_step(single)] == [5.0, 100]
