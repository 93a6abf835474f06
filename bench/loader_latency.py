"""What the caller's thread pays between training steps: next(), set_weights(), and the next() right after it.

A step sleeps, as one does that waits for a GPU, or computes. The last batch is let go when the next one is
there, as in a training loop. Idle, and with a busy process for every core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.loader_throughput import pairs
from bench.tokens import MODULUS, verify, write_tokens
from mixloader import MixLoader

DOMAINS, DEPTH, STEP_SECONDS = 16, 4, 0.002
NEXT, SET, AFTER = "next()", "set_weights()", "next() after it"
BUDGETS_US = {NEXT: (20, 100), SET: (None, 150), AFTER: (None, None)}
"""p50 and p99 on an idle machine; the next() after a change takes one fill more."""


def sleep() -> None:
    time.sleep(STEP_SECONDS)


def compute() -> None:
    """Matrix products, which keep a core and its caches busy."""
    end = time.perf_counter() + STEP_SECONDS
    while time.perf_counter() < end:
        _MATRIX.mm(_MATRIX)


_MATRIX = torch.ones(128, 128)


@contextmanager
def burners(count: int) -> Iterator[None]:
    """`count` processes that do nothing, as fast as they can."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def microseconds(path: Path, args: argparse.Namespace, work: Callable[[], None]) -> dict[str, list[float]]:
    """Of every call over `steps` steps; the mixture changes at every other one."""
    times: dict[str, list[float]] = {NEXT: [], SET: [], AFTER: []}
    names = [f"d{d}" for d in range(DOMAINS)]
    weights = np.random.default_rng(0).dirichlet(np.ones(DOMAINS), args.steps)
    now = time.perf_counter
    with MixLoader(
        dict.fromkeys(names, path),
        args.batch_size,
        args.seq_len,
        vocab_size=MODULUS,
        num_workers=1,
        prefetch_factor=DEPTH,
    ) as loader:
        verify(pairs(loader), (args.batch_size, args.seq_len))
        batch = next(loader)
        for step in range(args.steps):
            work()
            kind = NEXT
            if step % 2:
                begin = now()
                loader.set_weights(weights[step])
                times[SET].append((now() - begin) * 1e6)
                kind = AFTER
            begin = now()
            batch = next(loader)
            times[kind].append((now() - begin) * 1e6)
        del batch
    return times


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result; prints their table."""
    path = args.folder / "tokens.bin"
    write_tokens(path, args.tokens)
    path.read_bytes()
    rows = []
    print(f"{args.steps} steps of {STEP_SECONDS * 1e3:.0f} ms, {DOMAINS} domains, depth {DEPTH}, 1 fill thread")
    print(f"\n{'machine':10}{'step':10}{'call':18}{'p50 us':>9}{'p99 us':>9}{'max us':>10}   budget (idle)")
    for load in (0, os.cpu_count() or 1):
        for step, work in (("sleeps", sleep), ("computes", compute)):
            with burners(load):
                times = microseconds(path, args, work)
            for call, values in times.items():
                p50, p99 = np.percentile(values, (50, 99)).tolist()
                row = {"burners": load, "step": step, "call": call, "p50_us": p50, "p99_us": p99, "max_us": max(values)}
                rows.append(row)
                budget = " ".join(
                    f"{name} <= {limit}" for name, limit in zip(("p50", "p99"), BUDGETS_US[call], strict=True) if limit
                )
                machine = "loaded" if load else "idle"
                print(
                    f"{machine:10}{step:10}{call:18}{p50:9.1f}{p99:9.1f}{max(values):10.1f}   {'' if load else budget}"
                )
    return rows
