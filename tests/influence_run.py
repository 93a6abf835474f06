"""A small model and rows for tests of influence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixloader.config import ModelConfig
from mixloader.influence import Influence
from mixloader.influence_table import InfluenceTable
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats
from mixloader.train.model import LanguageModel, build_model

V, T, D = 40, 12, 3
NAMES = ("web", "code", "math")


def small_model(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24} | changes
    return build_model(ModelConfig(vocab_size=V, seq_len=T, **sizes))


def rows(n: int, seed: int, domain: int | None = None) -> dict[str, Tensor]:
    """Rows whose tokens follow each other in a way of their domain's own, with some noise; domains in turn."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.arange(n) % D if domain is None else torch.full((n,), domain)
    tokens = torch.randint(0, V, (n, T + 1), generator=g)
    for t in range(T):
        follow = torch.rand(n, generator=g) < 0.8
        tokens[:, t + 1] = torch.where(follow, (tokens[:, t] * (3 + 2 * ids) + 1) % V, tokens[:, t + 1])
    return {"input_ids": tokens[:, :-1].clone(), "targets": tokens[:, 1:].clone(), "domain_ids": ids}


def probes() -> dict[str, list[dict[str, Tensor]]]:
    return {"source": [rows(8, 100, 0)], "target": [rows(8, 101, 2)]}


def begin(model: nn.Module, batch_size: int, **options: Any) -> tuple[Influence, DomainStats]:
    options = {"rank": 16, "stride": 1, "probe_every": 1, "probe_rows": 8, "half_life": 20.0} | options
    influence = Influence(model, probes(), **options)
    influence.begin(NAMES, batch_size)
    stats = DomainStats(D)
    stats.influence = influence
    return influence, stats


def backward(
    model: nn.Module, stats: DomainStats, batch: dict[str, Tensor], factor: float = 1.0, **options: Any
) -> None:
    logits = model(batch["input_ids"])
    loss = domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], stats=stats, **options)
    (loss * factor).backward()


def table(influence: Influence) -> InfluenceTable:
    snapshot = influence.snapshot()
    assert snapshot is not None
    return snapshot.wait()
