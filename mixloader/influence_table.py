"""What is known of influence, as numbers on the host, and how they get there."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mixloader.errors import StatsError
from mixloader.row_sums import RowSums


@dataclass(frozen=True, eq=False)
class InfluenceTable:
    """What was measured of influence, on the host; NaN where nothing was. D domains, F fields.

    value, std: float64 [D, F]; inner product of the mean gradient of a row of the domain (of the sum of its token
    losses) with the gradient of the field's mean token loss: by how much one row of SGD with learning rate 1 lowers the
    field's loss, in nats a token. std: standard error, from the spread over training rows and over probe rows.
    gram: float64 [D, D], of the mean row gradients. row_norm_sq: float64 [D].
    rows: float64 [D], rows behind the mean, decay counted. step, probe_step: int64 [D], [F]: the plan steps of the
    latest rows, -1 for none. bad: int64 [2], rows left out: ever, as their gradient was not finite; of the latest step,
    as their domain is not known.
    """

    fields: tuple[str, ...]
    value: np.ndarray
    std: np.ndarray
    gram: np.ndarray
    row_norm_sq: np.ndarray
    rows: np.ndarray
    step: np.ndarray
    probe_step: np.ndarray
    bad: np.ndarray

    @property
    def latest(self) -> int:
        """The plan step of the latest row or probe, -1 for none."""
        return int(max(self.step.max(), self.probe_step.max()))


def pack_table(domains: RowSums, fields: RowSums) -> Tensor:
    """float64, flat: an InfluenceTable on the device."""
    means, probes = domains.means(), fields.means()
    parts = (
        means @ probes.T,
        (domains.variance() + fields.variance().T).sqrt(),
        domains.gram(means),
        domains.norm_sq(),
        domains.count(),
        domains.steps,
        fields.steps,
        domains.bad,
    )
    return torch.cat([part.double().flatten() for part in parts])


def unpack_table(flat: np.ndarray, fields: tuple[str, ...]) -> InfluenceTable:
    """What pack_table gave, on the host."""
    f = len(fields)
    # D² + D (2 F + 3) + F + 2 numbers.
    d = round((math.sqrt((2 * f + 3) ** 2 + 4 * (len(flat) - f - 2)) - (2 * f + 3)) / 2)
    shapes = ((d, f), (d, f), (d, d), (d,), (d,), (d,), (f,), (2,))
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
    value, std, gram, norm, rows, step, probe_step, bad = parts
    return InfluenceTable(
        fields, value, std, gram, norm, rows, step.astype(np.int64), probe_step.astype(np.int64), bad.astype(np.int64)
    )


class InfluenceSnapshot:
    """What is known of influence after a plan step, on its way to the host.

    On a GPU all is in its streams. On a CPU with several ranks the sum over ranks is under way, and who needs it first
    finishes it: the policy's thread, or the next step with sketches.
    """

    def __init__(
        self,
        step: int,
        fields: tuple[str, ...],
        names: tuple[str, ...],
        domain_sums: RowSums,
        field_sums: RowSums,
        new: tuple[bool, bool],
        group: dist.ProcessGroup | None,
    ):
        self._step, self._fields, self._names, self._sides = step, fields, names, (domain_sums, field_sums)
        self._new = new
        self._lock = threading.Lock()
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._told = False
        self._works = [
            dist.all_reduce(side.new, group=group, async_op=True)
            for side, is_new in zip(self._sides, new, strict=True)
            if is_new and group is not None
        ]
        if not self._works or domain_sums.new.is_cuda:
            self.fold()

    def fold(self) -> None:
        """Add what the ranks measured to the sums, once."""
        with self._lock:
            if self._host is not None:
                return
            for work in self._works:
                work.wait()  # with NCCL it holds the stream, not the host
            for side, is_new in zip(self._sides, self._new, strict=True):
                if is_new:
                    side.fold(self._step)
            table = pack_table(*self._sides)
            if not table.is_cuda:
                self._host = table
                return
            host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._copied = torch.cuda.Event(blocking=True)
            host.copy_(table, non_blocking=True)
            self._copied.record()
            self._host = host

    def ready(self) -> bool:
        """True once `wait` would return without waiting."""
        if self._host is None:
            return all(work.is_completed() for work in self._works)
        return self._copied is None or self._copied.query()

    def wait(self) -> InfluenceTable:
        """Block until the numbers are on the host, and return them.

        Raises StatsError, once, with the table as its attribute, if a row of the step had a domain that is not there.
        """
        self.fold()
        if self._copied is not None:
            self._copied.synchronize()
        assert self._host is not None
        table = unpack_table(self._host.numpy(), self._fields)
        if table.bad[1] and not self._told:
            self._told = True
            raise StatsError(
                f"{table.bad[1]} rows of plan step {self._step} have a domain id that is not in "
                f"[-1, {len(self._names)}), or ids that differ within the row; influence takes one domain a row",
                table,
            )
        return table
