"""The index.json of a folder of shards (MDS, litData): JSON of unknown origin, checked value by value."""

from __future__ import annotations

import json
from typing import Any

from mixloader.errors import ShardError
from mixloader.formats.source import Source

NAME = "index.json"
_LARGEST = 1 << 30  # bytes; a larger one is no index


class Listing:
    """One object of an index.json, and where in the file it stands."""

    def __init__(self, path: str, value: Any, where: str = "the top level"):
        if not isinstance(value, dict):
            raise ShardError(f"{where} of {path} is no JSON object; the index is damaged")
        self.path, self.value, self.where = path, value, where

    @classmethod
    def read(cls, source: Source) -> Listing:
        if source.size > _LARGEST:
            raise ShardError(f"{source.path} has {source.size} bytes; an index has at most {_LARGEST}")
        try:
            return cls(source.path, json.loads(source.read(0, source.size)))
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{source.path} is no JSON: {error}") from error

    def take(self, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
        value = self.value.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ShardError(f"{key} at {self.where} of {self.path} is {value!r}; the index is damaged")
        return value

    def inner(self, key: str, *, optional: bool = False) -> Listing | None:
        value = self.take(key, dict, optional=optional)
        return None if value is None else Listing(self.path, value, f"{self.where}.{key}")

    def each(self, key: str) -> list[Listing]:
        return [Listing(self.path, value, f"{key}[{i}]") for i, value in enumerate(self.take(key, list))]


def lists(source: Source, key: str) -> bool:
    """Whether a file is an index.json that has `key`."""
    return source.name == NAME and key in Listing.read(source).value
