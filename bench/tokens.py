"""The tokens that all loaders are measured on, and the check that what a loader emits is these tokens.

Token p is p modulo a prime, so that every row shows where it came from. Needs numpy and torch alone: the
peers' environment has no mixloader.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

MODULUS = 65_521  # the greatest prime that uint16 holds
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Inputs and targets, [B, T] each."""


def write_tokens(path: Path, count: int) -> None:
    """`count` uint16 tokens into one headerless file."""
    block = np.tile(np.arange(MODULUS, dtype=np.uint16), 64)
    with path.open("wb") as file:
        while count > 0:
            block[:count].tofile(file)
            count -= len(block)


def verify(batches: Batches, shape: tuple[int, int], rounds: int = 20) -> None:
    """Raise AssertionError unless rows are runs of the tokens, targets the next ones, and windows varied."""
    starts = []
    for _ in range(rounds):
        x, y = (tensor.to(torch.int64) for tensor in next(batches))
        assert x.shape == y.shape == shape, f"shapes are {x.shape} and {y.shape}, expected {shape}"
        assert torch.equal(x, (x[:, :1] + torch.arange(shape[1])) % MODULUS), "rows are no runs of the tokens"
        assert torch.equal(y, (x + 1) % MODULUS), "targets are not the next tokens"
        starts += x[:, 0].tolist()
    assert len(set(starts)) > 0.9 * len(starts), "windows are not random"


def tokens_per_second(batches: Batches, seconds: float) -> float:
    """Over about `seconds`; batches that lay ready before do not count."""
    for _ in range(10):
        next(batches)
    tokens, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        x, _ = next(batches)
        tokens += x.numel()
    return tokens / passed
