"""Held-out windows as batches: finite, in the same order every time, and the same on every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixloader import _core
from mixloader.batch import IGNORED
from mixloader.cache import ShardCache, known, open_cache
from mixloader.errors import ManifestError, TokenError
from mixloader.formats import Shard, read_tokens
from mixloader.layout import check_counts
from mixloader.manifest import Manifest


class HeldOut:
    """The validation shards of a manifest, to be iterated over as often as one likes.

    windows_per_domain: at most so many windows of each domain, spread evenly; None takes all.
    domains: names; by default all that have held-out tokens.
    vocab_size: ids at or above it are an error; by default the manifest's.
    cache_dir, cache_bytes: where remote and compressed shards are kept, and how much of them.

    Each item: {"input_ids": int64 [b, T], "targets": int64 [b, T], "domain_ids": int64 [b]} with
    b <= batch_size; domain by domain. After the end of a shard inputs are 0 and targets -100.
    Raises ManifestError if a named domain has nothing held out; while iterating, TokenError for a
    token outside the vocabulary, ShardError for a shard that cannot be read or differs from its block checksums.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        seq_len: int,
        *,
        windows_per_domain: int | None = None,
        domains: Sequence[str] | None = None,
        vocab_size: int | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
    ):
        check_counts(batch_size=(batch_size, 1), seq_len=(seq_len, 1), windows_per_domain=(windows_per_domain or 0, 0))
        self.manifest, self.batch_size, self.seq_len = manifest, batch_size, seq_len
        self.windows_per_domain = windows_per_domain
        self.vocab_size = manifest.vocab_size if vocab_size is None else vocab_size
        self._cache_options = cache_dir, cache_bytes
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
        with contextlib.ExitStack() as opened:
            shards = [shard for name in self.names for shard in self.manifest.domain(name).validation]
            cache = None
            if not all(shard.is_ready for shard in shards):
                cache = open_cache(*self._cache_options)
                opened.callback(cache.close)
            for name in self.names:
                index = self.manifest.names.index(name)
                with contextlib.closing(self._windows(name, cache)) as windows:
                    for window in windows:
                        rows.append((window, index))
                        if len(rows) == self.batch_size:
                            yield _batch(rows)
                            rows = []
        if rows:
            yield _batch(rows)

    def _windows(self, name: str, cache: ShardCache | None) -> Generator[np.ndarray, None, None]:
        """Windows of a domain's validation shards, int64 [seq_len + 1], IGNORED after their end."""
        shards, count = self.manifest.domain(name).validation, self._count(name)
        places = [(i, start) for i, shard in enumerate(shards) for start in range(0, shard.tokens - 1, self.seq_len)]
        chosen = (places[i * len(places) // count] for i in range(count))
        for number, starts in groupby(chosen, key=lambda place: place[0]):
            shard = shards[number]
            with _at_hand(shard, cache) as copy:
                for _, start in starts:
                    length = min(self.seq_len + 1, shard.tokens - start)
                    tokens = read_tokens(copy, start, length)
                    self._check(tokens, name, shard, start)
                    window = np.full(self.seq_len + 1, IGNORED, dtype=np.int64)
                    window[:length] = tokens
                    yield window

    def _check(self, tokens: np.ndarray, name: str, shard: Shard, start: int) -> None:
        limit = np.iinfo(np.int64).max if self.vocab_size is None else self.vocab_size
        (bad,) = np.nonzero((tokens < 0) | (tokens >= limit))
        if len(bad):
            token = int(tokens[bad[0]])
            expected = "of at least 0" if token < 0 else f"below vocab_size = {limit}"
            raise TokenError(
                f"the validation shards of domain {name!r} hold token {token}, at {start + bad[0]} of {shard.path}; "
                f"expected ids {expected}; pack the domain again with the right tokenizer"
            )

    def _count(self, name: str) -> int:
        shards = self.manifest.domain(name).validation
        windows = sum(-(-max(shard.tokens - 1, 0) // self.seq_len) for shard in shards)
        return windows if self.windows_per_domain is None else min(windows, self.windows_per_domain)


@contextlib.contextmanager
def _at_hand(shard: Shard, cache: ShardCache | None) -> Iterator[Shard]:
    """The shard as a raw file on this machine, compared with its block checksums."""
    path, fetched = shard.path, cache is not None and not shard.is_ready
    if cache is not None and fetched:
        path = cache.fetch(shard.path, **known(shard))
    try:
        if shard.checksums is not None:
            status = os.stat(path)
            _verify(path, shard.checksums, status.st_mtime_ns, status.st_size)
        yield replace(shard, path=path, compression=None)
    finally:
        if cache is not None and fetched:
            cache.release(path)


@cache
def _verify(path: str, sidecar: str, modified: int, size: int) -> None:
    """Compare a file with its block checksums, once a process as long as it is not written to."""
    _core.verify(path, sidecar)


def _batch(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, Any]:
    windows = torch.from_numpy(np.stack([window for window, _ in rows]))
    return {
        "input_ids": windows[:, :-1].clamp(min=0),
        "targets": windows[:, 1:].contiguous(),
        "domain_ids": torch.tensor([domain for _, domain in rows]),
    }
