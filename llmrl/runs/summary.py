"""`summary.json`: how a run ended, in the form that a scheduler or a script reads."""

from typing import Any, Literal

Status = Literal["completed", "interrupted", "failed"]


def before_and_after(evaluations: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """For each name of an evaluation its first and its last metrics; None where there are none.

    An evaluation that took place once counts as `before` when it was at step 0, as `after` otherwise.
    """
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for item in sorted(evaluations, key=lambda item: item["step"]):
        name = item["name"]
        if name not in before and name not in after and item["step"] == 0:
            before[name] = item["metrics"]
        elif name not in before and name not in after:
            before[name] = after[name] = item["metrics"]
        else:
            after[name] = item["metrics"]
    return before or None, after or None
