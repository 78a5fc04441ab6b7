"""Reading a YAML file without deciding types: every scalar stays text, and the schema types it later.

Invariants: a plain `null` (or nothing) is None, every other scalar is its text, so `no`, `1e-4` and `007` mean in a
file what they mean as an argument; every key remembers its file and line; a key given twice is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmrl.errors import RefusedError

KeyPath = tuple[str, ...]
NULL_TAG = "tag:yaml.org,2002:null"


class Quoted(str):
    """A scalar written in quotes (or as a block): text even where a schema would take any type."""


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The file's tree with text leaves, and for each key path the place it came from (`FILE, line N`).

    Raises RefusedError when the file is missing, is not text, is not YAML, or is not a mapping of keys.
    """
    node = _compose(_text(file), str(file))
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise RefusedError(
            f"{file}, line {_line(node)}: expected keys such as `learning_rate: 1e-4`, got {_kind(node)}"
        )
    origins: dict[KeyPath, str] = {}
    try:
        return _mapping(node, (), str(file), origins), origins
    except RecursionError:
        raise RefusedError(f"{file}: an alias refers to itself; write the values out") from None


def read_flow(text: str, origin: str) -> Any:
    """A list or mapping in YAML's flow style (`[a, b]`, `{a: 1}`), with text leaves. `origin` is named in errors."""
    node = _compose(text, origin)
    try:
        return _value(node, (), origin, {}) if node is not None else None
    except RecursionError:
        raise RefusedError(f"{origin}: an alias refers to itself; write the values out") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        has = f"; {file.parent} has {', '.join(beside[:8])}" if beside else ""
        raise RefusedError(f"configuration file {file} does not exist{has}") from None
    except IsADirectoryError:
        raise RefusedError(f"{file} is a directory; name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"configuration file {file} cannot be read as UTF-8 text: {error}") from None


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise RefusedError(f"{where}: this is not valid YAML: {why}{_hint(text, mark)}") from None
    except yaml.YAMLError as error:
        raise RefusedError(f"{name}: this is not valid YAML: {' '.join(str(error).split())}") from None


def _hint(text: str, mark: yaml.Mark | None) -> str:
    """The line itself, and the usual culprit where it is known."""
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return ""
    line = lines[mark.line]
    tab = (
        " (YAML allows no tab for indentation: use spaces)"
        if line[: len(line) - len(line.lstrip())].count("\t")
        else ""
    )
    return f"{tab}\n    {line.strip()}" if line.strip() else tab


def _mapping(node: yaml.MappingNode, path: KeyPath, name: str, origins: dict[KeyPath, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for key_node, value_node in _pairs(node, name):
        key, line = str(key_node.value), _line(key_node)
        if key in seen:
            dotted = ".".join((*path, key))
            raise RefusedError(
                f"{name}, line {line}: `{dotted}` is given twice (first on line {seen[key]}); remove one"
            )
        seen[key] = line
        origins[*path, key] = f"{name}, line {line}"
        tree[key] = _value(value_node, (*path, key), name, origins)
    for merged in _merged(node, name):
        merged_origins: dict[KeyPath, str] = {}
        for key, value in _mapping(merged, path, name, merged_origins).items():
            if key not in tree:
                tree[key] = value
                origins.update({p: o for p, o in merged_origins.items() if p[: len(path) + 1] == (*path, key)})
    return tree


def _pairs(node: yaml.MappingNode, name: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RefusedError(f"{name}, line {_line(key)}: a key must be a plain word, got {_kind(key)}")
        if key.tag != "tag:yaml.org,2002:merge":
            yield key, value


def _merged(node: yaml.MappingNode, name: str) -> Iterator[yaml.MappingNode]:
    """The mappings that `<<: *anchor` brings in; keys written out win over them."""
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(item, yaml.MappingNode):
                    raise RefusedError(f"{name}, line {_line(key)}: `<<` must name keys and values, got {_kind(item)}")
                yield item


def _value(node: yaml.Node, path: KeyPath, name: str, origins: dict[KeyPath, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, name, origins)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, path, name, {}) for item in node.value]
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise RefusedError(f"{name}, line {_line(node)}: the tag {node.tag} is not supported; write a plain value")
    if node.tag == NULL_TAG:
        return None
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return node.value if plain else Quoted(node.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else f"`{node.value}`"
