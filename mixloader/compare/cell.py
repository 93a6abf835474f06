"""A cell: one run of the trainer, and its score. Everything that a comparison trains is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.config import ModelConfig, TrainConfig
from mixloader.evaluate import held_out_loss
from mixloader.files import replace
from mixloader.manifest import Manifest
from mixloader.record import RunRecord, read_record
from mixloader.train.checkpoint import checkpoints, latest_checkpoint, load_parameters, read_state
from mixloader.train.model import build_model
from mixloader.train.trainer import resolve_device, train

RESULT = "cell.json"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, as data that a worker is handed.

    key: names all that determines the result (cache.py). title: what it is, for people.
    config: TrainConfig.to_dict(), whose `out` is a folder of the cell's own.
    score, score_roots, score_windows: the manifest whose held-out text is scored, and windows a domain; 0: no scores.
    base: the cell whose last parameters this one starts from, if it is one.
    keep: leave the last checkpoint there, for others to start from.
    """

    key: str
    title: str
    config: dict[str, Any]
    score: str
    score_roots: list[str]
    score_windows: int
    base: Cell | None = None
    keep: bool = False

    @property
    def out(self) -> Path:
        return Path(self.config["out"])

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        rows = self.config["batch_size"] * self.config["grad_accumulation_steps"]
        return int(self.config["steps"] * rows * self.config["seq_len"])


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, go on with what a killed call began, or return what is finished. JSON-able:

    key, title, tokens; points: [{"tokens", "losses"}], the loss on the score text of each domain (nats a token) at
    each checkpoint, from 0 tokens on, none if it is not scored; feedback: the same on the feedback text of the probed
    domains, at the end;
    late: the mean training loss of each domain that was read in the last quarter of the decisions;
    read: tokens read of each domain; policy_errors: decisions that the policy failed to make.
    """
    done = cell.out / RESULT
    if done.exists():
        finished: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return finished
    config = TrainConfig.from_dict(cell.config)
    trained = train(config, progress=False)
    state = read_state(trained.checkpoint)["loader"]
    record = read_record(trained.record)
    result = {
        "key": cell.key,
        "title": cell.title,
        "tokens": trained.tokens,
        "points": list(_score(cell, config)) if cell.score_windows else [],
        "feedback": trained.losses_after,
        "read": {name: n * config.seq_len for name, n in zip(state["domains"], state["cursors"], strict=True)},
        "late": _late_losses(record),
        "policy_errors": sum(event["event"] == "policy_error" for event in record.events),
    }
    replace(done, json.dumps(result, indent=1) + "\n")
    for path in checkpoints(cell.out):
        if not (cell.keep and path == trained.checkpoint):
            shutil.rmtree(path)
    return result


def _late_losses(record: RunRecord) -> dict[str, float]:
    decisions = record.decisions[-max(1, len(record.decisions) // 4) :]
    count = np.array([decision["loss_tokens"] for decision in decisions], dtype=np.float64)
    # null, for nothing read, becomes NaN and then nothing.
    loss = np.nan_to_num(np.array([decision["loss"] for decision in decisions], dtype=np.float64))
    sums, tokens = (loss * count).sum(axis=0), count.sum(axis=0)
    return {name: float(sums[d] / tokens[d]) for d, name in enumerate(record.header["domains"]) if tokens[d] > 0}


def is_startable(cell: Cell) -> bool:
    """Whether the parameters that `cell` ended with are there."""
    return (cell.out / RESULT).exists() and latest_checkpoint(cell.out) is not None


def _score(cell: Cell, config: TrainConfig) -> Iterator[dict[str, Any]]:
    manifest = Manifest.open(cell.score, roots=cell.score_roots)
    device = resolve_device(config.device)
    for path in checkpoints(cell.out):
        state = read_state(path)
        shape = ModelConfig(**state["config"]["model"])
        model = build_model(shape)
        load_parameters(path, model)
        losses = held_out_loss(
            model.to(device),
            manifest,
            seq_len=config.seq_len,
            windows_per_domain=cell.score_windows,
            batch_size=config.batch_size,
            vocab_size=shape.vocab_size,
            device=device,
        )
        rows = config.batch_size * config.grad_accumulation_steps
        yield {"tokens": state["step"] * rows * config.seq_len, "losses": losses}
