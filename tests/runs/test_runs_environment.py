"""environment.json: what a run was made with, and no secrets."""

import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from llmrl.runs import environment
from llmrl.runs.environment import describe_environment, without_secrets


def test_versions_hardware_and_arguments_are_there():
    found = json.loads(json.dumps(describe_environment(["run.py", "--seed", "3"])))
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == version("torch")
    assert found["packages"]["transformers"] == version("transformers")
    assert found["arguments"] == ["run.py", "--seed", "3"]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**28
    assert found["hardware"]["cpu"]
    assert isinstance(found["hardware"]["gpus"], list)


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    words = [
        "--hub_token",
        "s3cr3t",
        "--api_key=s3cr3t",
        "--password",
        "s3cr3t",
        "--max_new_tokens",
        "8",
        "--seed",
        "1",
    ]
    text = json.dumps(describe_environment(words))
    assert "s3cr3t" not in text
    assert without_secrets(words) == [
        "--hub_token", "(hidden)", "--api_key=(hidden)", "--password", "(hidden)",
        "--max_new_tokens", "8", "--seed", "1",
    ]  # fmt: skip


def test_a_secrets_key_without_a_value_hides_no_other_argument():
    assert without_secrets(["--hub_token", "--seed", "1"]) == ["--hub_token", "--seed", "1"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    ours = tmp_path / "environment.py"
    ours.write_text("")
    monkeypatch.setattr(environment, "__file__", str(ours))
    assert describe_environment([])["git"] is None
    git("init", "-q")
    assert describe_environment([])["git"] is None, "not tracked: installed inside somebody else's repository"
    git("add", ".")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert describe_environment([])["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").write_text("")
    assert describe_environment([])["git"] == {"commit": commit, "dirty": False}
    ours.write_text("changed")
    assert describe_environment([])["git"] == {"commit": commit, "dirty": True}


def test_without_git_or_nvidia_tools_it_answers_all_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    found = describe_environment([])
    assert found["git"] is None
    assert found["hardware"]["gpus"] == []


def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 580.1'\necho 'NVIDIA H100, 81559 MiB, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpus = describe_environment([])["hardware"]["gpus"]
    assert gpus == [{"name": "NVIDIA H100", "memory.total": "81559 MiB", "driver_version": "580.1"}] * 2
