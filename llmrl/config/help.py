"""The text of `--help`: every key with its type, default and meaning, group by group."""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmrl.config.schema import expected, section

WIDTH = 100
USAGE = """\
Usage: accelerate launch [--config_file LAUNCH.yaml] run.py --config FILE.yaml [--key value ...]

  --config FILE    YAML file with the keys below; arguments override it
  --key value      override one key; --section.key value for a key in a section; null for nothing
  --dry-run        print the resolved configuration and the batch arithmetic; write and load nothing
  --help           this text"""


def help_text(config_type: type[BaseModel]) -> str:
    """All keys of a configuration type: its own first, then the groups that it inherits."""
    parts = [USAGE]
    for title, keys in groups(config_type):
        parts.append(title)
        parts.extend(_entry(key, config_type.model_fields[key], config_type) for key in keys)
    return "\n\n".join(parts)


def groups(config_type: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    """Title and keys of each class in which keys are first declared: the type's own, then its bases in their order."""
    homes: dict[type[BaseModel], list[str]] = {}
    for key in config_type.model_fields:
        holders = [c for c in config_type.__mro__ if key in vars(c).get("__annotations__", {})]
        homes.setdefault(holders[-1] if holders else config_type, []).append(key)
    for home in sorted(homes, key=config_type.__mro__.index):
        title = (inspect.getdoc(home) or home.__name__).splitlines()[0] if home is not BaseModel else home.__name__
        yield title, homes[home]


def _entry(key: str, field: FieldInfo, owner: type[BaseModel], indent: str = "  ") -> str:
    default = "required" if field.is_required() else f"default {_plain(field.get_default(call_default_factory=True))}"
    head = f"{indent}--{key}  {expected(field)} ({default})"
    text = textwrap.fill(
        _description(key, field, owner), WIDTH, initial_indent=indent * 3, subsequent_indent=indent * 3
    )
    inner = section(field.annotation)
    nested = [_entry(f"{key}.{name}", f, inner, indent) for name, f in inner.model_fields.items()] if inner else []
    return "\n".join(line for line in (head, text, *nested) if line)


def _description(key: str, field: FieldInfo, owner: type[BaseModel]) -> str:
    """The key's docstring; a class that only changes a default leaves the text to the group it inherits from."""
    if field.description:
        return field.description
    inherited = (
        base.model_fields.get(key)
        for base in owner.__mro__[1:]
        if issubclass(base, BaseModel) and base is not BaseModel
    )
    return next((f.description for f in inherited if f is not None and f.description), "")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "a section" if isinstance(value, BaseModel) else str(value)
