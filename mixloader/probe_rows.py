"""The rows that evaluation fields are probed with: a few at a time out of a pool, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixloader.errors import ConfigError

if TYPE_CHECKING:
    from mixloader.loader import MixLoader

Batch = Mapping[str, Any]
Probes = Mapping[str, Iterable[Batch] | Callable[[int], Batch]]
"""By field: batches {"input_ids": [b, T], "targets": [b, T]}, of which up to POOL rows are kept, or a function from
the number of the probe (0, 1, 2, ...) to the batch of that probe, the same on every rank."""

POOL = 256
"""Rows of a field that are kept in memory."""


class ProbeRows:
    """Rows of each field. vocab_size: ids at or above it are refused; None checks only that they are not negative."""

    def __init__(self, probes: Probes, vocab_size: int | None = None):
        self._vocab_size = vocab_size
        self._pools: dict[str, tuple[Tensor, Tensor] | Callable[[int], Batch]] = {
            name: source if callable(source) else self._pool(name, source) for name, source in probes.items()
        }
        if not self._pools:
            raise ConfigError("influence has no field to probe; mark domains with a field and set tokens of them aside")
        self.fields = tuple(self._pools)

    def take(self, number: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets, [n, T], and the fields of the rows, int64 [n], of probe `number`: `rows` rows a field.

        Later probes go on in the pool where earlier ones ended.
        """
        parts = []
        for index, (name, pool) in enumerate(self._pools.items()):
            if callable(pool):
                inputs, targets = self._checked(name, pool(number))
            else:
                at = (number * rows + torch.arange(rows)) % len(pool[0])
                inputs, targets = pool[0][at], pool[1][at]
            parts.append((inputs, targets, torch.full((len(inputs),), index)))
        if len({inputs.shape[1] for inputs, _, _ in parts}) > 1:
            raise ConfigError(f"the rows of the fields {self.fields} have unlike lengths; make them equally long")
        inputs, targets, fields = (torch.cat(part) for part in zip(*parts, strict=True))
        return inputs, targets, fields

    def _pool(self, name: str, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        kept: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            kept.append(self._checked(name, batch))
            if sum(len(inputs) for inputs, _ in kept) >= POOL:
                break
        if not kept:
            raise ConfigError(f"the probe of field {name!r} has no batches")
        inputs, targets = (torch.cat(part)[:POOL] for part in zip(*kept, strict=True))
        return inputs, targets

    def _checked(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.as_tensor(batch[key]).cpu().long() for key in ("input_ids", "targets"))
        if inputs.ndim != 2 or inputs.shape != targets.shape or not inputs.numel():
            raise ConfigError(
                f"a probe batch of field {name!r} has input_ids {list(inputs.shape)} and targets "
                f"{list(targets.shape)}; expected two of one shape [rows, tokens]"
            )
        most = int(max(inputs.max(), targets.max()))
        if int(inputs.min()) < 0 or (self._vocab_size is not None and most >= self._vocab_size):
            found = int(inputs.min()) if int(inputs.min()) < 0 else most
            raise ConfigError(
                f"a probe batch of field {name!r} holds token {found}; expected ids below "
                f"{self._vocab_size}, the vocabulary of the training data; make it with the same tokenizer"
            )
        return inputs, targets


def field_probes(loader: MixLoader) -> Probes:
    """Held-out windows of each field of a loader's domains, its domains in turn.

    Raises ConfigError if no domain that has a field has anything held out.
    """
    domains: dict[str, list[str]] = {}
    for domain in loader.manifest.domains:
        if domain.field is not None and domain.validation:
            domains.setdefault(domain.field, []).append(domain.name)
    if not domains:
        raise ConfigError(
            "influence needs evaluation fields, but no domain of the data has both a field and held-out tokens; set "
            'tokens aside and mark domains with "field": "source" or "target", or give Influence `probes` of your own'
        )
    return {field: _in_turn(loader, names) for field, names in domains.items()}


def _in_turn(loader: MixLoader, names: list[str]) -> list[Batch]:
    """Windows one by one: the first of each domain, then the second of each, ..."""
    each = -(-POOL // len(names))
    windows = [list(loader.held_out(1, windows_per_domain=each, domains=[name])) for name in names]
    rounds = chain.from_iterable(zip_longest(*windows))
    return [window for window in rounds if window is not None]
