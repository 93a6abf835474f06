"""A data set and a config small enough to train in a second, and a policy whose decisions depend on all it saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from corpora import write_llmc

from mixloader.config import ModelConfig, TrainConfig
from mixloader.formats import open_shard
from mixloader.manifest import Domain, Manifest
from mixloader.observation import DomainTable, Observation
from mixloader.policies import register

VOCAB_SIZE = 50
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, dropout=0.1)
FIELDS = {"prose": "source", "code": "source", "maths": "target"}


def tiny_data(folder: Path) -> Path:
    """Three domains of a learnable language each, with held-out shards; returns the manifest's path."""
    domains = []
    for number, (name, field) in enumerate(FIELDS.items()):
        rng = np.random.default_rng(number)
        shards = []
        for kind, tokens in (("train_000", 3000), ("train_001", 2000), ("val_000", 500)):
            # A token is mostly the one before it times a number of the domain's own.
            text = np.zeros(tokens, dtype="<u4")
            for i in range(1, tokens):
                text[i] = text[i - 1] * (3 + 2 * number) + 1 if rng.random() < 0.9 else rng.integers(VOCAB_SIZE)
                text[i] %= VOCAB_SIZE
            shards.append(open_shard(write_llmc(folder / name / f"{kind}.bin", text)))
        domains.append(Domain(name, tuple(shards[:2]), (shards[2],), field))
    Manifest(tuple(domains), vocab_size=VOCAB_SIZE).save(folder / "manifest.json")
    return folder / "manifest.json"


def tiny_config(data: Path, out: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        data=str(data),
        out=str(out),
        steps=12,
        batch_size=4,
        seq_len=16,
        policy="chase",
        learning_rate=1e-2,
        warmup_steps=2,
        eval_windows=8,
        eval_every=4,
        checkpoint_every=3,
        log_every=1,
        device="cpu",
        threads=1,
        model=MODEL,
    )
    return dataclasses.replace(config, **changes)


@register("chase")
class Chase:
    """Follows a running sum of all losses seen, so that an observation lost or doubled changes every later weight."""

    needs = frozenset({"loss"})

    def reset(self, domains: DomainTable) -> None:
        self.sums, self.feedback = np.zeros(len(domains)), 0.0

    def decide(self, observation: Observation) -> np.ndarray:
        self.sums = self.sums * 0.9 + np.nan_to_num(observation.loss.value) * observation.loss.count
        self.feedback += sum(float(signal.value) for signal in observation.feedback.values())
        weights = 0.1 + self.sums / self.sums.max()
        weights[0] += self.feedback / 1000
        return weights / weights.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "feedback": self.feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.feedback = np.array(state["sums"]), state["feedback"]
