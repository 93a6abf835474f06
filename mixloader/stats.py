"""Sums of token losses, and of what else is known of each token, for each domain, kept on the device as integers.

Each statistic of a token is made a fixed-point int64 once and only added after that, so the sums do
not depend on the order of the tokens, on the split into micro-batches or ranks, or on atomics. The buffer is
drained at every snapshot, and nothing in a training step waits for a snapshot to arrive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.utils import checkpoint

from mixloader.errors import StatsError

if TYPE_CHECKING:
    from mixloader.influence import Influence


@dataclass(frozen=True)
class Statistic:
    """How one number of a token becomes an integer: floor(min(max(value, 0), clamp) * scale + 1/2)."""

    scale: float
    clamp: float


STATISTICS = {
    "tokens": Statistic(1.0, 1.0),
    "loss": Statistic(2.0**24, 2.0**10),
    "loss_sq": Statistic(2.0**16, 2.0**20),
    "excess": Statistic(2.0**24, 2.0**10),
    "entropy": Statistic(2.0**24, 2.0**10),
    "correct": Statistic(1.0, 1.0),
    "el2n": Statistic(2.0**24, 2.0),
    "bytes": Statistic(1.0, 2.0**16),
    "bad": Statistic(1.0, 1.0),
}
"""The columns of DomainStats, in order. All are of the plain loss: the negative log-likelihood of the target in nats,
after softcap, before weights, label smoothing and z-loss.

tokens: 1 for each token counted. loss, loss_sq: the loss and its square. A loss is rounded to 6e-8 nats, a square to
1.5e-5, and a loss above 1,024 nats counts as 1,024.
excess: max(0, loss - reference loss), where reference losses are given.
entropy: of the predicted distribution, in nats. correct: 1 if no class has a higher logit than the target.
el2n: length of softmax(logits) - onehot(target) (Paul, Ganguli and Dziugaite 2021), in [0, sqrt 2]. It is computed in
float32 from sums of squares, to 2e-4. These three only with `DomainStats.distribution`.
bytes: length of the target's text, where `DomainStats.token_bytes` says it.
bad: 1 for each bad token; these add to no other column."""

MAX_TOKENS = 1 << 27
"""Tokens of one domain that a snapshot may hold. The largest entries of a token are 2^36 (loss_sq) and 2^34 (loss,
excess, entropy), so with more a sum could pass 2^63 and wrap around if every one of them were at the clamp."""


@dataclass(frozen=True, eq=False)
class StatsTable:
    """The sums of one snapshot, on the host.

    sums: int64 [D + 1, 9], columns `DomainStats.COLUMNS`, in the units of STATISTICS; the last row belongs to no
    domain (see DomainStats). Adding the `sums` of several snapshots is exact.
    """

    sums: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """float64 [D]: the sum of one statistic over the tokens of each domain, in its own unit (nats, bytes, ...)."""
        return self.sums[:-1, DomainStats.COLUMNS.index(name)] / STATISTICS[name].scale

    @property
    def tokens(self) -> np.ndarray:
        """int64 [D]: tokens counted."""
        return self.sums[:-1, 0]

    @property
    def loss_sum(self) -> np.ndarray:
        """float64 [D]: sum of the token losses, in nats."""
        return self.column("loss")

    @property
    def loss_sq_sum(self) -> np.ndarray:
        """float64 [D]: sum of the squared token losses, in nats squared."""
        return self.column("loss_sq")

    @property
    def bits_per_byte(self) -> np.ndarray:
        """float64 [D]: loss in bits by bytes of text; NaN where no bytes were counted."""
        n_bytes = self.column("bytes")
        bits = self.column("loss") / np.log(2.0)
        return np.divide(bits, n_bytes, out=np.full(len(bits), np.nan), where=n_bytes > 0)

    @property
    def bad(self) -> int:
        """Bad tokens, of all domains and of none."""
        return int(self.sums[:, -1].sum())


class StatsSnapshot:
    """Sums on their way to the host."""

    def __init__(
        self,
        host: torch.Tensor,
        copied: torch.cuda.Event | None = None,
        reduced: dist.Work | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._host = host
        self._copied = copied
        self._reduced = reduced
        self._names = names

    def ready(self) -> bool:
        """True once `wait` would return without waiting."""
        if self._reduced is not None and not self._reduced.is_completed():
            return False
        return self._copied is None or self._copied.query()

    def wait(self) -> StatsTable:
        """Block until the sums are on the host, and return them.

        Raises StatsError, with the table as its attribute `table`, if a bad token was counted, or if a domain has
        more than `MAX_TOKENS` tokens, so that a sum may have wrapped around.
        """
        if self._reduced is not None:
            self._reduced.wait()
        if self._copied is not None:
            self._copied.synchronize()
        table = StatsTable(self._host.numpy())
        self._check_bad(table)
        self._check_range(table)
        return table

    def _check_bad(self, table: StatsTable) -> None:
        bad = table.sums[:, -1]
        if not bad.any():
            return
        last = len(bad) - 1
        found = [f"{bad[d]} in {self._domain(int(d))}" for d in np.flatnonzero(bad[:last])]
        if bad[last]:
            found.append(f"{bad[last]} in no domain (domain id -1, or out of range)")
        raise StatsError(
            f"bad tokens since the last snapshot: {', '.join(found)}. A token is bad if its loss (or its reference "
            "loss) is NaN or infinite, if its target is not a class of the logits, or if its domain id is not in "
            f"[-1, {last}). Look at those domains' shards and at the model's logits",
            table,
        )

    def _check_range(self, table: StatsTable) -> None:
        tokens = table.tokens
        if (tokens > MAX_TOKENS).any():
            domain = int(tokens.argmax())
            raise StatsError(
                f"{self._domain(domain)} has {tokens[domain]} tokens in one snapshot; at most {MAX_TOKENS} are sure "
                "to fit the 64-bit sums. Call snapshot() more often, for instance after every optimizer step",
                table,
            )

    def _domain(self, index: int) -> str:
        return f"domain {index}" if self._names is None else f"domain {index} ({self._names[index]!r})"


class DomainStats:
    """Running sums over the tokens of each domain.

    n_domains: domains, at least 1. device: where the logits are. names: of the domains, for messages.
    distribution: also sum entropy, correct and el2n, which take more arithmetic for each logit (on a GPU they hide
        behind the reading of the logits).
    token_bytes: integers [V], the length in bytes of each token's text, 0 for special tokens; at most 65,536.

    `buffer` is int64 [n_domains + 1, 9] at a fixed address, columns COLUMNS, units STATISTICS. The last row belongs to
    no domain: only its "bad" column is used, for tokens whose domain id is out of range and for bad tokens of id -1
    (whose good tokens count nowhere). A bad token is one with a loss that is NaN or infinite, a target out of range or
    a domain id out of range; it adds to "bad" and to nothing else.

    Sums are added only by forward passes in grad mode that are not `paused()` and not the recomputation of a forward
    pass that was counted already, so a loss inside `torch.utils.checkpoint` counts once.

    `influence`, if a Mixer has set it, is told by every counted loss whose its rows are.
    """

    COLUMNS = tuple(STATISTICS)

    def __init__(
        self,
        n_domains: int,
        device: torch.device | str = "cpu",
        *,
        names: Sequence[str] | None = None,
        distribution: bool = False,
        token_bytes: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        if not isinstance(n_domains, int) or n_domains < 1:
            raise ValueError(f"n_domains is {n_domains!r}; expected an integer of at least 1")
        if names is not None and len(names) != n_domains:
            raise ValueError(f"{len(names)} names are given for {n_domains} domains; expected one for each")
        self.n_domains = n_domains
        self.buffer = torch.zeros(n_domains + 1, len(self.COLUMNS), dtype=torch.int64, device=device)
        self.device = self.buffer.device
        self.names = names
        self.distribution = distribution
        self.token_bytes = None if token_bytes is None else _as_token_bytes(token_bytes, self.device)
        self.influence: Influence | None = None
        self._paused = False
        if self.device.type == "cuda":
            self._drained = torch.empty_like(self.buffer)
            self._copies = torch.cuda.Stream(self.device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside this context (evaluation with gradients, say).

        The warm-up of a CUDA graph is better counted and then thrown away with a snapshot: the kernel that counts has
        to be compiled before the capture.
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def enabled(self) -> bool:
        """True in grad mode outside `paused()`. Whether a pass recomputes is for the pass itself to ask: under
        torch.compile this answer becomes part of the graph."""
        return torch.is_grad_enabled() and not self._paused

    def counting(self) -> bool:
        """True if a forward pass that runs now is to be counted."""
        return self.enabled() and not recomputing()

    def add(
        self,
        losses: torch.Tensor,
        domain_ids: torch.Tensor,
        valid: torch.Tensor,
        ignored: torch.Tensor,
        **others: torch.Tensor | None,
    ) -> None:
        """Add tokens, whether `counting` or not: `add_tokens` to this buffer."""
        add_tokens(self.buffer, losses, domain_ids, valid, ignored, **others)

    def snapshot(self, group: dist.ProcessGroup | None = None) -> StatsSnapshot:
        """Take the sums since the last snapshot and start again from zero; does not wait for the device.

        Call it where the losses were computed: on CUDA, on the same stream. With a `group` (torch.distributed) the
        snapshot holds the sums over its ranks, all of which must call: the integers are added in a second buffer
        while training goes on. A group of its own keeps that apart from the gradients' traffic.
        """
        if self.device.type != "cuda":
            host = self.buffer.clone()
            self.buffer.zero_()
            reduced = None if group is None else dist.all_reduce(host, group=group, async_op=True)
            return StatsSnapshot(host, None, reduced, self.names)
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
                if group is not None:
                    # NCCL's wait() holds the current stream, not the host.
                    dist.all_reduce(self._drained, group=group, async_op=True).wait()
                host.copy_(self._drained, non_blocking=True)
                copied.record()
        return StatsSnapshot(host, copied, None, self.names)


def add_tokens(
    sums: torch.Tensor,
    losses: torch.Tensor,
    domain_ids: torch.Tensor,
    valid: torch.Tensor,
    ignored: torch.Tensor,
    *,
    finite: torch.Tensor | None = None,
    reference_losses: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    correct: torch.Tensor | None = None,
    el2n: torch.Tensor | None = None,
    n_bytes: torch.Tensor | None = None,
) -> None:
    """Add tokens to `sums`, int64 [D + 1, 9] as in DomainStats. All other arguments are [N], on its device.

    losses: float32 or float64, nats. domain_ids: int64 or int32. valid: bool, the target is a class of the logits
    and not ignored. ignored: bool, these count nowhere. finite: bool, False makes a token bad. The rest are the
    statistics of STATISTICS; what is None adds nothing. This is the arithmetic that every path repeats.
    """
    n_domains = len(sums) - 1
    ids = domain_ids.long()
    in_domain = (ids >= 0) & (ids < n_domains)
    good = valid & losses.isfinite()
    for also in (finite, None if reference_losses is None else reference_losses.isfinite()):
        good = good if also is None else good & also
    counted = good & in_domain
    bad = ~ignored & (~good | (ids < -1) | (ids >= n_domains))
    # float64 holds the square of a float32 and all products exactly, so there is one rounding, in floor.
    nats = torch.where(counted, losses, 0.0).double().clamp(max=STATISTICS["loss"].clamp)
    given = {
        "loss": nats,
        "loss_sq": nats * nats,
        "excess": None if reference_losses is None else losses.double() - reference_losses.double(),
        "entropy": entropy,
        "correct": correct,
        "el2n": el2n,
        "bytes": n_bytes,
    }
    cells = torch.where(in_domain, ids, n_domains) * sums.shape[1]
    for column, name in enumerate(DomainStats.COLUMNS):
        if name in ("tokens", "bad"):
            units = (counted if name == "tokens" else bad).long()
        elif (values := given[name]) is not None:
            scale, clamp = STATISTICS[name].scale, STATISTICS[name].clamp
            values = torch.where(counted, values, 0).double().clamp(0.0, clamp)
            units = (values * scale + 0.5).floor().long()
        else:
            continue
        sums.view(-1).index_add_(0, cells + column, units)


def recomputing() -> bool:
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


def _as_token_bytes(token_bytes: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 [V] on the device."""
    lengths = torch.as_tensor(token_bytes)
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"token_bytes are {lengths.dtype} of shape {list(lengths.shape)}; expected integers [V]")
    most = int(STATISTICS["bytes"].clamp)
    wrong = ((lengths < 0) | (lengths > most)).nonzero()
    if len(wrong):
        token = int(wrong[0])
        raise ValueError(f"token_bytes[{token}] is {int(lengths[token])}; expected 0 to {most} bytes")
    return lengths.to(device=device, dtype=torch.int32)
