"""Writing files so that a process killed anywhere leaves the old content or the new one (guarantee G6)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixloader.errors import StateError


def replace(path: Path, content: bytes | str) -> None:
    """Write a file whole: under another name, synced to disk, then renamed. Text is UTF-8."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sole_user(out: Path, what: str) -> Iterator[None]:
    """Make `out` and hold it for this process; raises StateError if another `what` does. The kernel lets go of it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(f"another {what} works in {out}; wait for it, or choose another --out") from error
        yield


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where what can be made again is kept: `folder` if given, else $MIXLOADER_CACHE, else ~/.cache/mixloader."""
    return Path(folder or os.environ.get("MIXLOADER_CACHE") or "~/.cache/mixloader").expanduser()
