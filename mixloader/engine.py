"""The C++ core over a manifest, and what runs beside it: tables of packed rows, shards that are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mixloader import _core
from mixloader.batch import BatchFormat
from mixloader.cache import ShardCache, open_cache
from mixloader.errors import ConfigError, ManifestError
from mixloader.fetcher import Fetcher
from mixloader.formats import Shard
from mixloader.formats.source import is_url
from mixloader.layout import Layout
from mixloader.manifest import Manifest
from mixloader.packing import pack_rows
from mixloader.reference import domain_key
from mixloader.rules import StreamRules

_IO = {"pread": False, "mmap": True}


class Engine:
    """One core, started. core: the _core.Streamer. windows: int64 [D], rows in one epoch of each domain.

    domains: (key, shards) of each, as the core was given them. limits: windows that each may give in all.

    units: int64 [D], the weights of step 0.
    threads: None lets their number grow where storage is slow.
    """

    def __init__(
        self,
        manifest: Manifest,
        seq_len: int,
        *,
        rules: StreamRules,
        format: BatchFormat,
        layout: Layout,
        units: np.ndarray,
        seed: int,
        vocab_size: int | None,
        eot: int | None,
        io: str,
        threads: int | None,
        cache_dir: str | Path | None,
        cache_bytes: int | None,
    ):
        if io not in _IO:
            raise ConfigError(f"io is {io!r}; expected 'pread' or 'mmap'")
        _check_documents(manifest, rules, eot, vocab_size)
        shards = [shard for domain in manifest.domains for shard in domain.shards]
        self._rows = partial(_rows, shards, rules=rules, eot=eot, cache_dir=cache_dir)
        known = [{**shard.for_core(), **rows} for shard, rows in zip(shards, self._rows(seq_len), strict=True)]
        of_shards = iter(known)
        self.domains = [(domain_key(d.name), list(islice(of_shards, len(d.shards)))) for d in manifest.domains]
        self.windows = np.array([sum(s["windows"] for s in of) for _, of in self.domains], dtype=np.int64)
        _check_windows(manifest, seq_len, self.windows)
        self.limits = rules.limits(manifest.names, self.windows)
        self._plan = {"seed": seed, "rows": layout.global_batch, "limits": self.limits, **rules.plan_for_core()}
        with ExitStack() as opened:
            cache = None
            if not manifest.is_ready:
                cache = open_cache(cache_dir, cache_bytes)
                opened.callback(cache.close)
                _fetch_tables(cache, known)
            self.core = _core.Streamer(
                domains=self.domains,
                seq_len=seq_len,
                vocab_size=vocab_size or 0,
                eot=eot or 0,
                seed=seed,
                mmap=_IO[io],
                limits=self.limits,
                units=units,
                threads=threads,
                boundaries=rules.boundaries,
                **rules.plan_for_core(),
                **format.for_core(),
                **vars(layout),
            )
            opened.callback(self.core.close)
            if cache is not None:
                opened.callback(Fetcher(self.core, shards, cache).close)
            self._opened = opened.pop_all()

    def epoch_windows(self, seq_len: int) -> np.ndarray:
        """int64 [D]: rows in one epoch of each domain, if they were of another length."""
        rows = iter(self._rows(seq_len))
        return np.array([sum(next(rows)["windows"] for _ in shards) for _, shards in self.domains], dtype=np.int64)

    def planner(self, units: Sequence[int]) -> _core.Planner:
        """The plan of this stream without its data, at step 0, with integer weights [D]."""
        return _core.Planner(
            keys=[key for key, _ in self.domains],
            windows=[[shard["windows"] for shard in shards] for _, shards in self.domains],
            units=np.array(units, dtype=np.int64),
            **self._plan,
        )

    def close(self) -> None:
        """End the threads and let go of the files."""
        self._opened.close()


def _fetch_tables(cache: ShardCache, shards: list[dict[str, Any]]) -> None:
    """Bring document tables that are files of their own, and say where they are now; they stay as long as the cache."""
    for shard in shards:
        table = shard.get("documents")
        if table is not None and table["path"] != shard["name"] and is_url(table["path"]):
            shard["documents"] = {**table, "path": cache.fetch(table["path"])}


def _rows(
    shards: Sequence[Shard], seq_len: int, *, rules: StreamRules, eot: int | None, cache_dir: str | Path | None
) -> list[dict[str, Any]]:
    """How many rows of seq_len tokens each shard gives, and where their table is, if they are packed."""
    if rules.packing is None:
        return [{"windows": max(0, shard.tokens - 1) // seq_len} for shard in shards]
    packed = pack_rows(shards, seq_len, boundaries=rules.boundaries, eot=eot or 0, cache_dir=cache_dir)
    return [{"packing": shard.path, "windows": shard.rows} for shard in packed]


def _check_windows(manifest: Manifest, seq_len: int, windows: np.ndarray) -> None:
    for domain, count in zip(manifest.domains, windows.tolist(), strict=True):
        if count == 0:
            raise ManifestError(
                f"domain {domain.name!r} has no shard of {seq_len + 1} tokens, which one window of "
                f"seq_len {seq_len} needs; its longest has {max(s.tokens for s in domain.shards)}"
            )


def _check_documents(manifest: Manifest, rules: StreamRules, eot: int | None, vocab_size: int | None) -> None:
    if rules.documents in ("eot", "eot_start"):
        if eot is None:
            raise ConfigError(
                f"documents={rules.documents!r} needs the id of the end-of-text token, which the data do not say; "
                "give eot="
            )
        narrow = [s for domain in manifest.domains for s in domain.shards if eot >= 1 << 8 * s.width]
        if narrow or (vocab_size is not None and eot >= vocab_size):
            where = f"shard {narrow[0].path} has {narrow[0].dtype} tokens" if narrow else f"vocab_size is {vocab_size}"
            raise ConfigError(f"eot is {eot}, but {where}: no document would ever end; check eot=")
    if rules.documents == "index":
        for domain in manifest.domains:
            for shard in domain.shards:
                if shard.documents is None and not shard.extents_are_documents:
                    raise ManifestError(
                        f"documents='index' is asked for, but shard {shard.path} ({shard.format}) has no table of "
                        "documents; give documents='eot'"
                    )
