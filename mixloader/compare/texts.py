"""Held-out text in two parts: one that policies are told losses of, one that runs are scored on.

Whole documents are dealt where the data say what ends one; else each shard is cut in its middle. So no token is in
both parts, and beside that one cut no document is. The parts are written as shards of their own, and the manifest
that a run trains with does not name the score text at all: nothing that a trainer does can reach it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mixloader.domains import Domain
from mixloader.errors import ManifestError
from mixloader.formats import Shard, read_tokens
from mixloader.manifest import Manifest
from mixloader.pack import write_shard

MOST_TOKENS = 1 << 20
"""Held-out tokens of a domain that are looked at; no comparison scores more."""


def deal(tokens: list[np.ndarray], eot: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each shard, [N] int, as (feedback, score): by documents that end with `eot`, or in halves.

    A document goes to the part that has fewer tokens so far, feedback first.
    """
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    sizes = [0, 0]
    for shard in tokens:
        ends = np.flatnonzero(shard[:-1] == eot) + 1 if eot is not None else np.zeros(0, dtype=np.int64)
        for document in np.split(shard, ends if len(ends) else [len(shard) // 2]):
            part = int(sizes[1] < sizes[0])
            parts[part].append(document)
            sizes[part] += len(document)
    feedback, score = (np.concatenate(part) if part else np.zeros(0, dtype=np.int64) for part in parts)
    return feedback, score


def split_manifest(
    manifest: Manifest, fields: Mapping[str, str | None], probed: Collection[str], out: Path
) -> tuple[Manifest, Manifest]:
    """(what runs train with, what they are scored on), of the domains in `fields` and in that order.

    fields: domain to field, in place of those of `manifest`. probed: domains that keep their feedback text.
    Shards are written under `out`. Raises ManifestError for a domain with a field and nothing held out.
    """
    training, scored = [], []
    for number, (name, own) in enumerate(fields.items()):
        domain = replace(manifest.domain(name), field=own)
        feedback, score = deal(_held_out(domain), manifest.eot)
        if own is not None and min(len(feedback), len(score)) < 2:
            raise ManifestError(
                f"domain {name!r} has {len(feedback) + len(score)} held-out tokens, too few for feedback and score; "
                "hold out more of it, or name it under `other`, which is not scored"
            )
        training.append(replace(domain, validation=_written(out / "feedback", number, feedback, name in probed)))
        scored.append(replace(domain, validation=_written(out / "score", number, score, own is not None)))
    return replace(manifest, domains=tuple(training)), replace(manifest, domains=tuple(scored))


def _held_out(domain: Domain) -> list[np.ndarray]:
    share = MOST_TOKENS // max(1, len(domain.validation))
    return [read_tokens(shard, 0, min(shard.tokens, share)).astype(np.int64) for shard in domain.validation]


def _written(folder: Path, number: int, tokens: np.ndarray, wanted: bool) -> tuple[Shard, ...]:
    if not wanted:
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    # By number: what a domain may be called, a file may not.
    return (write_shard(folder / f"{number:03d}.bin", tokens, vocab_size=int(tokens.max()) + 1),)
