"""The project's own commands, given one after the other by a program that goes through stages, and shown as one would
type them."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from llmrl.files import read_json


def launch(root: Path, script: str, config: Path, *arguments: str) -> list[str]:
    """The words after `python` of a recipe's command, on this machine's CPU; `root` is the checkout, `script` such as
    dpo/run.py."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(root / "launch/accelerate/cpu.yaml")]
    return [*words, str(root / "recipes" / script), "--config", str(config), *arguments]


def is_done(output_dir: Path) -> bool:
    """Whether the run in this directory has come to its end."""
    return bool(read_json(output_dir / "summary.json", {}).get("status") == "completed")


def run_shown(console: Console, title: str, words: list[str], root: Path) -> float:
    """Run `python WORDS` in the checkout, shown as a heading and a command; returns its seconds.

    Where it fails, the process ends with its exit code: the same command, given again, is to go on from there.
    """
    console.rule(f"[bold]{title}")
    shown = shlex.join(["python", *words]).replace(f"{root}/", "")
    shown = shown.replace("python -m accelerate.commands.launch", "accelerate launch")
    shown = shown.replace("python -m llmrl.cli", "llmrl")
    console.print(shown, style="dim", soft_wrap=True, markup=False, highlight=False)
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    code = _waited_for(subprocess.Popen([sys.executable, *words], cwd=root, env=environment))
    if code:
        console.print(f"[bold red]stopped[/] (exit code {code}); the same command goes on from here")
        sys.exit(code if code > 0 else 128 - code)
    seconds = time.monotonic() - began
    console.print(f"done in {seconds:.0f} s")
    return seconds


def _waited_for(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code. Ctrl-C goes to it as well, and it may take a moment to save what it has done."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
