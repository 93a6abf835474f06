"""Held-out loss of each domain, over the same windows every time it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mixloader.errors import TokenError
from mixloader.formats import read_tokens
from mixloader.manifest import Domain, Manifest

IGNORED = -100


def held_out_loss(
    model: nn.Module,
    manifest: Manifest,
    *,
    seq_len: int,
    windows_per_domain: int = 64,
    batch_size: int = 16,
    vocab_size: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Mean negative log-likelihood a token (nats) of each domain's validation shards, by name.

    The windows of a domain start every `seq_len` tokens within a shard; if there are more than
    `windows_per_domain`, that many are taken, spread evenly. A shard's last window may be shorter.
    vocab_size: token ids at or above it are an error; by default the manifest's.
    Domains with fewer than two validation tokens in every shard are left out. The model is in `eval()`
    mode meanwhile, and no statistics are counted; autocast is the caller's choice.
    Raises TokenError for a token outside the vocabulary, ShardError for a shard that cannot be read.
    """
    vocab_size = manifest.vocab_size if vocab_size is None else vocab_size
    was_training = model.training
    model.eval()
    losses = {}
    try:
        for domain in manifest.domains:
            windows = validation_windows(domain, seq_len, windows_per_domain)
            if len(windows):
                if vocab_size is not None and windows.max() >= vocab_size:
                    raise TokenError(
                        f"the validation shards of domain {domain.name!r} hold token {windows.max()}; expected ids "
                        f"below vocab_size = {vocab_size}; pack the domain again with the right tokenizer"
                    )
                losses[domain.name] = _mean_loss(model, torch.from_numpy(windows), batch_size, device)
    finally:
        model.train(was_training)
    return losses


def validation_windows(domain: Domain, seq_len: int, count: int) -> np.ndarray:
    """Up to `count` windows of a domain's validation shards, int64 [n, seq_len + 1], IGNORED after their end."""
    places = [(shard, start) for shard in domain.validation for start in range(0, max(shard.tokens - 1, 0), seq_len)]
    chosen = [places[i * len(places) // count] for i in range(count)] if len(places) > count else places
    windows = np.full((len(chosen), seq_len + 1), IGNORED, dtype=np.int64)
    for row, (shard, start) in zip(windows, chosen, strict=True):
        length = min(seq_len + 1, shard.tokens - start)
        row[:length] = read_tokens(shard, start, length)
    return windows


@torch.no_grad()
def _mean_loss(model: nn.Module, windows: torch.Tensor, batch_size: int, device: torch.device | str) -> float:
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = int((windows[:, 1:] != IGNORED).sum())
    for batch in windows.split(batch_size):
        batch = batch.to(device, non_blocking=True)
        # The model is causal, so what stands after the end of a window does not change what stands before.
        logits = model(batch[:, :-1].clamp(min=0))
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return float(total) / count
