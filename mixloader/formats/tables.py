"""Tables of documents that no file holds in a form that the core reads: written into the cache folder."""

from __future__ import annotations

import hashlib
import os
import re

import numpy as np

from mixloader.errors import ShardError
from mixloader.files import cache_folder, replace
from mixloader.formats.base import Documents

TABLES = re.compile(r"\.tables-[0-9a-f]{16}\.npy$")
"""In the name of the file beside a manifest with what no other file holds."""
_KEPT = re.compile(r"/tables/[0-9a-f]{32}\.u64$")


def is_kept(path: str) -> bool:
    """Whether a table is in no file of the data set, but in a cache folder or beside a manifest."""
    return _KEPT.search(path) is not None or TABLES.search(path) is not None


def keep_table(starts: np.ndarray) -> Documents:
    """A table of the tokens at which documents begin, ascending [N], in a file named after its content."""
    content = np.ascontiguousarray(starts, dtype="<u8").tobytes()
    path = cache_folder() / "tables" / f"{hashlib.sha256(content).hexdigest()[:32]}.u64"
    if not os.path.exists(path) or path.stat().st_size != len(content):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, content)
        except OSError as error:
            raise ShardError(
                f"cannot keep a table of documents in {path.parent}: {error}; let MIXLOADER_CACHE name a "
                "folder that can be written to"
            ) from error
    return Documents(str(path), 0, len(starts))


def read_table(documents: Documents, content: bytes) -> np.ndarray:
    """uint64 [N]: the tokens that a table's bytes stand for."""
    numbers = np.frombuffer(content, dtype=f"<u{documents.width}", count=documents.count).astype(np.uint64)
    return (numbers - np.uint64(documents.bias)) // np.uint64(documents.unit)
