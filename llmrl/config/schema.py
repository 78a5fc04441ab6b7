"""What a configuration type expects, in words and by path: for messages, for `--help`, to shape text into values.

Invariant: only lists, sections and free-form (`Any`) values are shaped here; pydantic types and checks the rest.
"""

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmrl.config.source import Quoted, read_flow

NAMES: dict[Any, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null", Any: "any value",
}  # fmt: skip
BOUNDS = (
    (annotated_types.Gt, "gt", "greater than {}"), (annotated_types.Ge, "ge", "at least {}"),
    (annotated_types.Lt, "lt", "less than {}"), (annotated_types.Le, "le", "at most {}"),
)  # fmt: skip


def arms(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the one type; Annotated wrappers are taken off."""
    if get_origin(annotation) is Annotated:
        return arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in arms(part)]
    return [annotation]


def section(annotation: Any) -> type[BaseModel] | None:
    """The model of a nested section, or None where the key is not a section."""
    models = [arm for arm in arms(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)]
    return models[0] if len(models) == 1 else None


def takes_list(annotation: Any) -> bool:
    """Whether a list is among the values that the annotation admits."""
    return any(get_origin(arm) is list or arm is list for arm in arms(annotation))


def field_at(config_type: type[BaseModel], path: tuple[str, ...]) -> FieldInfo | None:
    """The field at a dotted path, or None."""
    field: FieldInfo | None = None
    model: type[BaseModel] | None = config_type
    for key in path:
        if model is None or key not in model.model_fields:
            return None
        field = model.model_fields[key]
        model = section(field.annotation)
    return field


def all_paths(config_type: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, sections included, as paths."""
    for key, field in config_type.model_fields.items():
        yield (*prefix, key)
        if inner := section(field.annotation):
            yield from all_paths(inner, (*prefix, key))


def expected(field: FieldInfo) -> str:
    """In words what the field takes, e.g. `a number greater than 0` or `one of auto, float32`."""
    return _words(field.annotation) + _bounds(list(field.metadata))


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        return _words(base) + _bounds(metadata)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(annotation) is list or annotation is list:
        inner = get_args(annotation)
        return "a list" + (f" ({_words(inner[0])} each)" if inner and inner[0] not in (str, Any) else "")
    if get_origin(annotation) is dict or annotation is dict:
        return "keys and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    return NAMES.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _bounds(metadata: list[Any]) -> str:
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    bounds = [
        words.format(getattr(item, attribute))
        for item in flat
        for kind, attribute, words in BOUNDS
        if isinstance(item, kind)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def shape(value: Any, annotation: Any, origin: str) -> Any:
    """A text or tree as the schema wants it: `a,b` as a list, `{...}` as a section, free-form values typed as YAML."""
    kinds = arms(annotation)
    if Any in kinds:
        return _free(value, origin)
    if isinstance(value, str) and not isinstance(value, Quoted):
        wants_list = takes_list(annotation)
        wants_tree = any(get_origin(kind) is dict or kind is dict for kind in kinds) or section(annotation)
        if (wants_list and value.startswith("[")) or (wants_tree and value.startswith("{")):
            value = read_flow(value, origin)
        elif wants_list and (str not in kinds or "," in value):
            value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list):
        inner = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list and get_args(kind)), Any)
        return [shape(item, inner, origin) for item in value]
    if isinstance(value, dict) and not section(annotation):
        inner = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict and get_args(kind)), Any)
        return {str(key): shape(item, inner, origin) for key, item in value.items()}
    return str(value) if isinstance(value, str) else value


def _free(value: Any, origin: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _free(item, origin) for key, item in value.items()}
    if isinstance(value, list):
        return [_free(item, origin) for item in value]
    if value is None or isinstance(value, Quoted):
        return None if value is None else str(value)
    return _free(read_flow(value, origin), origin) if value[:1] in ("[", "{") else scalar(value)


def scalar(text: str) -> Any:
    """Plain text as YAML 1.2 reads it: true, 3, 1e-4 and null are what they look like, all else is text."""
    tag = CoreLoader("").resolve(yaml.ScalarNode, text, (True, False)).rsplit(":", 1)[-1]
    match tag:
        case "bool":
            return text.lower() == "true"
        case "int" if len(text) < 1000:
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case "null":
            return None
        case _:
            return text


class CoreLoader(yaml.SafeLoader):
    """Scalars as YAML 1.2 reads them: `no` and `on` are text, `1e-4` is a number, dates are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 (the base class's own attribute)


def _add_core_resolvers() -> None:
    number = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    rules = (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        ("float", rf"{number}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
        ("null", r"null|Null|NULL|~|", "nN~\0"),
    )
    for tag, pattern, first in rules:
        characters = [*first.replace("\0", ""), ""] if "\0" in first else list(first)
        CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), characters)


_add_core_resolvers()
