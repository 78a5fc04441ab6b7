"""Schemas against transformers' own, what cannot have one, and arguments that do not fit."""

from typing import Any, Literal

import pytest

from llmrl.envs.schemas import argument_fault, function_schema


def search(
    query: str,
    limit: int = 10,
    share: float | None = None,
    exact: bool = False,
    order: Literal["new", "old"] = "new",
    tags: list[str] | None = None,
    weights: dict[str, float] | None = None,
) -> str:
    """
    Search the shelf
    for books.

    Args:
        query: What to look for,
            on several lines
        limit: How many at most
        share: A share
        exact: Whether words must be the same
        order: Which come first
        tags: Only these
        weights: A weight for each tag

    Returns:
        The titles.
    """
    return query


def now() -> str:
    """The time.

    Returns:
        The time as text.
    """
    return "12:00"


@pytest.mark.parametrize("function", [search, now])
def test_the_same_schema_as_transformers(function: Any) -> None:
    from transformers.utils import get_json_schema

    expected = get_json_schema(function)
    expected["function"].pop("return", None)
    assert function_schema(function) == expected


def no_docstring(a: int) -> int:
    return a


def no_type(a) -> int:  # type: ignore[no-untyped-def]
    """Tool.

    Args:
        a: A number
    """
    return int(a)


def no_line(a: int) -> int:
    """Tool."""
    return a


def strange_type(a: complex) -> int:
    """Tool.

    Args:
        a: A number
    """
    return 0


def any_number(*a: int) -> int:
    """Tool.

    Args:
        a: A number
    """
    return 0


@pytest.mark.parametrize("function", [no_docstring, no_type, no_line, strange_type, any_number])
def test_what_has_no_schema_names_the_tool(function: Any) -> None:
    with pytest.raises(TypeError, match=function.__name__):
        function_schema(function)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"query": "x"}, None),
        ({"query": "x", "limit": 3, "share": 0.5, "exact": True, "order": "old", "tags": ["a"]}, None),
        ({"query": "x", "share": 1, "tags": None, "limit": 3.0, "weights": {"a": 1}}, None),
        ({}, "`query` is missing"),
        ({"query": 3}, "`query` must be a string"),
        ({"query": None}, "`query` must be"),
        ({"query": "x", "limit": True}, "`limit` must be an integer"),
        ({"query": "x", "limit": 2.5}, "`limit` must be"),
        ({"query": "x", "limit": "3"}, "`limit` must be"),
        ({"query": "x", "share": "half"}, "`share` must be a number or null"),
        ({"query": "x", "exact": 1}, "`exact` must be a boolean"),
        ({"query": "x", "order": "big"}, "one of 'new', 'old'"),
        ({"query": "x", "order": ["new"]}, "one of"),
        ({"query": "x", "tags": [1]}, "`tags` must be an array"),
        ({"query": "x", "weights": {"a": "b"}}, "`weights` must be"),
        ({"query": "x", "colour": "red"}, "no argument `colour`; it takes query"),
        ([], "JSON object"),
        ("query", "JSON object"),
    ],
)
def test_argument_faults(arguments: Any, fault: str | None) -> None:
    found = argument_fault(arguments, function_schema(search))
    assert (found is None) if fault is None else (found is not None and fault in found)
