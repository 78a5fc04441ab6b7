"""From the text in `rewards` to the function: a built-in's name, a function of the user's, a reward model.

Invariant: whatever is wrong with a function that can be seen without calling it is refused here.
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
from llmrl.rewards.functions import ARGUMENTS, FUNCTIONS, RewardFunction, build
from llmrl.rewards.keys import RewardFunctionKeys
from llmrl.rewards.verifiers import Verifiers

SUPPLIED = (*ARGUMENTS, "log_extra", "log_metric", "trainer_state")
_OWN = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)|(?P<module>[A-Za-z_][\w.]*):(?P<attribute>\w+)")


def load(entry: RewardFunctionKeys, pool: Verifiers, say: Callable[[str], None]) -> RewardFunction:
    """The function of one entry. Raises RefusedError for what is not there, cannot be loaded, or does not take its
    options."""
    name = entry.function
    if name in FUNCTIONS:
        return build(name, entry.options, pool)
    if _OWN.fullmatch(name):
        return own(name, function_named(name), entry.options)
    if "/" in name or Path(name).is_dir():
        from llmrl.rewards.classifier import reward_model

        return reward_model(name, entry.options, say)
    raise RefusedError(
        f"rewards: there is no reward function `{name}`; did you mean `{nearest(name, FUNCTIONS)}`? Built in are "
        f"{', '.join(FUNCTIONS)}; your own is FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION; a reward model is a folder "
        "or a hub id"
    )


def function_named(name: str, key: str = "rewards") -> Callable[..., Any]:
    """The function that the configuration's `key` names: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION. Raises
    RefusedError for what is not there or cannot be loaded."""
    match = _OWN.fullmatch(name)
    if match is None:
        raise RefusedError(f"{key}: `{name}` names no function; write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    module = _file(match["file"], key) if match["file"] else _module(match["module"], key)
    return _attribute(module, match["name"] or match["attribute"], name, key)


def own(name: str, call: Callable[..., Any], options: dict[str, Any]) -> RewardFunction:
    """A function of the user's: it gets its options and what of the rest its signature takes."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return RewardFunction(lambda **arguments: call(**arguments, **options))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option in SUPPLIED or not (takes_all or option in named):
            raise RefusedError(f"rewards: {name} takes no option `{option}`; it takes {', '.join(named) or 'nothing'}")

    def chosen(arguments: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in arguments.items() if takes_all or key in named} | options

    needs = tuple(
        (key,)
        for key, p in parameters.items()
        if key in named and p.default is p.empty and key not in SUPPLIED and key not in options
    )
    if is_async(call):

        async def asynchronous(**arguments: Any) -> Any:
            return await call(**chosen(arguments))

        return RewardFunction(asynchronous, needs, own=True)
    return RewardFunction(lambda **arguments: call(**chosen(arguments)), needs, own=True)


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling it gives something to be awaited; an object counts by its `__call__`."""
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def _file(path: str, key: str) -> ModuleType:
    """The module in a file, under a name that no other has, so that it hides nothing and is found by pickle."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise RefusedError(f"{key}: {path}: there is no such file (looked for {file})")
    name = f"llmrl_reward_{file.stem}_{zlib.crc32(str(file).encode()):x}"
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
