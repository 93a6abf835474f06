"""What was measured against what the design allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """value: None if it could not be measured; `note` says why, or what the value is of.

    at_least: the limit is a lower one.
    """

    name: str
    value: float | None
    limit: float
    unit: str
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "met": self.met}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Budget:
        return cls(**{name: value for name, value in row.items() if name != "met"})


def table(budgets: Iterable[Budget]) -> str:
    lines = [f"{'budget':64}{'value':>12}  {'limit':>16}  "]
    for budget in budgets:
        value = "-" if budget.value is None else f"{budget.value:.3g} {budget.unit}"
        limit = f"{'>=' if budget.at_least else '<='} {budget.limit:g} {budget.unit}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[budget.met]
        note = f"  ({budget.note})" if budget.note else ""
        lines.append(f"{budget.name:64}{value:>12}  {limit:>16}  {verdict}{note}")
    return "\n".join(lines)
