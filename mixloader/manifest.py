"""The manifest: which shards make up which domain, and what is known of each domain.

A JSON file beside the shards (`manifest.json`), or a folder, or a mapping from name to path: all
three become a Manifest. Shards stay where they are, in formats that other programs read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.domains import Domain, checked_domain, domain_from_value, domains_in_folder
from mixloader.errors import ManifestError
from mixloader.formats import Shard
from mixloader.formats.opening import holds_tokens
from mixloader.formats.source import folder_of, is_url, name_of
from mixloader.manifest_file import read_manifest, write_manifest
from mixloader.mixture import Weights, as_weights
from mixloader.observation import DomainTable

__all__ = ["Domain", "Manifest"]

_FINGERPRINT_VERSION = 1


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
        check_ids(self.vocab_size, self.eot)
        name, count = Counter(self.names).most_common(1)[0]
        if count > 1:
            raise ManifestError(f"two domains have the name {name!r}; names must differ")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    def domain(self, name: str) -> Domain:
        try:
            return self.domains[self._positions[name]]
        except KeyError:
            raise ManifestError(f"unknown domain {name!r}; the domains are {', '.join(self.names)}") from None

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def is_ready(self) -> bool:
        """Whether all training shards can be read where they lie; else some are fetched or decompressed first."""
        return all(shard.is_ready for domain in self.domains for shard in domain.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that the token stream depends on; folders may move, data may not change."""
        return self.prefix_fingerprint(len(self.domains))

    def prefix_fingerprint(self, domains: int) -> str:
        """The fingerprint of the first `domains` domains alone: what it was before others were appended."""
        data = [[d.name, [_identity(shard) for shard in d.shards]] for d in self.domains[:domains]]
        content = json.dumps([_FINGERPRINT_VERSION, self.vocab_size, data])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

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

    def with_domain(self, name: str, value: Any) -> Manifest:
        """These domains and another at the end. value: what a mapping has for a name, see open."""
        return replace(self, domains=(*self.domains, domain_from_value(name, value)))

    def split(self, name: str, parts: Mapping[str, Sequence[int]]) -> Manifest:
        """These domains and, at the end, the parts of one of them, each with its field, group and bytes per token.

        parts: numbers of the domain's training shards by name of the part, each shard in one part. The domain
        itself stays, with what is held out of it: a stream goes on over the parts once its weight is zero.
        """
        parent = self.domain(name)
        dealt = sorted(i for numbers in parts.values() for i in numbers)
        if dealt != list(range(len(parent.shards))):
            raise ManifestError(
                f"the parts of domain {name!r} have its shards {dealt}; expected each of 0 to "
                f"{len(parent.shards) - 1} in one part"
            )
        made = (
            checked_domain(replace(parent, name=part, shards=tuple(parent.shards[i] for i in numbers), validation=()))
            for part, numbers in parts.items()
        )
        return replace(self, domains=(*self.domains, *made))

    def roots_outside(self, path: str | Path) -> list[str]:
        """The folders, or URLs of folders, that a manifest at `path` needs in roots= to open these shards."""
        home = os.path.realpath(Path(path).absolute().parent)
        parents = {folder_of(shard.path) for d in self.domains for shard in (*d.shards, *d.validation)}
        return sorted(p for p in parents if is_url(p) or not Path(os.path.realpath(p)).is_relative_to(home))

    @classmethod
    def open(cls, data: Manifest | str | Path | Mapping[str, Any], *, roots: Iterable[str | Path] = ()) -> Manifest:
        """A Manifest from any of: a Manifest, a manifest's path, a folder, a mapping from name to data.

        Folder: its manifest.json if it has one; else its subfolders of shards are the domains (train beside
        val, validation or test: one domain, and what is held out of it); else, with a train* file or an
        index.json, it is one domain; else each file of tokens is one. Names with "val" are held out.
        Mapping: name -> path, list of paths (files, folders, URLs of files), or {"path": ..., "validation":
        path or paths to hold out, "field": ..., "group": ..., "dtype": ..., "format": ..., "column": ...,
        "documents": "samples" for MDS samples that are documents though all have one size}.
        """
        if isinstance(data, Manifest):
            return data
        if isinstance(data, Mapping):
            return cls(tuple(domain_from_value(str(name), value) for name, value in data.items()))
        if not isinstance(data, (str, os.PathLike)):
            raise ManifestError(
                f"the data are {data!r:.100}; expected a manifest, its path, a folder, or a mapping from "
                'the name of each domain to its paths, such as {"text": paths}'
            )
        if is_url(str(data)):
            raise ManifestError(
                f"{data} is a URL; a manifest is a file on this machine, whose shards may have URLs: copy it here and "
                f'give roots=[their folder], or name the domain of a folder of tokens: {{"name": {str(data)!r}}}'
            )
        path = Path(data)
        if path.is_dir():
            path = path / "manifest.json"
            return cls.load(path, roots=roots) if path.exists() else cls(domains_in_folder(path.parent))
        if not path.exists():
            raise ManifestError(f"{path} does not exist; expected a manifest, or a folder of token shards")
        if holds_tokens(path.name):
            raise ManifestError(f'{path} holds tokens and is no manifest; name its domain: {{"name": {str(path)!r}}}')
        return cls.load(path, roots=roots)

    @classmethod
    def load(cls, path: str | Path, *, roots: Iterable[str | Path] = ()) -> Manifest:
        """Read a manifest; every shard must lie in its folder or in one of `roots`, and have its entry's size.

        roots: folders, or beginnings of URLs. What files hold is not looked at: `verify` does that.
        """
        return cls(**read_manifest(Path(path), roots))

    def save(self, path: str | Path) -> None:
        """Write the manifest atomically; shards are named relative to its folder.

        Tables that no file of the data set holds go into a file beside it, named after their content.
        """
        write_manifest(Path(path).absolute(), self.domains, self.vocab_size, self.eot, self.tokenizer)


def check_ids(vocab_size: int | None, eot: int | None) -> None:
    if vocab_size is not None and not 0 <= vocab_size < 1 << 63:
        raise ManifestError(f"vocab_size is {vocab_size}; expected a number of ids below 2**63")
    if eot is not None and not 0 <= eot < 1 << 64:
        raise ManifestError(f"eot is {eot}; expected the id of a token, from 0 to 2**64 - 1")


def _identity(shard: Shard) -> list[Any]:
    """What of a shard the token stream depends on."""
    name = name_of(shard.path)
    digest = None if shard.digest is None else shard.digest.removeprefix("sha256:")
    identity: list[Any] = [name, shard.format, shard.dtype, shard.tokens, shard.bytes, digest]
    if shard.offset not in (0, 1024) or shard.extents is not None:
        extents = shard.extents
        identity += [shard.offset, extents and [extents.tokens, extents.stride]]
        if extents is not None and extents.ends is not None:
            assert extents.bytes is not None
            identity += [hashlib.sha256(array.tobytes()).hexdigest() for array in (extents.ends, extents.bytes)]
    return identity
