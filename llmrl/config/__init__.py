"""Typed configuration: key groups that recipes combine, and the one parser behind every command.

Nothing here imports torch, so that `--help` and `--dry-run` answer at once.
"""

from llmrl.config.keys import (
    DataKeys,
    Housekeeping,
    Keys,
    ModelKeys,
    OptimizationKeys,
    RunKeys,
    TaskEvaluationKeys,
    TrainingKeys,
)
from llmrl.config.parse import ParsedCommand, parse, parse_file
from llmrl.config.resolved import differing_keys, fingerprint, result_keys, to_yaml

__all__ = [
    "DataKeys",
    "Housekeeping",
    "Keys",
    "ModelKeys",
    "OptimizationKeys",
    "ParsedCommand",
    "RunKeys",
    "TaskEvaluationKeys",
    "TrainingKeys",
    "differing_keys",
    "fingerprint",
    "parse",
    "parse_file",
    "result_keys",
    "to_yaml",
]
