"""Domains: named parts of the data, from paths, folders and mappings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixloader.errors import ManifestError
from mixloader.formats import Shard, open_shards
from mixloader.formats.opening import INDEX, SUFFIXES, holds_shards, token_files
from mixloader.formats.source import name_of

FIELDS = ("source", "target", None)
_HELD_OUT = {"val", "valid", "validation", "test"}  # folders that are not trained on
_KEYS = ("path", "validation", "field", "group", "dtype", "format", "column", "documents")
_HOW = ("format", "dtype", "column", "documents")  # how shards are opened
_HOLDS = f"token shards ({', '.join(SUFFIXES)}, or an {INDEX})"


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


def checked_domain(domain: Domain) -> Domain:
    if domain.field not in FIELDS:
        raise ManifestError(f"domain {domain.name!r} has field {domain.field!r}; expected 'source', 'target' or none")
    if not domain.shards:
        raise ManifestError(f"domain {domain.name!r} has no training shards")
    return domain


def domain_from_value(name: str, value: Any) -> Domain:
    """A domain from a path, a list of paths or a mapping with a path and what else is known: see Manifest.open."""
    options = dict(value) if isinstance(value, Mapping) else {"path": value}
    unknown = sorted(set(options) - set(_KEYS))
    if unknown or "path" not in options:
        found = f"has an unknown key {unknown[0]!r}" if unknown else "has no 'path'"
        raise ManifestError(f"domain {name!r} {found}; known keys are {', '.join(_KEYS)}")
    for key in ("field", "group", *_HOW):
        if not isinstance(options.get(key), (str, type(None))):
            raise ManifestError(f"{key} of domain {name!r} is {options[key]!r}; expected a string or none")
    how = {key: options.get(key) for key in _HOW}

    def opened(key: str) -> list[Shard]:
        value = options.get(key, ())
        paths = [value] if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(paths, Iterable) or isinstance(paths, bytes):
            raise ManifestError(f"{key} of domain {name!r} is {value!r}; expected a path or a list of paths")
        shards: list[Shard] = []
        for path in paths:
            if not isinstance(path, (str, os.PathLike)):
                raise ManifestError(f"{key} of domain {name!r} has {path!r} among its paths; expected strings or Paths")
            found = open_shards(path, **how)
            if not found:
                raise ManifestError(f"folder {path} of domain {name!r} holds no {_HOLDS}")
            shards += found
        return shards

    return _domain(name, opened("path"), opened("validation"), options.get("field"), options.get("group"))


def domains_in_folder(folder: Path) -> tuple[Domain, ...]:
    """Subfolders with shards are the domains; else, with an index.json or a train*, the folder; else each file.

    Subfolders train and val (valid, validation, test) are one domain, and what is held out of it.
    """
    subfolders = [path for path in sorted(folder.iterdir()) if path.is_dir() and holds_shards(path)]
    files = token_files(folder)
    if subfolders and files:
        raise ManifestError(
            f"folder {folder} holds both files of tokens ({files[0].name}) and folders of them ({subfolders[0].name}); "
            "pass a mapping from the name of each domain to its paths"
        )
    held_out = [path for path in subfolders if path.name.lower() in _HELD_OUT]
    if held_out:
        train = [path for path in subfolders if path not in held_out]
        if [path.name.lower() for path in train] != ["train"]:
            beside = ", ".join(path.name for path in train) or "nothing"
            raise ManifestError(
                f"folder {folder} holds {held_out[0].name} beside {beside}; expected train alone: "
                "pass a mapping from the name of each domain to its paths"
            )
        validation = [shard for path in held_out for shard in open_shards(path)]
        return (_domain(folder.resolve().name, open_shards(train[0]), validation),)
    if subfolders:
        return tuple(_domain(path.name, open_shards(path)) for path in subfolders)
    if (folder / INDEX).is_file() or any(file.stem.startswith("train") for file in files):
        return (_domain(folder.resolve().name, open_shards(folder)),)
    if not files:
        raise ManifestError(f"folder {folder} holds neither a manifest.json nor {_HOLDS}; expected either")
    return tuple(_domain(file.stem, open_shards(file)) for file in files if not _is_validation(file.name))


def _domain(
    name: str,
    shards: Iterable[Shard],
    validation: Sequence[Shard] = (),
    field: str | None = None,
    group: str | None = None,
) -> Domain:
    """A domain of shards, of which those with "val" in their name are held out."""
    train: list[Shard] = []
    held_out = list(validation)
    for shard in shards:
        (held_out if _is_validation(name_of(shard.path)) else train).append(shard)
    if not train and len(held_out) > len(validation):
        raise ManifestError(
            f'domain {name!r} has no training shards: the name of {held_out[-1].path} has "val" in it, which holds '
            "a shard out; rename what is to be trained on"
        )
    return checked_domain(Domain(name, tuple(train), tuple(held_out), field, group))


def _is_validation(name: str) -> bool:
    """Whether one of the words of a name says so, or it begins with "val"."""
    name = name.lower()
    return name.startswith("val") or not {"val", "valid", "validation"}.isdisjoint(re.split(r"[-_.]", name))
