"""From a name to an environment: one that is built in, a task of reasoning-gym, or a class of the user's.

Invariants: everything that can be wrong with the name and the options is refused here, before anything expensive. A
user's file is run once per `load`; its folder is put at the end of sys.path, where it can shadow nothing, so that the
file can import its neighbours.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from llmrl.config.nearest import nearest
from llmrl.envs import calculator, number_guessing, question_answer, reasoning_tasks, wordle
from llmrl.envs.options import keyword_options
from llmrl.envs.protocol import EnvironmentKind, Row, Split
from llmrl.errors import RefusedError

BUILT_IN: dict[str, Callable[[dict[str, Any]], EnvironmentKind]] = {
    calculator.NAME: calculator.load,
    number_guessing.NAME: number_guessing.load,
    question_answer.NAME: question_answer.load,
    wordle.NAME: wordle.load,
}
METHODS = ("init", "step", "close")


def load(name: str, options: Mapping[str, Any] | None = None) -> EnvironmentKind:
    """The environment of this name: a key of `BUILT_IN`, `reasoning_gym:TASK`, `path/to/file.py:Class` or
    `package.module:Class`.

    `options` go to a built-in's options or to the class as keyword arguments. A class brings its own rows where it has
    a static or class method `rows(split, count, seed)`, and may say that an episode takes several messages (`multi_turn
    = True`). Raises RefusedError naming what is wrong: an unknown name with
    the nearest known one, a file with its line, an option as `environment_options.KEY`.
    """
    given = dict(options or {})
    if name in BUILT_IN:
        return BUILT_IN[name](given)
    place, colon, inner = name.rpartition(":")
    if not (colon and place and inner):
        close = nearest(name, BUILT_IN)
        raise RefusedError(
            f"unknown environment `{name}`; did you mean `{close}`? Others are `reasoning_gym:TASK`, "
            "`path/to/file.py:Class` and `package.module:Class`."
        )
    if place == reasoning_tasks.NAME:
        return reasoning_tasks.load(inner, given)
    return _own(_found(_module(place), inner, name), given, name)


def _module(place: str) -> ModuleType:
    if place.endswith(".py") or "/" in place:
        return _from_file(Path(place).expanduser())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise RefusedError(f"environment module {place}: {_told(error)}") from error
        raise RefusedError(
            f"environment module {place} is not installed here: there is no module named `{error.name}`. Remedy: "
            "install its package, or name the file: `path/to/file.py:Class`."
        ) from None
    except Exception as error:
        raise RefusedError(f"environment module {place}: {_told(error)}") from error


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        has = f"; {file.parent} has {', '.join(beside[:8])}" if beside else ""
        raise RefusedError(f"environment file {file} does not exist{has}")
    file = file.resolve()
    # A name of its own: two files called env.py are two modules, and neither is the installed package `env`.
    name = f"llmrl_environment_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RefusedError(f"environment file {file} is not Python source: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RefusedError(_told(error, file)) from error
    return module


def _told(error: Exception, file: Path | None = None) -> str:
    """`FILE, line N: what happened`, at the innermost line of `file` (of any file, without one)."""
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {what}"
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if file is None or frame.filename == str(file)]
    return f"{inner[-1].filename}, line {inner[-1].lineno}: {what}" if inner else f"{file or ''}: {what}"


def _found(module: ModuleType, name: str, whole: str) -> Callable[..., Any]:
    value = vars(module).get(name)
    if callable(value):
        return value
    own = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
    hint = f"; did you mean `{nearest(name, own)}`?" if own else ""
    raise RefusedError(f"environment {whole}: {module.__file__} has no class `{name}`{hint}")


def _own(make: Callable[..., Any], options: dict[str, Any], name: str) -> EnvironmentKind:
    lacking = [m for m in METHODS if inspect.isclass(make) and not callable(vars_of(make).get(m))]
    if lacking:
        raise RefusedError(f"environment {name} has no method `{lacking[0]}`; it needs {', '.join(METHODS)}")
    keywords = keyword_options(make, options, f"environment {name}")
    own = vars_of(make) if inspect.isclass(make) else {}
    rows = own.get("rows")
    return EnvironmentKind(
        partial(make, **keywords) if keywords else make,
        partial(_rows, rows, name) if rows else None,
        multi_turn=bool(own.get("multi_turn")),
    )


def vars_of(cls: type) -> dict[str, Any]:
    """What a class has, inherited or not, as it is found on the class itself."""
    return {name: getattr(cls, name) for base in reversed(cls.__mro__) for name in vars(base)}


def _rows(rows: Callable[..., list[Row]], name: str, split: Split, count: int, seed: int) -> list[Row]:
    made = list(rows(split, count, seed))
    if not made or not all(isinstance(row, dict) for row in made):
        raise RefusedError(
            f"environment {name}: rows({split!r}, {count}, {seed}) must give dictionaries, and at least one"
        )
    return made
