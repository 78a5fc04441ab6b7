"""A configuration as the file that repeats it, and as the fingerprint that a checkpoint is held to.

Invariants: `to_yaml` gives back an equal configuration when parsed, except `resume_from_checkpoint`, which is left out
so that the file repeats the run from its start; the fingerprint ignores keys marked `Housekeeping`.
"""

import hashlib
import json
from typing import Any

import yaml
from pydantic import BaseModel

from llmrl.config.help import groups
from llmrl.config.keys import Housekeeping
from llmrl.config.schema import CoreLoader

NOT_REPEATED = frozenset({"resume_from_checkpoint"})


class _Dumper(yaml.SafeDumper):
    """Quotes whatever any YAML reader, old or new, could take for something other than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's own attribute)
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *CoreLoader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *CoreLoader.yaml_implicit_resolvers}
    }


def to_yaml(config: BaseModel) -> str:
    """Every key with its value, `method` first; given back as `--config` it repeats the run."""
    values = config.model_dump(mode="json", exclude=set(NOT_REPEATED))
    in_groups = [key for _, keys in groups(type(config)) for key in keys if key in values]
    ordered = {key: values[key] for key in sorted(in_groups, key=lambda key: key != "method")}
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def result_keys(config: BaseModel, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys that decide which weights come out, `section.key` for those of a section: all but those marked
    `Housekeeping`. JSON values: the configuration's, or those of a `stored` one of the same method."""
    values = config.model_dump(mode="json") if stored is None else stored
    found: dict[str, Any] = {}
    for key, field in type(config).model_fields.items():
        if key not in values or any(isinstance(mark, Housekeeping) for mark in field.metadata):
            continue
        section, value = getattr(config, key), values[key]
        if isinstance(section, BaseModel) and isinstance(value, dict):
            found |= {f"{key}.{name}": each for name, each in result_keys(section, value).items()}
        else:
            found[key] = value
    return found


def fingerprint(config: BaseModel) -> str:
    """SHA-256 of `result_keys`, hexadecimal."""
    return hashlib.sha256(json.dumps(result_keys(config), sort_keys=True).encode()).hexdigest()


def differing_keys(config: BaseModel, stored: dict[str, Any]) -> list[str]:
    """Lines `key: stored value -> value now` for the result keys that differ from those of an earlier configuration."""
    absent = "(absent)"
    now = result_keys(config)
    return [
        f"{key}: {stored.get(key, absent)} -> {now.get(key, absent)}"
        for key in dict.fromkeys((*now, *stored))
        if stored.get(key, absent) != now.get(key, absent)
    ]
