"""A file that tokens are read from: on this machine or at a URL, raw or compressed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from mixloader import remote
from mixloader.errors import ShardError

COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
"""By the suffix of a compressed file's name."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BLOCK = 1 << 20  # bytes read at a time


def is_url(path: str | os.PathLike[str]) -> bool:
    path = str(path)
    return "://" in path and _URL.match(path) is not None


def without_query(path: str) -> str:
    """A path or URL without the query and fragment that a URL of HTTP may have."""
    return re.split(r"[?#]", path, maxsplit=1)[0] if path.lower().startswith(("http://", "https://")) else path


def name_of(path: str) -> str:
    """The name of the file that a path or URL leads to."""
    return without_query(path).rsplit("/", 1)[-1]


def folder_of(path: str) -> str:
    """The folder, or the URL of the folder, of the file that a path or URL leads to."""
    return without_query(path).rpartition("/")[0]


class Source:
    """Offsets and sizes are those of the raw content; `stored_bytes` is the size of the file as it lies there.

    path: an absolute path, or a URL that fsspec opens. compression: None, "zstd" or "gzip"; by default
    what the name's suffix says. raw_bytes: size of the raw content of a compressed file, where it is known.
    Raises ShardError for a file that is missing, empty, no regular file or not to be opened.
    """

    def __init__(self, path: str | Path, compression: str | None = "by suffix", raw_bytes: int | None = None):
        self.path = str(path) if is_url(path) else os.path.abspath(path)
        if compression == "by suffix":
            compression = COMPRESSIONS.get(os.path.splitext(name_of(self.path))[1])
        self.compression = compression
        self.stored_bytes = self._stored_size()
        self._raw_bytes = raw_bytes
        # Of a compressed file: what was decompressed last, the byte where it begins, and what follows.
        self._rest: bytes | None = None
        self._position = 0
        self._following: Iterator[bytes] = iter(())

    @property
    def name(self) -> str:
        """The name of the file without its folder and the suffix of its compression."""
        name = name_of(self.path)
        return os.path.splitext(name)[0] if os.path.splitext(name)[1] in COMPRESSIONS else name

    @cached_property
    def size(self) -> int:
        """The size of the raw content. Where nothing says that of a compressed file, all of it is decompressed."""
        if self.compression is None:
            return self.stored_bytes
        if self._raw_bytes is not None:
            return self._raw_bytes
        size = sum(map(len, self.blocks()))
        if size == 0:
            raise ShardError(f"shard {self.path} is empty; write it again or take it out of its domain")
        return size

    def read(self, offset: int, count: int) -> bytes:
        """Bytes [offset, offset + count) of the raw content, fewer at its end."""
        with self._errors():
            if self.compression is not None:
                return self._read_compressed(offset, count)
            if is_url(self.path):
                count = min(count, self.stored_bytes - offset)
                return remote.read_range(self.path, offset, count) if count > 0 else b""
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(count)

    def blocks(self, *, stored: bool = False) -> Iterator[bytes]:
        """The raw content, or the file as it is stored, from its beginning to its end in blocks."""
        with self._errors(), self._open() as file:
            parts = iter(lambda: file.read(_BLOCK), b"")
            yield from parts if stored else remote.decompressed(parts, self.compression, self.path)

    def beside(self, name: str) -> str:
        """The path of another file in this one's folder, or below. Raises ShardError for a name that leads out."""
        parts = name.split("/")
        if not name or "\0" in name or ".." in parts or os.path.isabs(name) or is_url(name):
            raise ShardError(f"{self.path} names the file {name!r}, which lies outside its folder")
        plain = without_query(self.path)
        return f"{folder_of(self.path)}/{name}{self.path[len(plain) :]}"  # a query may be what lets one in

    def find(self, name: str) -> Source | None:
        """Another file in this one's folder as it lies there, or None."""
        path = self.beside(name)
        if is_url(path):
            return Source(path) if remote.exists(path) else None
        return Source(path) if os.path.exists(path) else None

    def _stored_size(self) -> int:
        with self._errors():
            if is_url(self.path):
                size = remote.size(self.path)
            else:
                status = os.stat(self.path)
                if not stat.S_ISREG(status.st_mode):
                    raise ShardError(f"shard {self.path} is not a regular file")
                size = status.st_size
        if size == 0:
            raise ShardError(f"shard {self.path} is empty; write it again or take it out of its domain")
        return size

    def _read_compressed(self, offset: int, count: int) -> bytes:
        """Reading on costs what lies between; reading back begins anew."""
        if self._rest is None or offset < self._position:
            self._following, self._rest, self._position = self.blocks(), b"", 0
        found = bytearray()
        while len(found) < count:
            begin = offset + len(found) - self._position
            found += self._rest[begin : begin + count - len(found)]
            if len(found) == count:
                break
            self._position += len(self._rest)
            self._rest = next(self._following, b"")
            if not self._rest:
                self._rest = None
                break
        return bytes(found)

    def _open(self) -> BinaryIO:
        return remote.open(self.path) if is_url(self.path) else open(self.path, "rb")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ShardError:
            raise
        except FileNotFoundError as error:
            raise ShardError(f"shard {self.path} does not exist; check the path or restore the file") from error
        except remote.DamagedError as error:
            raise ShardError(f"{error}: restore it") from error
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot open shard {self.path}: {error}") from error
