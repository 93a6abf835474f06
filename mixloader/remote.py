"""Files that lie elsewhere, or are compressed: their size, ranges of their bytes, and whole copies that are checked.

fsspec speaks the protocols (s3, gs, az, sftp, http, file, memory, ...) and takes credentials and endpoints from where
it always does: the environment (AWS_ENDPOINT_URL, FSSPEC_S3_KEY, ...) and ~/.config/fsspec. What it says of a failure
becomes a ShardError that names the URL. Failures that may pass (5xx, throttling, a cut or stalled connection, a short
body) are tried again, a part of a file at a time, with pauses that double.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import io
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import fsspec

from mixloader.errors import ShardError

COMPRESSIONS = ("zstd", "gzip")
PART = 8 << 20  # bytes of one request
PARTS_AHEAD = 4  # requests of one file at once, where the protocol allows it
ATTEMPTS = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 8.0
_TELLS = (
    "etag",
    "generation",
    "content-md5",
    "digest",
    "last-modified",
    "lastmodified",
    "last_modified",
    "mtime",
    "modified",
    "created",
)  # what servers say that differs once a file is replaced, the best first
STALL_S = 60.0  # a request that takes longer is given up and made again
_SLICE = 4096  # compressed bytes decompressed at once: a hostile file makes 128 MiB of them at most


class Cancelled(Exception):
    """The caller does not want the file any more."""


def exists(url: str) -> bool:
    try:
        _File(url).info()
    except FileNotFoundError:
        return False
    return True


def size(url: str) -> int:
    """Bytes of the file as it is stored. Raises ShardError if it is missing or its server does not say."""
    found = _File(url).size()
    if found is None:
        raise ShardError(f"the server of {url} does not tell its size; expected a Content-Length")
    return found


def version(url: str, cancel: threading.Event | None = None) -> str:
    """What its server says of the file that differs once it is replaced: its size, and an etag or a time."""
    file = _File(url, cancel)
    return _version(file.present())


def _version(info: dict[str, Any]) -> str:
    told = {key.lower(): value for key, value in info.items() if value}
    best = next((key for key in _TELLS if key in told), None)
    return f"{info['size']} bytes" if best is None else f"{info['size']} bytes, {best} {told[best]}"


def list_files(url: str) -> list[str]:
    """The URLs of the files that lie directly in a folder, sorted."""
    file = _File(url)
    entries = file.tried(lambda: file.wait(file.start("ls", file.path, detail=True)))
    names = [entry["name"] for entry in entries if entry["type"] == "file" and entry["name"] != file.path]
    return sorted(str(file.filesystem.unstrip_protocol(name)) for name in names)


def read_range(url: str, start: int, count: int) -> bytes:
    """Bytes [start, start + count) of the file as it is stored. Raises ShardError if it ends before."""
    file, stop = _File(url), start + count
    return file.tried(lambda: file.wait_for_part(file.start_part(start, stop), start, stop))[:count]


def open(url: str) -> BinaryIO:
    """The file as it is stored, to be read from its beginning on; the next parts are fetched while one is used."""
    return io.BufferedReader(_Stream(_File(url).parts()), 1 << 20)


class _Stream(io.RawIOBase):
    """What an iterator of bytes gives, as a file."""

    def __init__(self, parts: Generator[bytes, None, None]):
        self._parts, self._rest = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._parts.close()
        super().close()


def fetch(
    url: str,
    file: BinaryIO,
    *,
    compression: str | None = None,
    digest: str | None = None,
    bytes: int | None = None,
    stored_bytes: int | None = None,
    version: str | None = None,
    cancel: threading.Event | None = None,
) -> int:
    """Copy the whole of `url` to the start of `file`, decompressed; returns the bytes written.

    digest: "sha256:<hex>", or another algorithm of hashlib or xxhash, of the file as it is stored. bytes,
    stored_bytes: its size decompressed and as stored. version: what version() said of it. What is known of the four is
    checked; a copy that does not agree is made once more before ShardError is raised. Raises Cancelled once `cancel`
    is set.
    """
    remote = _File(url, cancel)
    if compression is None and stored_bytes is None:
        stored_bytes = bytes
    for last_attempt in (False, True):
        seen = new_hash(digest, url) if digest is not None else None
        info = remote.present()
        announced = None if info["size"] is None else int(info["size"])
        if version not in (None, _version(info)):
            raise ShardError(
                f"{url} was replaced while it was in use: it had {version}, and has {_version(info)}; restore it, or "
                "begin the run again"
            )
        if None not in (announced, stored_bytes) and announced != stored_bytes:
            raise ShardError(
                f"{url} has {announced} bytes, but {stored_bytes} were expected; it was replaced: restore it, "
                "or write the manifest again"
            )
        file.seek(0)
        try:
            pieces = decompressed(_hashed(remote.parts(announced), seen), compression, url)
            written = sum(file.write(piece) for piece in _at_most(pieces, bytes, url))
            if bytes not in (None, written):
                raise DamagedError(f"{url} gave {written} bytes, but {bytes} were expected; it was replaced or damaged")
            if seen is not None and digest is not None and seen.hexdigest() != digest.partition(":")[2].lower():
                algorithm, _, expected = digest.partition(":")
                raise DamagedError(
                    f"{url} has {algorithm} {seen.hexdigest()}, but {expected} was expected; it was replaced or damaged"
                )
            return written
        except DamagedError as error:
            if last_attempt:
                raise ShardError(f"{error}: restore it, or write the manifest again") from error
    raise AssertionError("not reached")


class DamagedError(Exception):
    """The bytes came, but they are not those that were expected."""


def new_hash(digest: str, url: str) -> Any:
    """An empty hash object of the algorithm that a digest, "algorithm:hex", names."""
    algorithm, colon, expected = digest.partition(":")
    if colon and expected and algorithm.startswith("xxh"):
        try:
            import xxhash
        except ImportError as error:
            raise ShardError(
                f"{url} has a digest of {algorithm}, which needs the package xxhash: pip install 'mixloader[remote]'"
            ) from error
        if algorithm in xxhash.algorithms_available:
            return getattr(xxhash, algorithm)()
    if colon and expected and algorithm in hashlib.algorithms_available and not algorithm.startswith("shake"):
        return hashlib.new(algorithm, usedforsecurity=False)
    raise ShardError(
        f"{url} has the digest {digest!r}; expected 'algorithm:hex' with an algorithm of hashlib or xxhash, "
        "such as 'sha256:...'"
    )


def _hashed(parts: Iterable[bytes], seen: Any | None) -> Iterator[bytes]:
    for part in parts:
        if seen is not None:
            seen.update(part)
        yield part


def _at_most(pieces: Iterable[bytes], expected: int | None, url: str) -> Iterator[bytes]:
    """Stop a file that decompresses to more than was announced before it fills the disk."""
    total = 0
    for piece in pieces:
        total += len(piece)
        if expected is not None and total > expected:
            raise DamagedError(
                f"{url} gave more than the {expected} bytes that were expected; it was replaced or damaged"
            )
        yield piece


def decompressed(parts: Iterable[bytes], compression: str | None, url: str) -> Iterator[bytes]:
    """The content of a stored file that comes in `parts`; a file of several frames or members is read to its end."""
    if compression is None:
        yield from parts
        return
    new, errors = _decompressor(compression, url)
    current, ended = None, True
    for part in parts:
        for start in range(0, len(part), _SLICE):
            data = part[start : start + _SLICE]
            while data:
                if (
                    current is not None and ended and not data.strip(b"\0")
                ):  # padding behind the last frame, as tar and tape tools leave it
                    break
                current = new() if ended or current is None else current
                try:
                    piece = current.decompress(data)
                except errors as error:
                    raise DamagedError(f"{url} is no {compression} file: {error}; it is damaged") from error
                ended, data = current.eof, current.unused_data
                if piece:
                    yield piece
    if current is None or not ended:
        raise DamagedError(f"{url} ends in the middle of its {compression} data; it was truncated")


def _decompressor(compression: str, url: str) -> tuple[Callable[[], Any], type[Exception]]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if compression != "zstd":
        raise ShardError(f"{url} has the unknown compression {compression!r}; known are {', '.join(COMPRESSIONS)}")
    try:
        import zstandard
    except ImportError as error:
        raise ShardError(
            f"{url} is compressed with zstd, which needs the package zstandard: pip install 'mixloader[remote]'"
        ) from error
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


class _File:
    """A file of a filesystem of fsspec: starts requests, waits for them, and tries them again.

    The filesystems that matter most (s3, gs, az, http) are asynchronous: their requests run in fsspec's own thread,
    several at once, and can be given up. Those of the others (sftp, file, memory) are made where they are started.
    """

    def __init__(self, url: str, cancel: threading.Event | None = None):
        self.url, self.cancel = url, cancel or threading.Event()
        try:
            self.filesystem, self.path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ShardError(
                f"cannot open {url}: {error}; pip install 'mixloader[remote]', or the fsspec package of this protocol"
            ) from error

    def start(self, method: str, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        if self.filesystem.async_impl:
            request = getattr(self.filesystem, f"_{method}")(*arguments, **options)
            return asyncio.run_coroutine_threadsafe(request, self.filesystem.loop)
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            result.set_result(getattr(self.filesystem, method)(*arguments, **options))
        except Exception as error:
            result.set_exception(error)
        return result

    def start_part(self, start: int, stop: int | None) -> concurrent.futures.Future[bytes]:
        ends = {} if stop is None else {"start": start, "end": stop}
        return self.start("cat_file", self.path, **ends)

    def wait(self, request: concurrent.futures.Future[Any]) -> Any:
        """The result of a request. Raises Cancelled, or TimeoutError once it has stalled, and gives it up."""
        given_up = time.monotonic() + STALL_S
        try:
            while not concurrent.futures.wait([request], timeout=0.1).done:
                if self.cancel.is_set():
                    raise Cancelled(self.url)
                if time.monotonic() > given_up:
                    raise TimeoutError(f"no answer within {STALL_S:.0f} s")
            return request.result()
        finally:
            request.cancel()

    def wait_for_part(self, request: concurrent.futures.Future[bytes], start: int, stop: int | None) -> bytes:
        data = self.wait(request)
        if stop is None or len(data) == stop - start:
            return data
        if start == 0 and len(data) > stop:  # a server without ranges sends all of it
            return data
        if len(data) > stop - start:
            data = data[start:stop]
        if len(data) != stop - start:
            raise EOFError(f"got {len(data)} of the {stop - start} bytes from byte {start} on")
        return data

    def info(self) -> dict[str, Any]:
        """What its server says of it. Raises FileNotFoundError if it is not there, else ShardError."""
        self.filesystem.invalidate_cache()
        return self.tried(lambda: self.wait(self.start("info", self.path)), missing_is_error=False)

    def present(self) -> dict[str, Any]:
        """What its server says of a file that has to be there."""
        try:
            info = self.info()
        except FileNotFoundError as error:
            raise _failure(self.url, error, 1) from error
        if info["type"] != "file":
            raise ShardError(f"{self.url} is a folder; expected a file")
        return info

    def size(self) -> int | None:
        size = self.present()["size"]
        return None if size is None else int(size)

    def tried(self, attempt: Callable[[], Any], *, missing_is_error: bool = True) -> Any:
        """The result of `attempt`, made again as long as its failure may pass."""
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except (Cancelled, ShardError):
                raise
            except Exception as error:
                final = _is_final(error)
                if final and isinstance(error, FileNotFoundError) and not missing_is_error:
                    raise
                if final or number == ATTEMPTS:
                    raise _failure(self.url, error, number) from error
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1)) * random.uniform(0.5, 1)
            if self.cancel.wait(pause):
                raise Cancelled(self.url)
        raise AssertionError("not reached")

    def parts(
        self, total: int | None = None, *, part: int | None = None, ahead: int = PARTS_AHEAD
    ) -> Generator[bytes, None, None]:
        """The file as it is stored, in order; the next parts are under way while one is used."""
        part = part or PART
        total = self.size() if total is None else total
        if total == 0:
            return
        ends = [(0, None)] if total is None else [(start, min(start + part, total)) for start in range(0, total, part)]
        first = self.tried(lambda: self.wait_for_part(self.start_part(*ends[0]), *ends[0]))
        yield first
        if total is None or len(first) == total:
            return
        if len(first) != ends[0][1]:
            raise ShardError(f"{self.url} gave {len(first)} bytes, but its server announced {total}; it was replaced")
        ahead = ahead if self.filesystem.async_impl else 1
        under_way: deque[tuple[int, int, concurrent.futures.Future[bytes]]] = deque()
        waiting = deque((start, stop) for start, stop in ends[1:] if stop is not None)
        try:
            while waiting or under_way:
                while waiting and len(under_way) < ahead:
                    start, stop = waiting.popleft()
                    under_way.append((start, stop, self.start_part(start, stop)))
                start, stop, request = under_way[0]
                yield self.tried(self._attempts(start, stop, request))
                under_way.popleft()
        finally:
            for _, _, request in under_way:
                request.cancel()

    def _attempts(self, start: int, stop: int, request: concurrent.futures.Future[bytes]) -> Callable[[], bytes]:
        """Waits for a request under way when first called, for a new one each time after."""
        requests = chain([request], iter(lambda: self.start_part(start, stop), None))
        return lambda: self.wait_for_part(next(requests), start, stop)


def _is_final(error: Exception) -> bool:
    """Whether to try again is no use."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        error = cause if isinstance(cause, Exception) else error  # fsspec says "not found" of any failure over HTTP
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return 400 <= status < 500 and status not in (408, 429)
    final = (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
        ImportError,
        NotImplementedError,
    )
    return isinstance(error, final)


def _failure(url: str, error: Exception, attempts: int) -> ShardError:
    if isinstance(error, FileNotFoundError) and _is_final(error):
        return ShardError(f"{url} does not exist; check the path, or upload it again")
    if isinstance(error, PermissionError):
        return ShardError(f"access to {url} was refused ({error}); check the credentials that fsspec finds")
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what fsspec called "not found": a refused connection, for instance
    tries = "" if attempts == 1 else f", {attempts} times in a row"
    what = str(error) or type(error).__name__
    return ShardError(f"cannot read {url}: {what}{tries}; check the network and the server")
