"""What is measured on GPUs runs in miniature without one; neither time nor memory is asserted."""

import json
import math
from pathlib import Path

import pytest
from support.benchmark_run import run_benchmark

pytestmark = pytest.mark.slow


def test_a_failing_check_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    words = ("--small", "--sections", "generate,nothing,head", "--out", str(tmp_path))
    run_benchmark("gpu_check.py", *words, log=tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines if "error" in line] == ["nothing"]
    cases = {line["case"]: line for line in lines if "case" in line}
    assert cases["engine, the same again"]["same_as_first"] == 1
    assert {"whole, frozen", "whole, trainable", "model.generate"} <= cases.keys()
    assert lines[-1]["section"] == "end"


def test_a_step_of_loop_by_phase(tmp_path: Path) -> None:
    run_benchmark("gpu_rl.py", "--small", "--out", str(tmp_path), log=tmp_path / "log")
    line = json.loads((tmp_path / "gpu_rl.jsonl").read_text())
    assert 0 < line["sampled_tokens"] <= 4 * 8 * 12
    assert 0 < line["computed_share"] < 1
    assert line["logp_difference_max"] < 0.2
    assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
