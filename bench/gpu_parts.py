"""What every part of `python -m bench.gpu` is given, and what it leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.budgets import Budget


@dataclass(frozen=True)
class Settings:
    """device: "cuda", or "cpu" for a rehearsal in tiny sizes. deadline: by time.monotonic(), for what can be cut."""

    device: str
    deadline: float

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclass
class Report:
    """Written after everything that was found, so that a part that is stopped keeps what it had.

    rows: what was measured. figures: numbers for people, by name. skipped: what was not done, and why.
    """

    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    budgets: list[Budget] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        own = {"rows": self.rows, "figures": self.figures, "skipped": self.skipped}
        return {**own, "budgets": [budget.to_json() for budget in self.budgets]}

    def add(
        self,
        *,
        rows: Sequence[dict[str, Any]] = (),
        figures: dict[str, Any] | None = None,
        skipped: dict[str, str] | None = None,
        budgets: Sequence[Budget] = (),
    ) -> None:
        self.rows += rows
        self.figures |= figures or {}
        self.skipped |= skipped or {}
        self.budgets += budgets
        if self.path is not None:
            self.path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
