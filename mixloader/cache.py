"""A bounded folder of fetched shards that the processes of one machine share, whichever of them dies when.

An entry is one file, whole and checked: it is written under its name with `.part`, then renamed; its SHA-256 stands in
a file beside it, `.NAME.sum`. Each name stands for
one byte of the file `locks`: shared while an entry is in use, exclusive while it is written or removed. The locks are
the kernel's (of open file descriptions), so those of a killed process are gone with it, and a `.part` that nobody has
locked is a dead writer's and is removed. Byte 0 is held while the folder is counted. The folder is on a local disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import struct
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mixloader import remote
from mixloader.errors import ConfigError, ShardError
from mixloader.files import cache_folder
from mixloader.formats import Shard
from mixloader.remote import Cancelled

DEFAULT_LIMIT = 64 << 30  # bytes
_POLL_S = 0.02  # between two looks at a lock that another process holds
_BUSY_S = 0.3  # room is waited for so long before the limit yields
_DAMAGED_S = 60.0  # a damaged copy that another process uses is waited for so long
_BLOCK = 1 << 20  # bytes read at a time
_LEDGER = 0
_PART = ".part"


class NotNowError(Exception):
    """Fetched ahead only if it is cheap: another process is at it, or (`full`) entries in use leave no room."""

    def __init__(self, url: str, *, full: bool):
        super().__init__(url)
        self.full = full


class ShardCache:
    """Local copies of remote or compressed files; those in use by any process stay, the others go oldest use first.

    folder: made if it is missing; by default `shards` in MIXLOADER_CACHE, or in ~/.cache/mixloader.
    limit_bytes: of all that the folder holds, whoever put it there. Only a file that a reader waits for may
        exceed it, and only while all others are in use.
    workers: files that a Fetcher fetches at once in this process.
    """

    def __init__(self, folder: str | Path | None = None, limit_bytes: int = DEFAULT_LIMIT, workers: int = 4):
        if not all(isinstance(n, (int, float)) and n == n // 1 >= 1 for n in (limit_bytes, workers)):
            raise ConfigError(
                f"a shard cache needs limit_bytes (cache_bytes of a loader) and workers, integers of at least 1, "
                f"not {limit_bytes!r} and {workers!r}"
            )
        self.folder = Path(folder) if folder is not None else cache_folder() / "shards"
        self.limit_bytes, self.workers = int(limit_bytes), int(workers)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = _Locks(self.folder / "locks")
        except OSError as error:
            raise ConfigError(f"cannot use {self.folder} as shard cache: {error}; give another folder") from error
        self._changed = threading.Condition()
        self._turns: set[str] = set()  # names that a thread of this process is at
        self._uses: Counter[str] = Counter()  # of entries by this process; each has a shared lock
        self._versions: dict[str, str] = {}  # of files without a digest, by URL, as they were first fetched
        self._checked: set[str] = set()  # names of entries that were written here or compared with their SHA-256
        with self._counting():
            self._count()  # removes what dead writers left

    def fetch(
        self,
        url: str,
        *,
        compression: str | None = None,
        digest: str | None = None,
        bytes: int | None = None,
        stored_bytes: int | None = None,
        ahead: bool = False,
        cancel: threading.Event | None = None,
    ) -> str:
        """The path of a local copy, decompressed; it stays until `release(path)`, once for each fetch.

        digest, bytes, stored_bytes: see remote.fetch. ahead: raises NotNowError rather than wait for another
        process or exceed the limit. Raises ShardError if it cannot be fetched, Cancelled once `cancel` is set.
        """
        known: dict[str, Any]
        known = {"compression": compression, "digest": digest, "bytes": bytes, "stored_bytes": stored_bytes}
        cancel = cancel or threading.Event()
        version = None if digest is not None else self._versions.get(url) or remote.version(url, cancel)
        path = self.folder / _entry_name(url, known, version)
        with self._turn(path.name, cancel):
            if not self._uses[path.name]:
                self._take(path, url, known | {"version": version}, ahead, cancel)
                _touch(path)
            self._uses[path.name] += 1
        if version is not None:
            self._versions[url] = version
        return str(path)

    def has(self, url: str, **known: Any) -> bool:
        """Whether a copy is in the folder, if nobody removes it; `known` as for fetch.

        Where nobody has asked for the version of the file yet, a copy of any version counts.
        """
        version = self._versions.get(url)
        if known.get("digest") is None and version is None:
            copies = [path for path in self.folder.glob(_entry_key(url, known) + "*") if path.suffix != _PART]
        else:
            copies = [self.folder / _entry_name(url, known, version)]
        return any(_is_whole(path, known.get("bytes")) for path in copies)

    def release(self, path: str) -> None:
        """A fetched file is not needed any more; it stays in the folder until its room is needed."""
        name = os.path.basename(path)
        with self._turn(name):
            self._uses[name] -= 1
            if not self._uses[name]:
                del self._uses[name]
                _touch(self.folder / name)
                self._locks.release(name)

    def close(self) -> None:
        """Release everything. Copies stay for other processes, and for the next run."""
        self._locks.close()
        self._uses.clear()

    def _take(self, path: Path, url: str, known: dict[str, Any], ahead: bool, cancel: threading.Event) -> None:
        """Lock an entry for use; what is not there, or is damaged, is written first."""
        name, size = path.name, known["bytes"]
        damaged, deadline = 0, math.inf  # the file that was found to be
        while True:
            if self._locks.shared(name):
                if _inode(path) != damaged and self._is_sound(path, size):
                    return
                self._locks.release(name)
                if _inode(path) != damaged:
                    damaged = _inode(path)
                    deadline = time.monotonic() + _DAMAGED_S if damaged else math.inf
                if time.monotonic() > deadline:
                    raise ShardError(
                        f"{path}, the cached copy of {url}, is damaged, and another process uses it; remove the file"
                    )
            if self._locks.exclusive(name):
                try:
                    if _inode(path) == damaged or not self._is_sound(path, size):
                        self._write(path, url, known, ahead, cancel)
                except BaseException:
                    self._locks.release(name)
                    raise
                self._locks.shared(name)
                return
            if ahead:
                raise NotNowError(url, full=False)
            if cancel.wait(_POLL_S):
                raise Cancelled(url)

    def _is_sound(self, path: Path, size: int | None) -> bool:
        """Whether an entry is there, whole, and what was written; the last is looked at once."""
        if not _is_whole(path, size):
            return False
        if path.name not in self._checked:
            try:
                with path.open("rb") as file:
                    if _sum_path(path).read_text() != _sha256(file):
                        return False
            except (OSError, ValueError):
                return False
            self._checked.add(path.name)
        return True

    def _write(self, path: Path, url: str, known: dict[str, Any], ahead: bool, cancel: threading.Event) -> None:
        """Fetch into `.part`, which has its full size from the start so that others count it, then rename."""
        part = path.with_name(path.name + _PART)
        # Of a compressed file whose content has an unknown size, only the stored bytes can be counted before.
        announced = known["bytes"] or known["stored_bytes"] or remote.size(url)
        try:
            with part.open("w+b") as file:
                self._reserve(file.fileno(), announced, url, ahead, cancel)
                written = remote.fetch(url, file, **known, cancel=cancel)
                file.truncate(written)
                file.flush()
                os.fdatasync(file.fileno())
                _sum_path(path).write_text(_sha256(file))
            part.replace(path)
            self._checked.add(path.name)
        except OSError as error:
            if isinstance(error, ShardError) or error.errno is None:
                raise
            advice = "free some, or lower the cache's limit" if error.errno == errno.ENOSPC else "check the folder"
            raise ShardError(f"cannot keep {url} in the cache {self.folder}: {error}; {advice}") from error
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, descriptor: int, size: int, url: str, ahead: bool, cancel: threading.Event) -> None:
        if size > self.limit_bytes:
            raise ShardError(
                f"{url} has {size} bytes, more than the {self.limit_bytes} of the cache {self.folder}; raise its limit"
            )
        given_up = time.monotonic() + _BUSY_S
        while True:
            with self._counting():
                over = self._make_room(size)
                if over and ahead:
                    raise NotNowError(url, full=True)
                if not over or time.monotonic() > given_up:
                    os.truncate(descriptor, size)
                    break
            # An entry that another thread is at, perhaps to release it, could not be removed just now.
            if cancel.wait(_POLL_S):
                raise Cancelled(url)
        if over:
            warnings.warn(
                f"the cache {self.folder} exceeds its limit by {over} bytes because all other shards in it are in use; "
                "raise the limit",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        with self._turn(""), self._locks.ledger():
            yield

    def _count(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes and last use (ns) of every file; parts of dead writers are removed."""
        sizes, ages = {}, {}
        names = os.listdir(self.folder)
        for name in {name[1:-4] for name in names if name.startswith(".")} - set(names):
            self._remove(name)  # of a copy that somebody removed, only its SHA-256 is left
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed since
                status = entry.stat()
                if entry.name.endswith(_PART) and self._remove(entry.name):
                    continue
                if entry.name != "locks" and not entry.name.startswith("."):
                    sizes[entry.name], ages[entry.name] = status.st_size, status.st_mtime_ns
        return sizes, ages

    def _make_room(self, size: int) -> int:
        """Remove entries, oldest use first, until `size` more bytes fit; returns the bytes that still do not."""
        sizes, ages = self._count()
        over = sum(sizes.values()) + size - self.limit_bytes
        for name in sorted(ages, key=ages.__getitem__):
            if over <= 0:
                return 0
            if self._remove(name):
                over -= sizes[name]
        return max(over, 0)

    def _remove(self, file_name: str) -> bool:
        """Remove an entry or part that nobody uses; False if someone does."""
        name = file_name.removesuffix(_PART)
        with self._changed:
            if self._uses.get(name) or name in self._turns:
                return False
            self._turns.add(name)
        try:
            if not self._locks.exclusive(name):
                return False
            (self.folder / file_name).unlink(missing_ok=True)
            if file_name == name:
                _sum_path(self.folder / name).unlink(missing_ok=True)
            self._locks.release(name)
            return True
        finally:
            self._end_turn(name)

    @contextlib.contextmanager
    def _turn(self, name: str, cancel: threading.Event | None = None) -> Iterator[None]:
        """One thread of this process at a time: the kernel's locks tell processes apart, not threads."""
        with self._changed:
            while name in self._turns:
                if cancel is not None and cancel.is_set():
                    raise Cancelled(name)
                self._changed.wait(0.1)
            self._turns.add(name)
        try:
            yield
        finally:
            self._end_turn(name)

    def _end_turn(self, name: str) -> None:
        with self._changed:
            self._turns.remove(name)
            self._changed.notify_all()


def open_cache(cache_dir: str | Path | None, cache_bytes: int | None) -> ShardCache:
    """The cache of shards in what a loader has as cache_dir."""
    folder = cache_folder(cache_dir) / "shards"
    return ShardCache(folder) if cache_bytes is None else ShardCache(folder, cache_bytes)


def known(shard: Shard) -> dict[str, Any]:
    """What a cache has to know of a shard besides its path."""
    return {
        "compression": shard.compression,
        "digest": shard.digest,
        "bytes": shard.bytes,
        "stored_bytes": shard.stored_bytes,
    }


class _Locks:
    """Locks by name on single bytes of one file; the kernel drops them with the open file description."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = weakref.finalize(self, os.close, self._descriptor)  # also of a cache that is dropped
        self._end.atexit = False

    def shared(self, name: str) -> bool:
        """Lock for use, also from exclusive; False if another process has it exclusively."""
        return self._try(fcntl.F_RDLCK, _byte(name))

    def exclusive(self, name: str) -> bool:
        """Lock for writing or removing; False if another process has it."""
        return self._try(fcntl.F_WRLCK, _byte(name))

    def release(self, name: str) -> None:
        if self._end.alive:
            self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _byte(name))

    @contextlib.contextmanager
    def ledger(self) -> Iterator[None]:
        self._set(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, _LEDGER)
        try:
            yield
        finally:
            self._set(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _LEDGER)

    def close(self) -> None:
        self._end()
        self._descriptor = -1

    def _try(self, kind: int, byte: int) -> bool:
        try:
            self._set(fcntl.F_OFD_SETLK, kind, byte)
        except BlockingIOError:
            return False
        return True

    def _set(self, command: int, kind: int, byte: int) -> None:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid, which must be 0.
        fcntl.fcntl(self._descriptor, command, struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0))


def _byte(name: str) -> int:
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _entry_key(url: str, known: dict[str, Any]) -> str:
    fields = [url, *(known.get(key) for key in ("compression", "digest", "bytes", "stored_bytes"))]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:24]


def _entry_name(url: str, known: dict[str, Any], version: str | None) -> str:
    """A file name that differs for every file and for everything that is known of it; its end is for people.

    version: of a file without a digest.
    """
    if known.get("digest") is not None:
        version = None
    stored = hashlib.sha256(str(version).encode()).hexdigest()[:12]
    return f"{_entry_key(url, known)}-{stored}-{re.sub(r'[^A-Za-z0-9._-]', '_', url.rpartition('/')[2])[-80:]}"


def _sum_path(path: Path) -> Path:
    """The file with the SHA-256 of an entry."""
    return path.with_name(f".{path.name}.sum")


def _sha256(file: BinaryIO) -> str:
    seen = hashlib.sha256()
    file.seek(0)
    for block in iter(lambda: file.read(_BLOCK), b""):
        seen.update(block)
    return seen.hexdigest()


def _inode(path: Path) -> int:
    """Of an entry; 0 if it is not there."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> None:
    """Move an entry to the end of the order of removal; finer than the clock of the file system."""
    now = time.time_ns()
    with contextlib.suppress(FileNotFoundError):  # someone emptied the folder by hand
        os.utime(path, ns=(now, now))


def _is_whole(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return False
    return size is None or found == size
