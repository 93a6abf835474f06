"""What every benchmark needs: the machine it ran on, rounds in turn, a table and JSON rows."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixloader


def environment() -> dict[str, Any]:
    """Hardware and versions, for the JSON of a result."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("triton", "liger-kernel") if _is_installed(name)},
        "numpy": np.__version__,
        "mixloader": mixloader.__version__,
    }


def _is_installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))


def in_turn(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each measure once a round, in turn, so that a machine that slows down slows all of them."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Round by round, so that what both suffered cancels."""
    return spread([value / other for value, other in zip(values, base, strict=True)])


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--rounds", type=int, default=7, help="times each measure is taken, in turn (default 7)")
    parser.add_argument("--json", type=Path, help="write the rows, hardware and versions to this file")
    return parser


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]], *, told: bool = True, **more: Any) -> None:
    """told: say that it was written."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **more, "rows": list(rows)}, indent=1) + "\n")
    if told:
        print(f"rows written to {path}")
