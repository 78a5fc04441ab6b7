"""JSON schemas of Python functions, and arguments checked against them.

Invariant: the schema of a function is the one that transformers' `get_json_schema` writes (less its `return`), for the
types known here: str, int, float, bool, list, dict, Literal, and any of them or None. No imports of transformers, since
this is read where `--help` must answer at once.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

Schema = dict[str, Any]

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_ARGUMENTS = re.compile(r"^\s*(?:Args|Arguments):\s*$(?P<body>.*?)(?=^\s*(?:Returns|Raises):\s*$|\Z)", re.DOTALL | re.M)
_ARGUMENT = re.compile(
    r"^\s*(?P<name>\w+)(?:\s*\([^)]*\))?:\s*(?P<text>.*?)(?=^\s*\w+(?:\s*\([^)]*\))?:|\Z)", re.DOTALL | re.M
)


def function_schema(function: Callable[..., Any]) -> Schema:
    """`{"type": "function", "function": {"name", "description", "parameters"}}` from signature and docstring.

    The docstring is in Google's style: what the tool does, then `Args:` with a line for each. Raises TypeError, naming
    the function and the argument, where a description or a type is missing or is none of those known.
    """
    name = function.__name__
    summary, texts = _documentation(function)
    if not summary:
        raise TypeError(f"the tool {name} has no docstring: it is what the model is told of it")
    hints, properties, required = typing.get_type_hints(function), {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"the tool {name} takes {parameter}: its arguments must be named one by one")
        if parameter.name not in hints or parameter.name not in texts:
            missing = "type" if parameter.name not in hints else "line under `Args:` in the docstring"
            raise TypeError(f"the argument {parameter.name} of the tool {name} has no {missing}")
        schema = _type_schema(hints[parameter.name], f"{parameter.name} of the tool {name}")
        properties[parameter.name] = {**schema, "description": texts[parameter.name]}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: Schema = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": parameters}}


def argument_fault(arguments: Any, schema: Schema) -> str | None:
    """What is wrong with the `arguments` of a call to the tool of this schema, in a sentence for the model; or None."""
    if not isinstance(arguments, dict):
        return "the arguments must be a JSON object"
    parameters = schema["function"]["parameters"]
    properties = parameters["properties"]
    for name in parameters.get("required", ()):
        if name not in arguments:
            return f"the argument `{name}` is missing"
    for name, value in arguments.items():
        if name not in properties:
            return f"there is no argument `{name}`; it takes {', '.join(properties) or 'none'}"
        if not _fits(value, properties[name]):
            return f"the argument `{name}` must be {_described(properties[name])}"
    return None


def _documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    text = inspect.getdoc(function) or ""
    found = _ARGUMENTS.search(text)
    summary = text[: found.start()] if found else re.split(r"^\s*(?:Returns|Raises):\s*$", text, flags=re.M)[0]
    arguments = _ARGUMENT.finditer(found["body"]) if found else ()
    return summary.strip(), {m["name"]: " ".join(m["text"].split()) for m in arguments}


def _type_schema(hint: Any, where: str) -> Schema:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType) and len(inner) == 2 and types.NoneType in inner:
        return {**_type_schema(next(arm for arm in inner if arm is not types.NoneType), where), "nullable": True}
    if origin is Literal and len({type(item) for item in inner}) == 1 and type(inner[0]) in _SCALARS:
        return {"type": _SCALARS[type(inner[0])], "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _type_schema(inner[0], where)}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": _type_schema(inner[1], where)}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    raise TypeError(f"the type {hint} of {where} is not one that a schema is known for")


def _fits(value: Any, schema: Schema) -> bool:
    if value is None:
        return bool(schema.get("nullable", False))
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema["type"]
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if kind == "array":
        return isinstance(value, list) and all(_fits(item, schema["items"]) for item in value if "items" in schema)
    if kind == "object":
        inner = schema.get("additionalProperties")
        return isinstance(value, dict) and (inner is None or all(_fits(item, inner) for item in value.values()))
    return isinstance(value, str) if kind == "string" else isinstance(value, int | float)


def _described(schema: Schema) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    article = "an" if schema["type"][0] in "aeiou" else "a"
    return f"{article} {schema['type']}{' or null' if schema.get('nullable') else ''}"
