"""Time and memory of work on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], device: str, calls: int = 6) -> float:
    """Of one call. On CUDA the mean of several between two events, so that their launches hide as in training."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def peak_megabytes(work: Callable[[], Any], device: str) -> float:
    """What a call takes beyond what was there: of torch's allocator on CUDA, of resident memory on a CPU (Linux)."""
    if device == "cpu":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # gives back what was freed, which would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # forgets the greatest resident size so far
        before = _resident("VmRSS")
        work()
        return max(0.0, (_resident("VmHWM") - before) / 1e3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _resident(name: str) -> int:
    """In kB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """On CUDA, whatever makes the host wait for the device raises; memory that is freed does not."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
