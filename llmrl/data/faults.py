"""Rows that cannot be used: named together, then refused or dropped.

Invariant: every row is read before any is tokenised, so that a fault in the last one shows in the first seconds.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llmrl.data.splits import Rows, enumerated
from llmrl.errors import RefusedError

LISTED = 10


class RowFault(Exception):
    """What is wrong with one row; the caller knows its file and number. `column` None: with no single one, or `reason`
    names it."""

    def __init__(self, column: str | None, reason: str) -> None:
        super().__init__(reason if column is None else f"column `{column}`: {reason}")


def refusal(where: str, faults: Mapping[int, RowFault]) -> RefusedError:
    """The first fault in full, and the numbers of the other rows (from 1) that have one."""
    (number, fault), *others = faults.items()
    listed = ", ".join(str(other) for other, _ in others[:LISTED]) + (", ..." if len(others) > LISTED else "")
    more = f" ({len(others)} more rows have faults: {listed})" if others else ""
    return RefusedError(f"{where}, row {number}, {fault}{more}")


def sound(rows: Rows, read: Callable[[dict[str, Any]], Any], drop: bool = False) -> Rows:
    """The rows that `read` takes without a RowFault; others are dropped, or RefusedError is raised."""
    faults: dict[int, RowFault] = {}
    for index, row in enumerated(rows.table):
        try:
            read(row)
        except RowFault as fault:
            faults[index] = fault
    if not faults:
        return rows
    if not drop:
        raise refusal(rows.where, {rows.numbers[index]: fault for index, fault in faults.items()})
    return rows.select([index for index in range(len(rows)) if index not in faults])
