"""The manifest: which shards make up which domain, and what is known of each domain.

A JSON file beside the shards (`manifest.json`), or a folder, or a mapping from name to path: all
three become a Manifest. Shards stay where they are, in formats that other programs read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.errors import ManifestError, ShardError
from mixloader.files import replace
from mixloader.formats import Shard, open_shard
from mixloader.mixture import Weights, as_weights
from mixloader.observation import DomainTable

VERSION = 1
FIELDS = ("source", "target", None)
_SUFFIX = ".bin"


@dataclass(frozen=True)
class Domain:
    """A named part of the data.

    shards: read in training. validation: held out, never read in training.
    field: "source" (to be kept), "target" (to be learned) or None. group: a label of the user's.
    bytes_per_token: mean bytes of text a token, for losses in bits per byte.
    """

    name: str
    shards: tuple[Shard, ...]
    validation: tuple[Shard, ...] = ()
    field: str | None = None
    group: str | None = None
    bytes_per_token: float | None = None

    @property
    def tokens(self) -> int:
        """Distinct training tokens."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """The domains of a data set, in a fixed order.

    vocab_size: ids are below it; None leaves them unchecked. eot: id of the end-of-text token.
    tokenizer: {"fingerprint": sha256 of the tokenizer's file, "path": relative to the manifest} or None.
    """

    domains: tuple[Domain, ...]
    vocab_size: int | None = None
    eot: int | None = None
    tokenizer: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.domains:
            raise ManifestError("a manifest needs at least one domain; this one has none")
        for name in self.names:
            if self.names.count(name) > 1:
                raise ManifestError(f"two domains have the name {name!r}; names must differ")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    def domain(self, name: str) -> Domain:
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise ManifestError(f"unknown domain {name!r}; the domains are {', '.join(self.names)}")

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that the token stream depends on; folders may move, data may not change."""
        data = [
            [
                domain.name,
                [[os.path.basename(s.path), s.format, s.dtype, s.tokens, s.bytes, s.sha256] for s in domain.shards],
            ]
            for domain in self.domains
        ]
        return hashlib.sha256(json.dumps([VERSION, self.vocab_size, data]).encode()).hexdigest()[:32]

    def table(self, weights: Weights | None = None) -> DomainTable:
        """The table that a policy is reset with. weights: those of step 0, by default each domain's share of tokens."""
        tokens = np.array([domain.tokens for domain in self.domains], dtype=np.int64)
        prior = as_weights(tokens if weights is None else weights, self.names)
        return DomainTable(
            names=self.names,
            fields=tuple(domain.field for domain in self.domains),
            groups=tuple(domain.group for domain in self.domains),
            tokens=tokens,
            prior=prior / prior.sum(),
        )

    @classmethod
    def open(cls, data: Manifest | str | Path | Mapping[str, Any], *, roots: Iterable[str | Path] = ()) -> Manifest:
        """A Manifest from any of: a Manifest, a manifest's path, a folder, a mapping from name to data.

        Folder: its manifest.json if it has one; else its subfolders of .bin files are the domains; else,
        with a train*.bin, it is one domain; else each .bin file is one. Names with "val" are held out.
        Mapping: name -> path, list of paths (files or folders), or {"path": ..., "field": ..., "group":
        ..., "dtype": ..., "format": ...}.
        """
        if isinstance(data, Manifest):
            return data
        if isinstance(data, Mapping):
            return cls(tuple(_domain_from_value(str(name), value) for name, value in data.items()))
        path = Path(data)
        if path.is_dir():
            path = path / "manifest.json"
            return cls.load(path, roots=roots) if path.exists() else cls(_domains_in_folder(path.parent))
        if not path.exists():
            raise ManifestError(f"{path} does not exist; expected a manifest, or a folder of token shards")
        return cls.load(path, roots=roots)

    @classmethod
    def load(cls, path: str | Path, *, roots: Iterable[str | Path] = ()) -> Manifest:
        """Read a manifest; every shard must lie in its folder or in one of `roots`, and match its entry."""
        path = Path(path)
        try:
            reader = _Reader(path, json.loads(path.read_bytes(), parse_constant=_refuse_constant), roots)
        except (OSError, ValueError) as error:
            raise ManifestError(f"cannot read manifest {path}: {error}") from error
        return reader.manifest()

    def save(self, path: str | Path) -> None:
        """Write the manifest atomically; shards are named relative to its folder."""
        path = Path(path).absolute()

        def entry(shard: Shard) -> dict[str, Any]:
            return {
                "path": os.path.relpath(shard.path, path.parent),
                "format": shard.format,
                "dtype": shard.dtype,
                "tokens": shard.tokens,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }

        content = {
            "version": VERSION,
            "vocab_size": self.vocab_size,
            "eot": self.eot,
            "tokenizer": self.tokenizer,
            "domains": [
                {
                    "name": domain.name,
                    "field": domain.field,
                    "group": domain.group,
                    "bytes_per_token": domain.bytes_per_token,
                    "shards": [entry(shard) for shard in domain.shards],
                    "validation": [entry(shard) for shard in domain.validation],
                }
                for domain in self.domains
            ],
        }
        replace(path, json.dumps(content, indent=1) + "\n")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Reader:
    """Turns the JSON of a manifest into a Manifest, checking every value on the way."""

    def __init__(self, path: Path, content: Any, roots: Iterable[str | Path]):
        self.path, self.content = path, content
        self.roots = [path.parent.resolve(), *(Path(root).resolve() for root in roots)]

    def manifest(self) -> Manifest:
        version = self.take(self.content, "version", int, "")
        if version != VERSION:
            raise ManifestError(
                f"manifest {self.path} has version {version}; this mixloader reads version {VERSION}, upgrade it"
            )
        return Manifest(
            domains=tuple(
                self.domain(entry, f"domains[{i}]")
                for i, entry in enumerate(self.take(self.content, "domains", list, ""))
            ),
            vocab_size=self.take(self.content, "vocab_size", int, "", optional=True),
            eot=self.take(self.content, "eot", int, "", optional=True),
            tokenizer=self.take(self.content, "tokenizer", dict, "", optional=True),
        )

    def domain(self, entry: Any, where: str) -> Domain:
        def shards(key: str) -> tuple[Shard, ...]:
            entries = self.take(entry, key, list, where, optional=True) or []
            return tuple(self.shard(e, f"{where}.{key}[{i}]") for i, e in enumerate(entries))

        bytes_per_token = self.take(entry, "bytes_per_token", (int, float), where, optional=True)
        return _checked_domain(
            Domain(
                name=self.take(entry, "name", str, where),
                shards=shards("shards"),
                validation=shards("validation"),
                field=self.take(entry, "field", str, where, optional=True),
                group=self.take(entry, "group", str, where, optional=True),
                bytes_per_token=None if bytes_per_token is None else float(bytes_per_token),
            )
        )

    def shard(self, entry: Any, where: str) -> Shard:
        path = self.shard_path(self.take(entry, "path", str, where), where)
        found = open_shard(
            path, format=self.take(entry, "format", str, where), dtype=self.take(entry, "dtype", str, where)
        )
        for key, actual in (("tokens", found.tokens), ("bytes", found.bytes)):
            expected = self.take(entry, key, int, where)
            if actual != expected:
                raise ShardError(
                    f"shard {path} has {actual} {key}, but manifest {self.path} says {expected}; "
                    "the shard was truncated or replaced: restore it, or write the manifest again"
                )
        sha256 = self.take(entry, "sha256", str, where, optional=True)
        return Shard(found.path, found.format, found.dtype, found.offset, found.tokens, found.bytes, sha256)

    def shard_path(self, name: str, where: str) -> Path:
        if "\0" in name:
            raise ManifestError(f"{where}.path in manifest {self.path} holds a NUL byte")
        path = self.roots[0] / name
        if not any(path.resolve().is_relative_to(root) for root in self.roots):
            raise ManifestError(
                f"{where}.path in manifest {self.path} is {name!r}, which lies outside the manifest's folder; "
                "pass its folder in roots= to allow it"
            )
        return path

    def take(self, entry: Any, key: str, kind: Any, where: str, *, optional: bool = False) -> Any:
        place = f"{where}.{key}".lstrip(".")
        if not isinstance(entry, dict):
            raise ManifestError(f"{where or 'the top level'} of manifest {self.path} is no JSON object")
        value = entry.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ManifestError(f"{place} in manifest {self.path} is {value!r}; expected {_kind_name(kind)}")
        return value


def _kind_name(kind: Any) -> str:
    names = {int: "an integer", str: "a string", list: "a list", dict: "an object"}
    return names.get(kind, "a number")


def _checked_domain(domain: Domain) -> Domain:
    if domain.field not in FIELDS:
        raise ManifestError(f"domain {domain.name!r} has field {domain.field!r}; expected 'source', 'target' or none")
    if not domain.shards:
        raise ManifestError(f"domain {domain.name!r} has no training shards")
    return domain


def _is_validation(path: Path) -> bool:
    return "val" in path.stem.lower().replace("-", "_").split("_") or path.stem.lower().startswith("val")


def _bin_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX and not path.is_dir())


def _domain_from_files(name: str, files: Iterable[Path], options: Mapping[str, Any]) -> Domain:
    how = {"format": options.get("format"), "dtype": options.get("dtype")}
    train: list[Shard] = []
    validation: list[Shard] = []
    for file in files:
        (validation if _is_validation(file) else train).append(open_shard(file, **how))
    return _checked_domain(Domain(name, tuple(train), tuple(validation), options.get("field"), options.get("group")))


def _domain_from_value(name: str, value: Any) -> Domain:
    options = dict(value) if isinstance(value, Mapping) else {"path": value}
    unknown = sorted(set(options) - {"path", "field", "group", "dtype", "format"})
    if unknown or "path" not in options:
        found = f"has an unknown key {unknown[0]!r}" if unknown else "has no 'path'"
        raise ManifestError(f"domain {name!r} {found}; known keys are path, field, group, dtype, format")
    paths = [options["path"]] if isinstance(options["path"], (str, os.PathLike)) else list(options["path"])
    files: list[Path] = []
    for path in map(Path, paths):
        found_files = _bin_files(path) if path.is_dir() else [path]
        if not found_files:
            raise ManifestError(f"folder {path} of domain {name!r} holds no {_SUFFIX} files")
        files += found_files
    return _domain_from_files(name, files, options)


def _domains_in_folder(folder: Path) -> tuple[Domain, ...]:
    subfolders = [path for path in sorted(folder.iterdir()) if path.is_dir() and _bin_files(path)]
    if subfolders:
        return tuple(_domain_from_files(path.name, _bin_files(path), {}) for path in subfolders)
    files = _bin_files(folder)
    if not files:
        raise ManifestError(f"folder {folder} holds neither a manifest.json nor {_SUFFIX} shards; expected either")
    if any(file.stem.startswith("train") for file in files):
        return (_domain_from_files(folder.resolve().name, files, {}),)
    return tuple(_domain_from_files(file.stem, [file], {}) for file in files if not _is_validation(file))
