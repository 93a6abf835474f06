"""Sums of token losses for each domain, kept on the device as integers.

Each statistic of a token is made a fixed-point int64 once and only added after that, so the sums do
not depend on the order of the tokens, on the split into micro-batches or on atomics. The buffer is
drained at every snapshot, and nothing in a training step waits for a snapshot to arrive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils import checkpoint

from mixloader.errors import StatsError

# Range of the sums between two snapshots. The largest entry of one token is LOSS_CLAMP * LOSS_SCALE = 2^34 for the
# loss and LOSS_CLAMP^2 * LOSS_SQ_SCALE = 2^36 for its square; int64 holds 2^63, so 2^29 and 2^27 tokens fit even if
# every one of them is at the clamp. At 16 nats a token it is 2^35 and 2^39.
LOSS_SCALE = 2.0**24
"""Units in one nat: a loss is rounded to 6e-8 nats, half to the next higher unit."""
LOSS_CLAMP = 2.0**10
"""A finite loss above this many nats counts as this many."""
LOSS_SQ_SCALE = 2.0**16
"""Units in one squared nat: a square is rounded to 1.5e-5."""
MAX_TOKENS = 1 << 27
"""Tokens of one domain that a snapshot may hold; with more, a sum could have wrapped around."""


@dataclass(frozen=True, eq=False)
class StatsTable:
    """The sums of one snapshot, on the host.

    sums: int64 [D + 1, 4], columns `DomainStats.COLUMNS`, in the units of this module; the last row belongs to no
    domain (see DomainStats). Adding the `sums` of several snapshots is exact.
    """

    sums: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """int64 [D]: tokens counted."""
        return self.sums[:-1, 0]

    @property
    def loss_sum(self) -> np.ndarray:
        """float64 [D]: sum of the token losses, in nats."""
        return self.sums[:-1, 1] / LOSS_SCALE

    @property
    def loss_sq_sum(self) -> np.ndarray:
        """float64 [D]: sum of the squared token losses, in nats squared."""
        return self.sums[:-1, 2] / LOSS_SQ_SCALE

    @property
    def bad(self) -> int:
        """Bad tokens, of all domains and of none."""
        return int(self.sums[:, 3].sum())


class StatsSnapshot:
    """Sums on their way to the host."""

    def __init__(self, host: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        self._host = host
        self._copied = copied

    def ready(self) -> bool:
        """True once `wait` would return without waiting."""
        return self._copied is None or self._copied.query()

    def wait(self) -> StatsTable:
        """Block until the sums are on the host, and return them.

        Raises StatsError, with the table as its attribute `table`, if a bad token was counted, or if a domain has
        more than `MAX_TOKENS` tokens, so that a sum may have wrapped around.
        """
        if self._copied is not None:
            self._copied.synchronize()
        table = StatsTable(self._host.numpy())
        _check_bad(table)
        _check_range(table)
        return table


def _check_bad(table: StatsTable) -> None:
    bad = table.sums[:, 3]
    if not bad.any():
        return
    last = len(bad) - 1
    found = [f"{bad[d]} in domain {d}" for d in np.flatnonzero(bad[:last])]
    if bad[last]:
        found.append(f"{bad[last]} in no domain (domain id -1, or out of range)")
    raise StatsError(
        f"bad tokens since the last snapshot: {', '.join(found)}. A token is bad if its loss is NaN or infinite, if "
        f"its target is not a class of the logits, or if its domain id is not in [-1, {last}). Look at those domains' "
        "shards and at the model's logits",
        table,
    )


def _check_range(table: StatsTable) -> None:
    tokens = table.tokens
    if (tokens > MAX_TOKENS).any():
        domain = int(tokens.argmax())
        raise StatsError(
            f"domain {domain} has {tokens[domain]} tokens in one snapshot; at most {MAX_TOKENS} are sure to fit the "
            "64-bit sums. Call snapshot() more often, for instance after every optimizer step",
            table,
        )


class DomainStats:
    """Running sums of the token losses of each domain.

    n_domains: domains, at least 1. device: where the logits are.

    `buffer` is int64 [n_domains + 1, 4] at a fixed address, columns COLUMNS. The last row belongs to no domain: only
    its "bad" column is used, for tokens whose domain id is out of range and for bad tokens of id -1 (whose good
    tokens count nowhere). A bad token is one with a loss that is NaN or infinite, a target out of range or a domain id
    out of range; it adds to "bad" and to nothing else.

    Sums are added only by forward passes in grad mode that are not `paused()` and not the recomputation of a forward
    pass that was counted already, so a loss inside `torch.utils.checkpoint` counts once.
    """

    COLUMNS = ("tokens", "loss", "loss_sq", "bad")

    def __init__(self, n_domains: int, device: torch.device | str = "cpu") -> None:
        if not isinstance(n_domains, int) or n_domains < 1:
            raise ValueError(f"n_domains is {n_domains!r}; expected an integer of at least 1")
        self.n_domains = n_domains
        self.buffer = torch.zeros(n_domains + 1, len(self.COLUMNS), dtype=torch.int64, device=device)
        self.device = self.buffer.device
        self._paused = False
        if self.device.type == "cuda":
            self._drained = torch.empty_like(self.buffer)
            self._copies = torch.cuda.Stream(self.device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside this context (evaluation with gradients, warm-up of a CUDA graph)."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def counting(self) -> bool:
        """True if a forward pass that runs now is to be counted."""
        return torch.is_grad_enabled() and not self._paused and not _recomputing()

    def add(self, losses: torch.Tensor, domain_ids: torch.Tensor, valid: torch.Tensor, ignored: torch.Tensor) -> None:
        """Add tokens, whether `counting` or not. All arguments are [N], on `device`.

        losses: float32 or float64, nats. domain_ids: int64 or int32. valid: bool, the target is a class of the logits
        and not ignored. ignored: bool, these count nowhere.
        """
        ids = domain_ids.long()
        in_domain = (ids >= 0) & (ids < self.n_domains)
        good = valid & losses.isfinite()
        counted = good & in_domain
        bad = ~ignored & (~good | (ids < -1) | (ids >= self.n_domains))
        # float64 holds the square of a float32 and both products exactly, so there is one rounding, in floor.
        nats = torch.where(counted, losses, 0.0).double().clamp(max=LOSS_CLAMP)
        loss = (nats * LOSS_SCALE + 0.5).floor().long()
        loss_sq = (nats * nats * LOSS_SQ_SCALE + 0.5).floor().long()
        entries = torch.stack([counted.long(), loss, loss_sq, bad.long()], dim=1)
        # In one dimension, because index_add_ of rows is slow on the CPU.
        columns = torch.arange(len(self.COLUMNS), device=self.device)
        cells = torch.where(in_domain, ids, self.n_domains)[:, None] * len(self.COLUMNS) + columns
        self.buffer.view(-1).index_add_(0, cells.view(-1), entries.view(-1))

    def snapshot(self) -> StatsSnapshot:
        """Take the sums since the last snapshot and start again from zero; does not wait for the device.

        Call it where the losses were computed: on CUDA, on the same stream.
        """
        if self.device.type != "cuda":
            host = self.buffer.clone()
            self.buffer.zero_()
            return StatsSnapshot(host, None)
        with torch.cuda.device(self.device):
            compute = torch.cuda.current_stream()
            # Kernels of a captured CUDA graph keep writing to the address of `buffer`, so its content moves to the
            # second buffer instead of the two changing places. That must not overtake the copy of the last snapshot.
            compute.wait_stream(self._copies)
            self._drained.copy_(self.buffer)
            self.buffer.zero_()
            self._copies.wait_stream(compute)
            host = torch.empty(self.buffer.shape, dtype=torch.int64, pin_memory=True)
            copied = torch.cuda.Event(blocking=True)
            with torch.cuda.stream(self._copies):
                host.copy_(self._drained, non_blocking=True)
                copied.record()
        return StatsSnapshot(host, copied)


def _recomputing() -> bool:
    """True inside the recomputation of `torch.utils.checkpoint(..., use_reentrant=False)`.

    That variant runs its first forward pass in grad mode, so grad mode alone would count it twice. Torch has no
    public flag for it; the recomputation is called from the function `unpack_hook` of its module. (The reentrant
    variant runs the first pass without grad mode, and its recomputation is the one that counts.)
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "unpack_hook" and code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
