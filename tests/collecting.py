"""A split and corpora so small that an episode takes a second, and workers in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixloader.agent.split import Split
from mixloader.workers import attempt

CORPORA = ("tales", "letters", "sums", "notes")
_WORDS = {
    "tales": "king queen wolf forest castle night dragon sword river snow",
    "letters": "dear friend yours write soon send love hope family news",
    "sums": "one two three plus minus times equals half ten zero",
    "notes": "todo list buy milk call bank pay rent mend roof",
}


def tiny_split(**changes: Any) -> Split:
    values: dict[str, Any] = {
        "name": "tiny",
        "seed": 5,
        "episodes": 8,
        "pattern": ["only"],
        "shipped": "only",
        "scoreboard": ["other"],
        "folds": {"only": {"source": ["tales", "letters"], "target": ["sums"], "other": ["notes"]}},
        "text_bytes": 40_000,
        "topics": 2,
        "held_out": 0.25,
        "seq_len": 16,
        "corpora": {"sums": {"topics": 3, "licence": "made up"}},
        "architectures": {"tiny": {"vocab": 300, "model": {"n_layer": 1, "n_head": 2, "n_embd": 16}}},
        "bases": {"folds": {"only": ["natural"]}, "train": {"steps": 4, "batch_size": 4, "warmup_steps": 1}},
        "episode": {
            "domains": [2, 6],
            "tokens": [1500, 2500],
            "batch_size": [4],
            "learning_rate": [1e-3, 1e-2],
            "decide_every": [1, 2],
            "feedbacks": [6, 8],
            "feedback_tokens": 256,
            "influence": {"rank": 4, "probe_rows": 4},
        },
    }
    return Split(**{**values, **changes})


def write_corpora(folder: Path) -> Path:
    """Documents of a few of a corpus's words each, so that there are topics; each has a number of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for corpus in CORPORA:
        rng = random.Random(corpus)
        words = _WORDS[corpus].split()
        with (folder / f"{corpus}.jsonl").open("w") as file:
            for number in range(80):
                own = words[:6] if rng.random() < 0.5 else words[4:]
                text = " ".join(rng.choice(own) for _ in range(80))
                file.write(json.dumps({"text": f"#{corpus}{number}# {text}"}) + "\n")
    return folder


class Here:
    """Workers that run jobs in this process, one after the other: processes take seconds to start."""

    def __init__(self, function, count, engine):
        self.function = function

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, jobs) -> Iterator:
        for index, job in enumerate(jobs):
            yield attempt(self.function, index, job)
