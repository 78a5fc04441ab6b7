"""`final/`, the trained model of a run: whole or not there, and on the hub where that was asked for."""

import shutil
from collections.abc import Callable
from pathlib import Path

from llmrl.runs.directory import Run

FINAL = "final"


def publish_model(run: Run, write: Callable[[Path], None], wait_for_everyone: Callable[[], None]) -> None:
    """Let all ranks `write` the model into a folder beside `final/`, which then takes that name; upload it if asked."""
    folder = run.directory / FINAL
    pending = folder.with_name(f".tmp_{FINAL}")
    if run.is_main:
        shutil.rmtree(pending, ignore_errors=True)
    wait_for_everyone()
    write(pending)
    wait_for_everyone()
    if run.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        pending.rename(folder)
        if run.config.push_to_hub:
            _upload(folder, run.config.hub_model_id or run.directory.resolve().name, run.note)
    wait_for_everyone()


def _upload(folder: Path, repository: str, say: Callable[[str], None]) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    found = api.create_repo(repository, exist_ok=True).repo_id
    api.upload_folder(folder_path=folder, repo_id=found, commit_message="Upload the trained model")
    say(f"pushed to the hub as {found}")
