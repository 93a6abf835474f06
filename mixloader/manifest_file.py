"""manifest.json: written whole, and read fast, with every value checked.

Version 2 says all that the core needs of a shard, so that opening ten thousand of them reads no shard. In
version 1 (mixloader 0.1) an entry names a format, and the shard's own header is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from mixloader.domains import Domain, checked_domain
from mixloader.errors import ManifestError, ShardError
from mixloader.files import replace
from mixloader.formats import FORMATS, WIDTHS, Documents, Extents, Shard, open_shard
from mixloader.formats.source import COMPRESSIONS, Source, is_url
from mixloader.formats.tables import is_kept, read_table

VERSION = 2
_PLAIN = ("path", "format", "dtype", "offset", "tokens", "bytes", "digest")  # what an entry says of every shard
_PLAIN_TYPES = ((str, str, str, int, int, int, str), (str, str, str, int, int, int, type(None)))


def write_manifest(
    path: Path, domains: Iterable[Domain], vocab_size: int | None, eot: int | None, tokenizer: dict[str, Any] | None
) -> None:
    """Write the manifest at an absolute path, and before it the tables that it refers to.

    Raises ManifestError if it cannot be written.
    """
    tables = _Tables()
    content = {
        "version": VERSION,
        "vocab_size": vocab_size,
        "eot": eot,
        "tokenizer": tokenizer,
        "domains": [
            {
                "name": domain.name,
                "field": domain.field,
                "group": domain.group,
                "bytes_per_token": domain.bytes_per_token,
                "shards": [_entry(shard, path.parent, tables) for shard in domain.shards],
                "validation": [_entry(shard, path.parent, tables) for shard in domain.validation],
            }
            for domain in domains
        ],
    }
    try:
        if tables.count:
            content["tables"] = tables.write(path)
        replace(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ManifestError(f"cannot write manifest {path}: {error}; give another place for it") from error


class _Tables:
    """Numbers that go into one array beside a manifest: uint64, one table after another."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.count = 0

    def add(self, *arrays: np.ndarray) -> int:
        """The place of the first of some arrays that are to follow each other."""
        first = self.count
        self.parts += arrays
        self.count += sum(map(len, arrays))
        return first

    def write(self, manifest: Path) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(self.parts).astype("<u8"))
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        name = f"{manifest.stem}.tables-{digest[:16]}.npy"
        replace(manifest.with_name(name), buffer.getvalue())
        return {"path": name, "count": self.count, "sha256": digest}


def _entry(shard: Shard, folder: Path, tables: _Tables) -> dict[str, Any]:
    def relative(path: str) -> str:
        if is_url(path):
            return path
        name = os.path.relpath(path, folder)
        if not name.startswith("../"):
            return name
        parent, name = os.path.split(path)  # the way up leads through no links
        return os.path.relpath(os.path.join(os.path.realpath(parent), name), os.path.realpath(folder))

    entry: dict[str, Any] = {
        "path": relative(shard.path),
        "format": shard.format,
        "dtype": shard.dtype,
        "offset": shard.offset,
        "tokens": shard.tokens,
        "bytes": shard.bytes,
        "digest": shard.digest,
    }
    if shard.compression is not None:
        entry |= {"compression": shard.compression, "stored_bytes": shard.stored_bytes}
    if shard.extents is not None and shard.extents.ends is not None:
        assert shard.extents.bytes is not None
        first = tables.add(shard.extents.ends, shard.extents.bytes)
        entry["extents"] = {"first": first, "count": len(shard.extents.ends)}
    elif shard.extents is not None:
        entry["extents"] = {"tokens": shard.extents.tokens, "stride": shard.extents.stride}
    if shard.documents is not None:
        documents = shard.documents
        if is_kept(documents.path):
            content = Source(documents.path, None).read(documents.offset, documents.count * documents.width)
            entry["documents"] = {"first": tables.add(read_table(documents, content)), "count": documents.count}
        else:
            known = {key: value for key, value in vars(documents).items() if value is not None}
            entry["documents"] = {**known, "path": relative(documents.path)}
    if shard.extents_are_documents:
        entry["extents_are_documents"] = True
    if shard.document_count is not None:
        entry["document_count"] = shard.document_count
    if shard.checksums is not None:
        entry["checksums"] = relative(shard.checksums)
    return entry


Bad = list[tuple[str, str]]
"""What is wrong with files: the path of one, and a sentence."""


def read_manifest(path: Path, roots: Iterable[str | Path], bad: Bad | None = None) -> dict[str, Any]:
    """The arguments of a Manifest. bad: if given, takes what is wrong with files, which is then not raised."""
    try:
        _refuse_pipe(path)
        reader = Reader(path, json.loads(path.read_bytes(), parse_constant=_refuse_constant), roots, bad)
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"cannot read manifest {path}: {error}") from error
    return reader.manifest()


def _refuse_pipe(path: str | Path) -> None:
    """Opening a pipe would wait for its other end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Reader:
    """Turns the JSON of a manifest into what a Manifest is made of, checking every value on the way."""

    def __init__(self, path: Path, content: Any, roots: Iterable[str | Path], bad: Bad | None):
        self.path, self.content, self.bad = path, content, bad
        given = [str(root) for root in roots]
        self.folder = os.path.realpath(path.parent)
        self.roots = [self.folder, *(os.path.realpath(root) for root in given if not is_url(root))]
        self.urls = [root.rstrip("/") + "/" for root in given if is_url(root)]
        self.plain = {self.folder}  # folders in which nothing leads elsewhere
        self.tables: np.ndarray | None = None
        self.found: tuple[str, Any] = "", None  # the path that was looked at last, and its status

    def manifest(self) -> dict[str, Any]:
        version = self.take(self.content, "version", int, "")
        if version not in (1, VERSION):
            raise ManifestError(
                f"manifest {self.path} has version {version}; this mixloader reads versions 1 to {VERSION}, upgrade it"
            )
        self.tables = self.open_tables(self.take(self.content, "tables", dict, "", optional=True))
        return {
            "domains": tuple(
                self.domain(entry, f"domains[{i}]")
                for i, entry in enumerate(self.take(self.content, "domains", list, ""))
            ),
            "vocab_size": self.take(self.content, "vocab_size", int, "", optional=True),
            "eot": self.take(self.content, "eot", int, "", optional=True),
            "tokenizer": self.take(self.content, "tokenizer", dict, "", optional=True),
        }

    def domain(self, entry: Any, where: str) -> Domain:
        def shards(key: str) -> tuple[Shard, ...]:
            entries = self.take(entry, key, list, where, optional=True) or []
            return tuple(self.shard(e, (where, key, i)) for i, e in enumerate(entries))

        name = self.take(entry, "name", str, where)
        self.refuse_half_pairs(name, f"{where}.name")
        bytes_per_token = self.take(entry, "bytes_per_token", (int, float), where, optional=True)
        return checked_domain(
            Domain(
                name=name,
                shards=shards("shards"),
                validation=shards("validation"),
                field=self.take(entry, "field", str, where, optional=True),
                group=self.take(entry, "group", str, where, optional=True),
                bytes_per_token=None if bytes_per_token is None else float(bytes_per_token),
            )
        )

    def shard(self, entry: Any, where: Any) -> Shard:
        # Nearly all of ten thousand shards are as plain as _entry writes them; value by value takes thrice as long.
        if type(entry) is dict and (*entry,) == _PLAIN and (*map(type, entry.values()),) in _PLAIN_TYPES:
            name, format, dtype, offset, tokens, size, digest = entry.values()
            rest: dict[str, Any] = {}
        else:
            name, format, dtype = (self.take(entry, key, str, where) for key in ("path", "format", "dtype"))
            tokens, size = (self.take(entry, key, int, where) for key in ("tokens", "bytes"))
            offset = self.take(entry, "offset", int, where, optional=True)
            digest = self.take(entry, "digest", str, where, optional=True)
            rest = self.details(entry, where)
        path = self.place(name, where)
        if dtype not in WIDTHS or format not in FORMATS:
            what, known = ("token dtype", WIDTHS) if dtype not in WIDTHS else ("shard format", FORMATS)
            raise ManifestError(
                f"unknown {what} {format if known is FORMATS else dtype!r} in manifest {self.path}; "
                f"known are {', '.join(known)}"
            )
        if offset is None:
            return self.by_format(entry, where, path, format, dtype)
        shard = Shard(path, format, dtype, offset, tokens, size, digest, **rest)
        if tokens <= 0 or offset < 0 or _end(shard) > size:
            raise ManifestError(
                f"{_place(where)} in manifest {self.path} has {tokens} {dtype} tokens from byte {offset} on, "
                f"but {size} bytes; the manifest is damaged, write it again"
            )
        if "://" not in path:
            self.check(path, size if shard.stored_bytes is None else shard.stored_bytes)
        return shard

    def details(self, entry: dict[str, Any], where: Any) -> dict[str, Any]:
        """What only some shards have."""
        compression = self.take(entry, "compression", str, where, optional=True)
        if compression not in (None, *COMPRESSIONS.values()):
            raise ManifestError(
                f"{_place(where)}.compression in manifest {self.path} is {compression!r}; "
                f"expected {' or '.join(COMPRESSIONS.values())}"
            )
        checksums = self.take(entry, "checksums", str, where, optional=True)
        return {
            "compression": compression,
            "stored_bytes": self.take(entry, "stored_bytes", int, where, optional=compression is None),
            "extents": self.extents(self.take(entry, "extents", dict, where, optional=True), where),
            "documents": self.documents(self.take(entry, "documents", dict, where, optional=True), where),
            "document_count": self.take(entry, "document_count", int, where, optional=True),
            "extents_are_documents": entry.get("extents_are_documents") is True,
            "checksums": None if checksums is None else self.place(checksums, where),
        }

    def by_format(self, entry: Any, where: Any, path: str, format: str, dtype: str) -> Shard:
        """A shard whose entry does not say where its tokens begin."""
        tokens, size = (self.take(entry, key, int, where) for key in ("tokens", "bytes"))
        digest = self.take(entry, "sha256", str, where, optional=True)
        digest = None if digest is None else f"sha256:{digest}"
        try:
            found = open_shard(path, format=format, dtype=dtype)
        except ShardError as error:
            self.report(path, str(error))
            return Shard(path, format, dtype, 0, tokens, size, digest)
        for key, actual, expected in (("tokens", found.tokens, tokens), ("bytes", found.bytes, size)):
            if actual != expected:
                self.report(
                    path,
                    f"shard {path} has {actual} {key}, but manifest {self.path} says {expected}; "
                    "the shard was truncated or replaced: restore it, or write the manifest again",
                )
        return dataclasses.replace(found, digest=digest)

    def extents(self, entry: dict[str, Any] | None, where: Any) -> Extents | None:
        if entry is None:
            return None
        if "first" not in entry:
            tokens, stride = (self.take(entry, key, int, where) for key in ("tokens", "stride"))
            if not tokens or not stride:
                raise ManifestError(f"{_place(where)}.extents in manifest {self.path} are empty; expected tokens")
            return Extents(tokens, stride)
        first, count = (self.take(entry, key, int, where) for key in ("first", "count"))
        both = self.table(first, 2 * count, where)
        return Extents(ends=both[:count], bytes=both[count:])

    def documents(self, entry: dict[str, Any] | None, where: Any) -> Documents | None:
        if entry is None:
            return None
        if "first" in entry:
            first, count = (self.take(entry, key, int, where) for key in ("first", "count"))
            table = self.table(first, count, where)
            assert isinstance(table, np.memmap)
            # A slice of a memmap says the offset of the whole.
            return Documents(str(table.filename), int(table.offset) + 8 * first, count)
        numbers = {key: self.take(entry, key, int, where) for key in ("offset", "count", "width", "bias", "unit")}
        digest = self.take(entry, "digest", str, where, optional=True)
        path = self.place(self.take(entry, "path", str, where), where)
        if numbers["width"] not in (4, 8) or not numbers["unit"] or max(numbers["unit"], numbers["bias"]) >= 1 << 63:
            raise ManifestError(f"{_place(where)}.documents in manifest {self.path} is {entry}; it is damaged")
        self.check(path, numbers["offset"] + numbers["count"] * numbers["width"], at_least=True)
        return Documents(path, **numbers, digest=digest)

    def open_tables(self, entry: dict[str, Any] | None) -> np.ndarray | None:
        if entry is None:
            return None
        path = self.place(self.take(entry, "path", str, "tables"), "tables")
        count = self.take(entry, "count", int, "tables")
        digest = self.take(entry, "sha256", str, "tables", optional=True)
        try:
            _refuse_pipe(path)
            if self.bad is not None and digest is not None:
                content = hashlib.sha256()
                for block in Source(path, None).blocks(stored=True):
                    content.update(block)
                found = content.hexdigest()
                if found != digest:
                    self.report(path, f"{path} has sha256 {found}, but manifest {self.path} says {digest}; restore it")
            tables = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ManifestError(f"cannot read {path}, which manifest {self.path} refers to: {error}") from error
        if tables.dtype != np.dtype("<u8") or tables.shape != (count,):
            raise ManifestError(
                f"{path} has {tables.shape} {tables.dtype}; manifest {self.path} says ({count},) uint64"
            )
        return tables

    def table(self, first: int, count: int, where: Any) -> np.ndarray:
        if self.tables is None or first + count > len(self.tables):
            raise ManifestError(f"{_place(where)} in manifest {self.path} refers to a table that is not there")
        return self.tables[first : first + count]

    # Files

    def place(self, name: str, where: Any) -> str:
        """The path that a name stands for, if it leads into an allowed root."""
        if "\0" in name:
            raise ManifestError(f"{_place(where)}.path in manifest {self.path} holds a NUL byte")
        if not name.isascii():
            self.refuse_half_pairs(name, f"{_place(where)}.path")
        if is_url(name):
            if any(name.startswith(root) for root in self.urls) and ".." not in name.split("/"):
                return name
            raise ManifestError(
                f"{_place(where)}.path in manifest {self.path} is {name!r}, which lies outside the manifest's folder; "
                "pass the beginning of its URL in roots= to allow it"
            )
        path = name if name.startswith("/") else f"{self.folder}/{name}"
        if not self.is_within(path):
            real = os.path.realpath(path)
            if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in self.roots):
                raise ManifestError(
                    f"{_place(where)}.path in manifest {self.path} is {name!r}, which lies outside the manifest's "
                    "folder; pass its folder in roots= to allow it"
                )
        return path

    def is_within(self, path: str) -> bool:
        """Whether a path lies in the manifest's folder without a link on the way. One system call, folders aside."""
        try:
            status = os.lstat(path)
            folder = path[: path.rindex("/")]
            plain = not stat.S_ISLNK(status.st_mode) and (folder in self.plain or self.is_plain(folder))
        except OSError:
            return False  # then resolving it finds out where it would lie
        if plain:
            self.found = path, status
        return plain

    def is_plain(self, folder: str) -> bool:
        if folder in self.plain:
            return True
        parent, name = os.path.split(folder)
        if name in ("", ".", "..") or not stat.S_ISDIR(os.lstat(folder).st_mode) or not self.is_plain(parent):
            return False
        self.plain.add(folder)
        return True

    def check(self, path: str, expected: int, *, at_least: bool = False) -> None:
        """Refuse a file that is not there, is no file, or is of another size."""
        try:
            status = self.found[1] if self.found[0] == path else os.stat(path)
        except FileNotFoundError:
            return self.report(path, f"shard {path} does not exist; check the path or restore the file")
        except OSError as error:
            return self.report(path, f"cannot open shard {path}: {error}")
        if not stat.S_ISREG(status.st_mode):
            return self.report(path, f"shard {path} is not a regular file")
        if status.st_size < expected or (status.st_size > expected and not at_least):
            return self.report(
                path,
                f"shard {path} has {status.st_size} bytes, but manifest {self.path} says {expected}; "
                "the shard was truncated or replaced: restore it, or write the manifest again",
            )
        return None

    def report(self, path: str, message: str) -> None:
        if self.bad is None:
            raise ShardError(message)
        self.bad.append((path, message))

    def refuse_half_pairs(self, text: str, where: str) -> None:
        """Refuse what neither a file can be called nor a terminal can show."""
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise ManifestError(
                f"{where} in manifest {self.path} is {text!a}, which holds half a surrogate pair"
            ) from None

    def take(self, entry: Any, key: str, kind: Any, where: Any, *, optional: bool = False) -> Any:
        if not isinstance(entry, dict):
            raise ManifestError(f"{_place(where) or 'the top level'} of manifest {self.path} is no JSON object")
        value = entry.get(key)
        if type(value) is kind or (type(kind) is tuple and type(value) in kind):
            if kind is not int or cast(int, value) >= 0:
                return value
        elif value is None and optional:
            return None
        place = f"{_place(where)}.{key}".lstrip(".")
        raise ManifestError(f"{place} in manifest {self.path} is {value!r}; expected {_kind_name(kind)}")


def _end(shard: Shard) -> int:
    """The byte after the last token, as far as it takes no table to tell."""
    extents = shard.extents
    if extents is None:
        return shard.offset + shard.tokens * shard.width
    if extents.ends is not None:
        return 0
    full = (shard.tokens - 1) // extents.tokens
    return shard.offset + full * extents.stride + (shard.tokens - full * extents.tokens) * shard.width


def _place(where: Any) -> str:
    """Where in the JSON an entry stands; put together only when it is needed."""
    return where if isinstance(where, str) else f"{where[0]}.{where[1]}[{where[2]}]"


def _kind_name(kind: Any) -> str:
    names = {int: "an integer", str: "a string", list: "a list", dict: "an object"}
    return names.get(kind, "a number")
