"""Training windows of one domain beside the stream, for probes of its gradient or loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mixloader.layout import check_counts
from mixloader.manifest import Manifest

if TYPE_CHECKING:
    from mixloader.loader import MixLoader

_APART = 0x9E3779B97F4A7C15  # sets the order of a probe apart from that of the stream


def probe(loader: MixLoader, domain: str, batch_size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of a domain's training windows in an order of their own, without end; see MixLoader.probe."""
    check_counts(batch_size=(batch_size, 1), seed=(seed, 0))
    loader.manifest.domain(domain)
    return _draw(loader, domain, batch_size, seed)


def _draw(loader: MixLoader, domain: str, batch_size: int, seed: int) -> Iterator[dict[str, Any]]:
    from mixloader.loader import MixLoader

    manifest = loader.manifest
    only = Manifest((manifest.domain(domain),), manifest.vocab_size, manifest.eot, manifest.tokenizer)
    number = manifest.names.index(domain)
    with MixLoader(
        only, batch_size, loader.seq_len, world_size=1, rank=0, seed=(loader.seed ^ _APART * (seed + 1)) % (1 << 64),
        vocab_size=loader.vocab_size, eot=loader.eot, num_workers=0, dtype=loader.format.dtype,
        target_dtype=loader.format.target_dtype, documents=loader.rules.documents,
        mask_boundaries=loader.rules.mask_boundaries, packing=loader.rules.packing,
    ) as own:  # fmt: skip
        for batch in own:
            batch["domain_ids"].fill_(number)
            yield batch
