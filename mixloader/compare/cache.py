"""What a result depends on, as one hash; and the results that are there already.

The key of a cell covers its configuration, its data (by content), the parameters that it starts from, the source
of its policy, and RESULTS_VERSION for the rest of the program. Where files lie, how many workers there are and
which versions of Python and torch run do not change it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixloader.compare.cell import RESULT, Cell
from mixloader.compare.sources import source_digest
from mixloader.config import TrainConfig
from mixloader.errors import StateError
from mixloader.files import replace
from mixloader.manifest import Manifest
from mixloader.policies import make_policy
from mixloader.train.checkpoint import latest_checkpoint
from mixloader.train.run import FREE_KEYS

RESULTS_VERSION = 1
"""Raise it when a change to trainer, loader, models, loss or evaluation changes what a run ends with: results of
another version are not used again. tests/test_compare.py holds what a run of this version ends with."""


def key_of(config: TrainConfig, training: Manifest, scored: Manifest, base: str | None, **more: Any) -> str:
    """Hex key of a run. base: the key of the cell or the digest of the file that it starts from."""
    values = {name: value for name, value in config.to_dict().items() if name not in FREE_KEYS | {"roots"}}
    values["policy_options"] = _with_digests(config.policy_options)
    content = {
        "version": RESULTS_VERSION,
        "config": _without_blanks(values),
        "policy": source_digest(type(make_policy(config.policy, **config.policy_options))),
        "base": base,
        "data": [training.fingerprint, [[d.name, d.field, d.group] for d in training.domains]],
        "held_out": [[shard.digest for d in m.domains for shard in d.validation] for m in (training, scored)],
        **more,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _without_blanks(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is off is left out, so that a new key of the trainer that is off by default leaves old results valid.

    An empty mapping says that something is on, with its defaults, where the key is None by default.
    """
    optional = {f.name for f in dataclasses.fields(TrainConfig) if f.default is None}
    return {
        name: _without_blanks(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value or (name in optional and value is not None)
    }


def _with_digests(value: Any) -> Any:
    """Options with the content of the files that they name in place of the paths."""
    if isinstance(value, Mapping):
        return {name: _with_digests(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_digests(item) for item in value]
    if isinstance(value, (str, Path)) and str(value) and Path(value).exists():
        return parameters_digest(Path(value))
    return value


def parameters_digest(path: Path) -> str:
    """sha256 of a file, or of the parameters of the latest checkpoint in a run's folder."""
    if path.is_dir():
        folder = path if (path / "model.safetensors").exists() else latest_checkpoint(path) or path
        path = folder / "model.safetensors"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}; expected a file, or the folder of a run") from error


class Results:
    """Results by key, in results.json of a comparison's folder and in the folders of its cells.

    A results.json of another place, put into a fresh folder, stands for the runs that it tells of.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / "results.json"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            self._known: dict[str, dict[str, Any]] = {cell["key"]: cell for cell in content.get("cells", [])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"{self.path} is damaged ({error!r}); remove it: what was run here is in the folders of the runs, too"
            ) from error

    def get(self, cell: Cell) -> dict[str, Any] | None:
        if cell.key not in self._known and (cell.out / RESULT).exists():
            self._known[cell.key] = json.loads((cell.out / RESULT).read_text(encoding="utf-8"))
        return self._known.get(cell.key)

    def put(self, result: dict[str, Any]) -> None:
        self._known[result["key"]] = result

    def save(self, content: Mapping[str, Any]) -> None:
        """Write all results and what else is known of the comparison, a line a cell."""
        cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for _, cell in sorted(self._known.items()))
        head = json.dumps(content, indent=1)[:-2]
        replace(self.path, f'{head},\n "cells": [\n{cells}\n]}}\n')
