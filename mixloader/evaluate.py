"""Held-out loss of each domain, over the same windows every time it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mixloader.batch import IGNORED
from mixloader.heldout import HeldOut
from mixloader.layout import check_counts
from mixloader.manifest import Manifest

if TYPE_CHECKING:
    from mixloader.answers import Answers
    from mixloader.mixer import Mixer


class HeldOutFeedback:
    """Evaluates a model after every so many plan steps, and tells the mixer what it found.

    Call step() after each mixer.step(). every: plan steps, counted from step 0, so that a resumed run evaluates where
    the run would have. answers: probe files by "source", "target" or domain, scored as well; a name that both have is
    theirs. windows_per_domain: as held_out_loss. batch_size: rows at a time, by default the loader's. The model is
    evaluated where its parameters are; autocast is the caller's choice. On many ranks each evaluates the same.
    """

    def __init__(
        self,
        mixer: Mixer,
        model: nn.Module,
        every: int,
        *,
        answers: Mapping[str, Answers] | None = None,
        windows_per_domain: int = 64,
        batch_size: int | None = None,
    ):
        check_counts(every=(every, 1), windows_per_domain=(windows_per_domain, 1))
        self.mixer, self.model, self.every = mixer, model, every
        self.answers, self.windows_per_domain = dict(answers or {}), windows_per_domain
        self.batch_size = mixer.loader.batch_size if batch_size is None else batch_size

    def step(self) -> dict[str, float] | None:
        """Evaluate if it is time to; the losses by name that were told, in nats a token, or None."""
        loader = self.mixer.loader
        if loader.step % self.every:
            return None
        device = next(self.model.parameters()).device
        losses = held_out_loss(
            self.model,
            loader.manifest,
            seq_len=loader.seq_len,
            windows_per_domain=self.windows_per_domain,
            batch_size=self.batch_size,
            vocab_size=loader.vocab_size,
            device=device,
        )
        losses |= field_means(losses, loader.manifest)
        for name, answers in self.answers.items():
            losses[name] = answers.score(self.model, batch_size=self.batch_size, device=device).loss
        self.mixer.feedback(losses)
        return losses


def field_means(losses: Mapping[str, float], manifest: Manifest) -> dict[str, float]:
    """By field, the mean over its domains in `losses`."""
    by_field: dict[str, list[float]] = {}
    for domain in manifest.domains:
        if domain.field is not None and domain.name in losses:
            by_field.setdefault(domain.field, []).append(losses[domain.name])
    return {field: sum(values) / len(values) for field, values in by_field.items()}


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
