"""Where models come from: the names that a configuration may use, and the two small models that need no model hub."""

import os
from collections.abc import Callable
from pathlib import Path

from llmrl.errors import RefusedError
from llmrl.models.smollm2 import HUB_ID, smollm2
from llmrl.models.starter import starter

__all__ = ["BUNDLED", "resolve", "smollm2", "starter"]

Say = Callable[[str], None]

BUNDLED: dict[str, Callable[[Say], Path]] = {"smollm2": smollm2, HUB_ID: smollm2, "starter": starter}


def _say_on_main(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def resolve(name: str, say: Say = _say_on_main) -> str:
    """The folder or hub id of a model; `smollm2` and `starter` are fetched or trained on first use.

    Raises `RefusedError` for a path that is not there or holds no model.
    """
    if name in BUNDLED:
        return str(BUNDLED[name](say))
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise RefusedError(
                f"model_name_or_path: the folder {name} holds no model (neither config.json nor adapter_config.json). "
                "Remedy: name the folder into which a model was saved, such as OUTPUT_DIR/final."
            )
        return str(path)
    if path.exists():
        raise RefusedError(f"model_name_or_path: {name} is a file. Remedy: name the folder that the model is in.")
    if name.startswith(("/", "./", "../", "~", "runs/")) or name.count("/") > 1:
        raise RefusedError(
            f"model_name_or_path: there is no folder {name}. Remedy: correct the path, or name a hub id "
            f"(OWNER/NAME), or one of {', '.join(short for short in BUNDLED if '/' not in short)}."
        )
    return name
