"""Best-fit packing: rows of whole documents, listed once in a sidecar for each shard.

By default a row is a window of a shard, whatever documents it cuts. A packed row is filled with pieces of
documents instead, so that every target lies in the document of its input: csrc/packing.h says which pieces
and has the format of the sidecar. Sidecars lie in a cache folder; any row is found in two short reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixloader import _core
from mixloader.errors import ManifestError, ShardError
from mixloader.files import cache_folder, sync
from mixloader.formats.base import Shard

_FORMAT = 1  # of the sidecar and of the rows in it: a change of either makes every sidecar anew
_SAMPLES, _SAMPLE = 16, 4096  # of a file's content: how many, of how many bytes


class PackedShard(NamedTuple):
    """The packed rows of a shard. path: the sidecar. rows: in one epoch. targets: slots filled, of rows * seq_len."""

    path: str
    rows: int
    targets: int


def pack_rows(
    shards: Sequence[Shard],
    seq_len: int,
    *,
    boundaries: _core.Boundaries,
    eot: int = 0,
    cache_dir: str | Path | None = None,
    threads: int | None = None,
) -> list[PackedShard]:
    """The packed rows of each shard, in order; those not in the cache are made now, in parallel.

    boundaries: INDEX, AFTER_EOT or AT_EOT: where documents begin; eot: the end-of-text token of the latter two.
    cache_dir: by default $MIXLOADER_CACHE, else ~/.cache/mixloader. threads: by default one a core.
    A sidecar is named by what was packed and how, so it serves every data set with that shard, and a shard
    with other content gets another one (content is judged by size and samples: remove the sidecars after
    a few tokens of a large shard were changed in place). Processes of one machine that ask for the same
    shards share the work. A killed build leaves whole sidecars and is gone on with by the next call.
    Raises ManifestError for shards that cannot be packed, ShardError for those that cannot be read.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; expected an integer of at least 1")
    if boundaries == _core.Boundaries.NONE:
        raise ValueError("rows are packed with documents: say where they begin, by an index or an end-of-text token")
    for shard in shards:
        _check(shard, boundaries)
    folder = cache_folder(cache_dir) / "packing"
    job = partial(_packed, folder=folder, seq_len=seq_len, boundaries=boundaries, eot=eot)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            packed: list[PackedShard | None] = [None] * len(shards)
            # What other processes are at is left for last, so that each finds work of its own.
            for wait in (False, True):
                missing = [i for i, found in enumerate(packed) if found is None]
                for i, found in zip(
                    missing, pool.map(partial(job, wait=wait), [shards[i] for i in missing]), strict=True
                ):
                    packed[i] = found
        return [found for found in packed if found is not None]
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(
            f"cannot keep packed rows in {folder}: {error}; name another folder with cache_dir= or MIXLOADER_CACHE"
        ) from error


def _check(shard: Shard, boundaries: _core.Boundaries) -> None:
    known = shard.for_core()
    if not known["path"]:
        raise ManifestError(
            f"shard {known['name']} is remote or compressed, and rows are packed from files on this machine; "
            "fetch it first, or draw windows"
        )
    if boundaries == _core.Boundaries.INDEX and not (known.get("documents") or known.get("extents_are_documents")):
        raise ManifestError(
            f"shard {known['name']} has no index of its documents; pack it by its end-of-text token instead"
        )


def _packed(
    shard: Shard, *, folder: Path, seq_len: int, boundaries: _core.Boundaries, eot: int, wait: bool
) -> PackedShard | None:
    """Find a shard's packed rows or make them; None if another process is making them and `wait` is false."""
    fingerprint = _fingerprint(shard, seq_len, boundaries, eot)
    path = folder / f"{fingerprint.hex()}.rows"
    temporary = path.with_suffix(".tmp")
    while (found := _find(path, fingerprint)) is None:
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "wb", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            # The file may have been renamed or removed, its work done, before its lock was got.
            if not _is_at(file.fileno(), temporary):
                continue
            try:
                if _find(path, fingerprint) is None:
                    file.truncate(0)
                    _core.pack_shard(
                        shard.for_core(), seq_len, boundaries, eot, fingerprint, file.fileno(), str(temporary)
                    )
                    os.fsync(file.fileno())
                    temporary.replace(path)
                    sync(folder)
            finally:
                if _is_at(file.fileno(), temporary):
                    temporary.unlink()
    return found


def _find(path: Path, fingerprint: bytes) -> PackedShard | None:
    """The sidecar at `path`; None if it is not there, damaged, or that of something else."""
    try:
        packed = _core.PackedRows(str(path))
        packed.verify()
    except ShardError:
        return None
    return PackedShard(str(path), packed.rows, packed.targets) if packed.fingerprint == fingerprint else None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _fingerprint(shard: Shard, seq_len: int, boundaries: _core.Boundaries, eot: int) -> bytes:
    """16 bytes that stand for the rows: what is known of the shard, samples of its files, and how it is packed.

    Neither names nor times count, so a copy of a shard has the rows of its original.
    """
    known = shard.for_core()
    parts = [_FORMAT, seq_len, boundaries.name, 0 if boundaries == _core.Boundaries.INDEX else eot]
    table = known.get("documents") if boundaries == _core.Boundaries.INDEX else None
    for name, value in [*known.items(), *(table or {}).items()]:
        if name not in ("name", "path", "checksums", "documents"):
            parts += [name, hashlib.sha256(value.tobytes()).hexdigest() if isinstance(value, np.ndarray) else value]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
    for path in [known["path"], *([table["path"]] if table else [])]:
        for sample in _samples(path):
            digest.update(sample)
    return digest.digest()


def _samples(path: str) -> list[bytes]:
    """The size of a file, and blocks of it, first and last among them."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            offsets = sorted({max(0, size - _SAMPLE) * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
            return [str(size).encode(), *(os.pread(file.fileno(), _SAMPLE, offset) for offset in offsets)]
    except OSError as error:
        raise ShardError(f"cannot read shard {path}: {error}") from error
