"""Held-out loss of each domain, over the same windows every time it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mixloader.batch import IGNORED
from mixloader.heldout import HeldOut
from mixloader.manifest import Manifest


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
    losses = {}
    with evaluating(model):
        for name in HeldOut(manifest, batch_size, seq_len, windows_per_domain=windows_per_domain).names:
            batches = HeldOut(
                manifest,
                batch_size,
                seq_len,
                windows_per_domain=windows_per_domain,
                domains=[name],
                vocab_size=vocab_size,
            )
            losses[name] = _mean_loss(model, batches, device)
    return losses


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval()` mode, and afterwards the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[B, T, V] from input_ids [B, T]: what the model returns, its `.logits`, or the first of several outputs."""
    output = model(input_ids)
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: HeldOut, device: torch.device | str) -> float:
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for batch in batches:
        inputs, targets = batch["input_ids"], batch["targets"]
        count += int((targets != IGNORED).sum())
        # The model is causal, so what stands after the end of a window does not change what stands before.
        logits = logits_of(model, inputs.to(device, non_blocking=True))
        targets = targets.to(device, non_blocking=True).flatten()
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum"
        )
    return float(total) / count
