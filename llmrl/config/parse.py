"""One command line for every recipe: `--config FILE.yaml`, `--key value`, `--section.key value`, `--dry-run`, `--help`.

Invariants: later beats earlier and arguments beat the file; every mistake is found before anything is built, all of
them are named in one RefusedError, each with where it came from; nothing here imports torch.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmrl.config.help import help_text
from llmrl.config.nearest import unknown_key
from llmrl.config.schema import arms, expected, field_at, section, shape, takes_list
from llmrl.config.source import KeyPath, read_yaml
from llmrl.errors import RefusedError

ConfigT = TypeVar("ConfigT", bound=BaseModel)
FLAGS = ("help", "dry-run", "dry_run")


@dataclass(frozen=True)
class ParsedCommand(Generic[ConfigT]):
    """What a command line asks for."""

    config: ConfigT
    dry_run: bool


@dataclass(frozen=True)
class _Arguments:
    file: Path | None
    overrides: list[tuple[KeyPath, str | list[str] | None, str]]
    """Key path, its text (a list where several words followed, None where none did), and the argument as typed."""
    dry_run: bool
    wants_help: bool


def parse(config_type: type[ConfigT], argv: Sequence[str]) -> ParsedCommand[ConfigT]:
    """The configuration that `argv` (without the program's name) describes.

    Prints every key and exits 0 when `--help` is among them. Raises RefusedError naming each mistake: unknown keys with
    the nearest known one, values of the wrong type, missing keys, impossible combinations, unreadable files.
    """
    arguments = _read_arguments(config_type, argv)
    if arguments.wants_help:
        print(help_text(config_type))
        raise SystemExit(0)
    tree, origins = read_yaml(arguments.file) if arguments.file else ({}, {})
    mistakes: list[str] = []
    for path, value, argument in arguments.overrides:
        _override(tree, origins, config_type, path, value, argument, mistakes)
    return ParsedCommand(_validated(config_type, tree, origins, mistakes, arguments.file), arguments.dry_run)


def parse_file(config_type: type[ConfigT], file: str | os.PathLike[str], **overrides: str) -> ConfigT:
    """The configuration in a YAML file, with overrides as text: for scripts and tests."""
    words = [f"--{key}={value}" for key, value in overrides.items()]
    return parse(config_type, ["--config", os.fspath(file), *words]).config


def _read_arguments(config_type: type[BaseModel], argv: Sequence[str]) -> _Arguments:
    file: Path | None = None
    overrides: list[tuple[KeyPath, str | list[str] | None, str]] = []
    flags: set[str] = set()
    for name, values in _grouped(argv):
        key = name.removeprefix("--")
        if key in FLAGS and not values:
            flags.add(key.replace("-", "_"))
        elif key in FLAGS:
            raise RefusedError(f"{name} takes no value, got `{' '.join(values)}`")
        elif key == "config":
            if len(values) != 1 or not values[0]:
                raise RefusedError(f"--config takes the name of one YAML file, got {values or 'nothing'}")
            if file is not None:
                raise RefusedError(
                    f"--config is given twice ({file} and {values[0]}); give one file and override by --key value"
                )
            file = Path(values[0])
        else:
            path = tuple(key.split("."))
            if field_at(config_type, path) is None and field_at(
                config_type, under := tuple(key.replace("-", "_").split("."))
            ):
                path = under  # --learning-rate is what some shells and people write
            overrides.append((path, values[0] if len(values) == 1 else list(values) or None, name))
    return _Arguments(file, overrides, "dry_run" in flags, "help" in flags)


def _grouped(argv: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """`--key` with the words that belong to it. Only a word that begins with `--` starts a key, so `-1` is a value."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word == "-h":
            groups.append(("--help", []))
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            hint = (
                f"; did you mean `--config {word}`?"
                if word.endswith((".yaml", ".yml"))
                else "; arguments are `--key value`"
            )
            raise RefusedError(f"unexpected argument `{word}`{hint}")
    return groups


def _override(
    tree: dict[str, Any], origins: dict[KeyPath, str], config_type: type[BaseModel], path: KeyPath,
    value: str | list[str] | None, argument: str, mistakes: list[str],
) -> None:  # fmt: skip
    """Puts one argument into the tree, or adds to the mistakes."""
    field = field_at(config_type, path)
    if value is None:
        if field is not None and bool not in arms(field.annotation):
            mistakes.append(f"{argument} has no value; expected {expected(field)}")
            return
        value = "true"
    if isinstance(value, list) and field is not None and not takes_list(field.annotation):
        mistakes.append(f"{argument} takes one value, got {len(value)}: {' '.join(value)} (quote it if it is one text)")
        return
    branch = tree
    for depth, key in enumerate(path[:-1]):
        inner = branch.get(key)
        if not isinstance(inner, dict):
            inner = branch[key] = {}
            origins[path[: depth + 1]] = f"argument {argument}"
        branch = inner
    branch[path[-1]] = None if value == "null" else value
    for old in [p for p in origins if p[: len(path)] == path]:
        del origins[old]
    origins[path] = f"argument {argument}"


def _validated(
    config_type: type[ConfigT],
    tree: dict[str, Any],
    origins: dict[KeyPath, str],
    mistakes: list[str],
    file: Path | None,
) -> ConfigT:
    shaped = _shaped(tree, config_type, config_type, (), origins, mistakes)
    try:
        config = config_type.model_validate(shaped)
    except ValidationError as error:
        named: set[KeyPath] = set()
        for details in error.errors(include_url=False):
            path = _known_path(config_type, details["loc"])
            if path not in named or not path:
                mistakes.append(_describe(config_type, details, path, shaped, origins, file))
            named.add(path)
    if mistakes:
        raise RefusedError(_joined(mistakes))
    return config


def _shaped(
    tree: dict[str, Any], model: type[BaseModel], root: type[BaseModel], path: KeyPath,
    origins: dict[KeyPath, str], mistakes: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The tree with lists and sections as the schema wants them; unknown keys go to the mistakes."""
    shaped: dict[str, Any] = {}
    for key, value in tree.items():
        here = (*path, key)
        origin = origins.get(here, "")
        field = model.model_fields.get(key)
        if field is None:
            mistakes.append(unknown_key(root, model, here, origin))
            continue
        value = shape(value, field.annotation, origin)
        inner = section(field.annotation)
        shaped[key] = (
            _shaped(value, inner, root, here, origins, mistakes) if inner and isinstance(value, dict) else value
        )
    return shaped


def _known_path(config_type: type[BaseModel], loc: tuple[int | str, ...]) -> KeyPath:
    """The longest part of pydantic's location that names a key: unions and list positions follow behind it."""
    path: KeyPath = ()
    for part in loc:
        if not isinstance(part, str) or field_at(config_type, (*path, part)) is None:
            break
        path = (*path, part)
    return path


def _describe(
    config_type: type[BaseModel], details: ErrorDetails, path: KeyPath, shaped: dict[str, Any],
    origins: dict[KeyPath, str], file: Path | None,
) -> str:  # fmt: skip
    name, field = ".".join(path), field_at(config_type, path)
    if details["type"] == "value_error":
        return f"{name}: {details['ctx']['error']}" if name else str(details["ctx"]["error"])
    if field is None:
        return str(details["msg"])
    if details["type"] == "missing" and len(details["loc"]) == len(path):
        where = f"in {file} or as " if file else "as "
        return f"key `{name}` is missing: give it {where}--{name} VALUE, {expected(field)}"
    value: Any = shaped
    for key in path:
        value = value.get(key) if isinstance(value, dict) else value
    got = "null" if value is None else f"`{value}`"
    wants = expected(field) + (", not empty" if details["type"] == "string_too_short" else "")
    return f"key `{name}`: expected {wants}, got {got}{_from(origins.get(path))}"


def _from(origin: str | None) -> str:
    return f" ({origin})" if origin else ""


def _joined(mistakes: list[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{len(mistakes)} mistakes in the configuration:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes)
