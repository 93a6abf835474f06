"""A GPT of plain torch and its training step, the same for every loader. Needs torch alone: the peers' environment has
no mixloader."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits [B, T, V] and targets [B, T] to a mean."""


@dataclass(frozen=True)
class Sizes:
    rows: int
    seq_len: int
    vocab_size: int
    layers: int
    width: int


SIZES = {"cpu": Sizes(8, 128, 4096, 2, 128), "cuda": Sizes(12, 1024, 50304, 12, 768)}
"""Some tenths of a second a step on one core; GPT-2 124M."""


class GPT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.width)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.seq_len, sizes.width))
        block = nn.TransformerEncoderLayer(
            sizes.width, sizes.width // 64, 4 * sizes.width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(block, sizes.layers, nn.LayerNorm(sizes.width), enable_nested_tensor=False)
        self.head = nn.Linear(sizes.width, sizes.vocab_size, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(sizes.seq_len))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


class PlainTrainer:
    """One model in training: any loader may give it batches in turn."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        if device == "cpu":
            _keep_memory()
        self.device, self.sizes = device, SIZES[device]
        self.model = GPT(self.sizes).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def run(
        self,
        batches: Iterator[Any],
        steps: int,
        loss_of: Callable[[Any], Loss],
        after: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """`steps` training steps; milliseconds of one, of its wait for a batch, and of `after`; and of processors in
        this process, all threads together, which other programs on the machine change little.

        batches: (inputs, targets, anything). loss_of: the loss for the third. after: called at the end of a step.
        Token ids are folded into the vocabulary, as those of the loaders' benchmark are larger.
        """
        waited, ending, begin, cpu = 0.0, 0.0, self._now(), time.process_time()
        for _ in range(steps):
            drawing = time.perf_counter()
            x, y, more = next(batches)
            waited += time.perf_counter() - drawing
            x, y = (tensor.to(self.device, non_blocking=True) % self.sizes.vocab_size for tensor in (x, y))
            with self._autocast():
                logits = self.model(x)
            loss_of(more)(logits, y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if after is not None:
                done = time.perf_counter()
                after()
                ending += time.perf_counter() - done
        seconds = self._now() - begin
        cpu = time.process_time() - cpu
        per_step = {"ms": seconds, "cpu_ms": cpu, "wait_ms": waited, "after_ms": ending}
        return {"wait_share": waited / seconds, **{key: value / steps * 1e3 for key, value in per_step.items()}}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()


def _keep_memory() -> None:
    """Freed memory stays with the process: what a step takes else depends on what was freed before it began."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's own."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
