"""Options and rows, checked where they come in: RefusedError names the key or the column, why, and the remedy."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from llmrl.config.nearest import nearest
from llmrl.envs.protocol import Row
from llmrl.errors import RefusedError

OptionsT = TypeVar("OptionsT", bound=BaseModel)


class Options(BaseModel):
    """Base of an environment's options: text from a command line is typed, values never change after."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def checked(kind: type[OptionsT], options: Mapping[str, Any], environment: str) -> OptionsT:
    """`options` as a `kind`; raises RefusedError naming every key that is unknown or has an impossible value."""
    known_only(options, kind.model_fields, environment)
    try:
        return kind(**options)
    except ValidationError as error:
        raise RefusedError("; ".join(_mistakes(error, (), environment))) from None


def known_only(options: Mapping[str, Any], known: Iterable[str], environment: str) -> None:
    """Raise RefusedError for the first option that is not `known`."""
    known = list(known)
    for key in options:
        if key not in known:
            has = f"did you mean `{nearest(key, known)}`?" if known else "it takes none."
            raise RefusedError(f"unknown option `environment_options.{key}` of {environment}; {has}")


def typed(value: Any, annotation: Any, key: str, environment: str) -> Any:
    """`value` as the type that `annotation` says (text included); unchanged where nothing can be made of the latter."""
    if annotation is inspect.Parameter.empty:
        return value
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # an annotation that only its author's type checker understands is no fault of the user's
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise RefusedError("; ".join(_mistakes(error, (key,), environment))) from None


def keyword_options(function: Callable[..., Any], options: Mapping[str, Any], environment: str) -> dict[str, Any]:
    """`options` as the keyword arguments of `function(row, seed, **options)`, typed by its annotations.

    Raises RefusedError where one is unknown or missing, or where `function` cannot take a row and a seed.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return dict(options)  # written in C: it is up to the call
    own = dict(list(parameters.items())[2:])
    if any(p.kind is p.VAR_POSITIONAL for p in list(parameters.values())[:2]):
        own = {name: p for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}
    elif len(parameters) < 2:
        raise RefusedError(f"{environment} must take a row and a seed: `def __init__(self, row, seed)`")
    named = {name: p for name, p in own.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known_only(options, named, environment)
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise RefusedError(f"{environment} needs the option `environment_options.{name}`")
    hints = _hints(function)
    return {
        key: typed(value, hints.get(key, inspect.Parameter.empty), key, environment) for key, value in options.items()
    }


def column(row: Row, name: str, kind: type, environment: str) -> Any:
    """`row[name]`; raises RefusedError where it is missing or not a `kind`."""
    if name not in row:
        raise RefusedError(f"{environment}: the row has no column `{name}` (its columns: {', '.join(row) or 'none'})")
    value = row[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RefusedError(f"{environment}: column `{name}` holds {value!r:.80}, where {kind.__name__} is expected")
    return value


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(target)
    except Exception:  # names that exist for a type checker only
        return {}


def _mistakes(error: ValidationError, path: tuple[str, ...], environment: str) -> list[str]:
    lines = []
    for detail in error.errors():
        name = ".".join(map(str, ("environment_options", *path, *detail["loc"])))
        lines.append(f"`{name}` of {environment}: {detail['msg']}, got {detail['input']!r:.80}")
    return lines
