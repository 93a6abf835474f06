"""Random windows from a disk, with an empty page cache: threads of mixloader against maps of the file.

The file is written back (fsync), dropped (POSIX_FADV_DONTNEED), and shown to be gone (mincore) before every
single measure, and each measure has windows of its own: a virtual machine's host may still hold what was
read before, which would favour whoever reads it again.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.bare import MADV_RANDOM, BareLoop, resident_pages
from bench.common import in_turn, ratios, spread
from bench.loader_throughput import mixloader, pairs, planned_starts, verify_windows
from bench.tokens import Batches, verify, write_tokens

BASE = "mmap, MADV_RANDOM, bare C++"
THREADS = (1, 8, 16, 32, None)  # None: as many as the loader finds worth having
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, of the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(inside, key=lambda mount: len(mount[0]))[1]


def drop(path: Path) -> None:
    """Out of the page cache. Raises RuntimeError if pages stay (some process has them mapped)."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    if pages := resident_pages(path):
        raise RuntimeError(f"{pages} pages of {path} are still in the page cache")


def numpy_loop(path: Path, starts: np.ndarray, shape: tuple[int, int], random: bool) -> Batches:
    """The best numpy loop, over given windows of a new map of the file."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    if random:
        tokens._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    array = np.asarray(tokens)
    buffer = np.empty((shape[0], shape[1] + 1), dtype=np.int64)
    rows = torch.from_numpy(buffer)
    for begin in range(0, len(starts) - shape[0] + 1, shape[0]):
        for row, start in enumerate(starts[begin : begin + shape[0]].tolist()):
            buffer[row] = array[start : start + shape[1] + 1]
        yield rows[:, :-1], rows[:, 1:]


def rate(batches: Batches, seconds: float) -> float:
    """Tokens a second from the very first batch on, with whatever it takes to get going."""
    tokens, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        x, _ = next(batches)
        tokens += x.numel()
    return tokens / passed


def threads_alive() -> int:
    return len(os.listdir("/proc/self/task"))


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result; prints their table."""
    path, shape = args.folder / "tokens.bin", (args.batch_size, args.seq_len)
    kind = file_system(args.folder)
    if kind in MEMORY_FILE_SYSTEMS:
        raise SystemExit(f"{args.folder} is on {kind}, which is memory; give a folder on a disk with --folder")
    write_tokens(path, args.cold_tokens)
    windows = (args.cold_tokens - 1) // args.seq_len
    seeds = itertools.count(1)
    most_threads: dict[str, int] = {}

    def starts() -> np.ndarray:
        return np.random.default_rng(next(seeds)).permutation(windows) * args.seq_len

    def bare() -> float:
        with BareLoop(path, starts(), shape, "mmap", "two", populate=False, advice=MADV_RANDOM) as loop:
            drop(path)
            return loop.tokens_per_second(args.cold_seconds, chunk=1)

    def numpy(random: bool) -> float:
        batches = numpy_loop(path, starts(), shape, random)
        drop(path)
        return rate(batches, args.cold_seconds)

    def ours(name: str, threads: int | None) -> float:
        before = threads_alive()
        with mixloader(path, shape, "pread", "two", threads, seed=next(seeds)) as loader:
            drop(path)
            value = rate(pairs(loader), args.cold_seconds)
            most_threads[name] = max(most_threads.get(name, 0), threads_alive() - before)
        return value

    measures: dict[str, Callable[[], float]] = {
        BASE: bare,
        "mmap, MADV_RANDOM, numpy": lambda: numpy(True),
        "mmap, numpy": lambda: numpy(False),
    }
    for threads in THREADS:
        name = f"mixloader, {'adaptive' if threads is None else threads} threads"
        measures[name] = lambda name=name, threads=threads: ours(name, threads)
    check(path, planned_starts(args.cold_tokens, args.seq_len, draws=20 * shape[0] + 1), shape)
    results = in_turn(measures, args.rounds)
    rows = [
        {
            "loader": name,
            "threads": most_threads.get(name, 1),
            "mtok_per_s": spread([value / 1e6 for value in values]),
            "times_mmap_random": ratios(values, results[BASE]),
            "file_system": kind,
        }
        for name, values in results.items()
    ]
    print(f"{args.cold_tokens} uint16 tokens on {kind}, B={shape[0]} T={shape[1]}; page cache empty before each one")
    print(f"\n{'loader':32}{'threads':>8}{'Mtok/s':>9}{'(range)':>14}{'x bare mmap':>13}{'(range)':>14}")
    for row in rows:
        speed, ratio = row["mtok_per_s"], row["times_mmap_random"]
        print(
            f"{row['loader']:32}{row['threads']:8}{speed['median']:9.1f}{speed['min']:8.1f}-{speed['max']:<5.1f}"
            f"{ratio['median']:13.2f}{ratio['min']:8.2f}-{ratio['max']:<5.2f}"
        )
    return rows


def check(path: Path, starts: np.ndarray, shape: tuple[int, int]) -> None:
    """Each kind of loop emits the tokens of these windows."""
    verify(numpy_loop(path, starts, shape, random=True), shape)
    with BareLoop(path, starts, shape, "mmap", "two", populate=False, advice=MADV_RANDOM) as loop:
        verify(loop.batches(), shape)
    for threads in THREADS:
        with mixloader(path, shape, "pread", "two", threads) as loader:
            batches = pairs(loader)
            verify_windows(batches, starts, shape[0])
            verify(batches, shape)
