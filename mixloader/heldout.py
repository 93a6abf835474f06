"""Held-out windows as batches: finite, in the same order every time, and the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mixloader.batch import IGNORED
from mixloader.errors import ManifestError
from mixloader.formats import read_tokens
from mixloader.manifest import Domain, Manifest


class HeldOut:
    """The validation shards of a manifest, to be iterated over as often as one likes.

    windows_per_domain: at most so many windows of each domain, spread evenly; None takes all.
    domains: names; by default all that have held-out tokens.

    Each item: {"input_ids": int64 [b, T], "targets": int64 [b, T], "domain_ids": int64 [b]} with
    b <= batch_size; domain by domain. After the end of a shard inputs are 0 and targets -100.
    Raises ManifestError if a named domain has nothing held out, ShardError for a shard that cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        seq_len: int,
        *,
        windows_per_domain: int | None = None,
        domains: Sequence[str] | None = None,
    ):
        self.manifest, self.batch_size, self.seq_len = manifest, batch_size, seq_len
        self.windows_per_domain = windows_per_domain
        self.names = [d.name for d in manifest.domains if self._count(d.name)] if domains is None else list(domains)
        for name in self.names:
            if not self._count(name):
                raise ManifestError(
                    f"domain {name!r} has no held-out tokens; name a file with `val`, or set some aside"
                )

    def __len__(self) -> int:
        """Batches."""
        return -(-sum(map(self._count, self.names)) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows: list[tuple[np.ndarray, int]] = []
        for name in self.names:
            index = self.manifest.names.index(name)
            for window in _windows(self.manifest.domains[index], self.seq_len, self._count(name)):
                rows.append((window, index))
                if len(rows) == self.batch_size:
                    yield _batch(rows)
                    rows = []
        if rows:
            yield _batch(rows)

    def _count(self, name: str) -> int:
        shards = self.manifest.domain(name).validation
        windows = sum(-(-max(shard.tokens - 1, 0) // self.seq_len) for shard in shards)
        return windows if self.windows_per_domain is None else min(windows, self.windows_per_domain)


def _windows(domain: Domain, seq_len: int, count: int) -> Iterator[np.ndarray]:
    """`count` windows of a domain's validation shards, int64 [seq_len + 1], IGNORED after their end."""
    places = [(shard, start) for shard in domain.validation for start in range(0, max(shard.tokens - 1, 0), seq_len)]
    for i in range(count):
        shard, start = places[i * len(places) // count]
        length = min(seq_len + 1, shard.tokens - start)
        window = np.full(seq_len + 1, IGNORED, dtype=np.int64)
        window[:length] = read_tokens(shard, start, length)
        yield window


def _batch(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, Any]:
    windows = torch.from_numpy(np.stack([window for window, _ in rows]))
    return {
        "input_ids": windows[:, :-1].clamp(min=0),
        "targets": windows[:, 1:].contiguous(),
        "domain_ids": torch.tensor([domain for _, domain in rows]),
    }
