"""The function of the user's that a key names, `FILE.py:FUNCTION` or `PACKAGE.MODULE:FUNCTION`.

Invariant: whatever is wrong with it that can be seen without calling it is refused here.
"""

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llmrl.config.nearest import nearest
from llmrl.errors import RefusedError

FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)|(?P<module>[A-Za-z_][\w.]*):(?P<attribute>\w+)")


def function_named(name: str, key: str) -> Callable[..., Any]:
    """The function that the configuration's `key` names: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION. Raises
    RefusedError for what is not there or cannot be loaded."""
    match = FUNCTION.fullmatch(name)
    if match is None:
        raise RefusedError(f"{key}: `{name}` names no function; write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    module = _file(match["file"], key) if match["file"] else _module(match["module"], key)
    return _attribute(module, match["name"] or match["attribute"], name, key)


def file_named(name: str) -> Path | None:
    """The file in which a function or class of one's own stands, where it is named as FILE.py:NAME and is there."""
    match = FUNCTION.fullmatch(name)
    file = Path(match["file"]).expanduser().resolve() if match and match["file"] else None
    return file if file and file.is_file() else None


def _file(path: str, key: str) -> ModuleType:
    """The module in a file, under a name that no other has, so that it hides nothing and is found by pickle."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise RefusedError(f"{key}: {path}: there is no such file (looked for {file})")
    name = f"llmrl_own_{file.stem}_{zlib.crc32(str(file).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RefusedError(f"{key}: {path} cannot be loaded: {_last_lines(error)}") from error
    return module


def _module(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RefusedError(
            f"{key}: the module {name} cannot be imported: {_last_lines(error)}. Install it, or name a file: "
            "FILE.py:FUNCTION"
        ) from error


def _attribute(module: ModuleType, attribute: str, name: str, key: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if callable(found):
        return found
    if found is not None:
        raise RefusedError(f"{key}: {name} is {type(found).__name__}, not a function")
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    hint = f"; did you mean `{nearest(attribute, functions)}`?" if functions else "; there is no function in it"
    raise RefusedError(f"{key}: {name}: there is no `{attribute}` there{hint}")


def _last_lines(error: BaseException) -> str:
    """Where it happened and what it was."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return where + "".join(traceback.format_exception_only(error)).strip()
