"""A suite that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def suite_of(data: Path, **changes: Any) -> dict[str, Any]:
    """Its plain values, with some changed."""
    values = {
        "data": str(data), "source": ["prose", "code"], "target": ["maths"], "probes": ["prose", "maths"],
        "seeds": [0, 1], "against": "half", "points": 2, "score_windows": 4, "feedback_windows": 2,
        "base": {"steps": 6},
        "train": {
            "steps": 8, "batch_size": 2, "seq_len": 16, "learning_rate": 1e-2, "warmup_steps": 2, "device": "cpu",
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16},
        },
        "scenarios": {"one": {}, "two": {"preference": 0.8, "source": ["code"], "other": ["prose"], "probes": None}},
        "policies": {
            "half": {"policy": "fields"},
            "natural": None,
            "told": {"policy": "natural", "feedback": True},
            "oracle": {"prepare": {"by": "best_of", "mixtures": 3}},
        },
    }  # fmt: skip
    return {**values, **changes}


def write_suite(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path
