"""Tokens a second from the page cache: every loader on one set of tokens, verified, then measured in turn."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.bare import OUTPUTS, BareLoop
from bench.common import in_turn, ratios, spread
from bench.tokens import MODULUS, Batches, tokens_per_second, verify, write_tokens
from mixloader import MixLoader, _core
from mixloader.reference import domain_key

DOMAIN = "data"
NANOGPT, NUMPY = "nanoGPT get_batch", "best numpy loop"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "two": {},
    "views": {"contiguous": False},
    "mixed": {"dtype": torch.int32},
    "raw": {"dtype": torch.uint16, "target_dtype": torch.uint16, "contiguous": False},
}
"""What MixLoader is asked for, by the name of the output in bench.bare."""
PEERS = (
    ("torch DataLoader, map-style", "torch-map"),
    ("torch DataLoader, whole batches", "torch"),
    ("torchdata StatefulDataLoader, whole batches", "torchdata"),
    ("litData TokensLoader", "litdata"),
    ("mosaicml-streaming MDS", "mosaic"),
    ("Megatron GPTDataset", "megatron"),
)


def nanogpt_loop(path: Path, batch_size: int, seq_len: int) -> Batches:
    """get_batch of nanoGPT's train.py: a memmap opened anew for each batch, random offsets, two gathers."""
    while True:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - seq_len, (batch_size,))
        x = torch.stack([torch.from_numpy(tokens[s : s + seq_len].astype(np.int64)) for s in starts])
        y = torch.stack([torch.from_numpy(tokens[s + 1 : s + 1 + seq_len].astype(np.int64)) for s in starts])
        yield x, y


def numpy_loop(path: Path, batch_size: int, seq_len: int) -> Batches:
    """The best loop that plain numpy allows: the map kept open as an array, one buffer for ever, Python ints."""
    tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
    rng = np.random.default_rng(0)
    buffer = np.empty((batch_size, seq_len + 1), dtype=np.int64)
    rows = torch.from_numpy(buffer)
    while True:
        for row, start in enumerate(rng.integers(0, len(tokens) - seq_len, batch_size).tolist()):
            buffer[row] = tokens[start : start + seq_len + 1]
        yield rows[:, :-1], rows[:, 1:]


def planned_starts(tokens: int, seq_len: int, draws: int) -> np.ndarray:
    """int64 [draws]: where the windows that MixLoader draws first, with seed 0, begin; at most an epoch."""
    windows = (tokens - 1) // seq_len
    key = domain_key(DOMAIN)
    return np.array([_core.permute(0, key, 0, windows, draw) for draw in range(min(draws, windows))]) * seq_len


def pairs(loader: MixLoader) -> Batches:
    for batch in loader:
        yield batch["input_ids"], batch["targets"]


def verify_windows(batches: Batches, starts: np.ndarray, batch_size: int) -> None:
    """The loader reads the very windows that the bare loop is given (in a batch, in any order)."""
    for begin in range(0, 20 * batch_size, batch_size):
        x, _ = next(batches)
        expected = sorted(starts[begin : begin + batch_size] % MODULUS)
        assert sorted(x[:, 0].to(torch.int64).tolist()) == expected, "windows are not those of the plan"


class Peer:
    """A loader of bench.peers in its process. Raises RuntimeError with what it wrote if it ends."""

    def __init__(self, python: Path, name: str, args: argparse.Namespace, workers: int):
        self.name = f"{name}, {workers} workers"
        self.log = args.folder / f"{name}-{workers}.log"
        command = [
            python, "-m", "bench.peers", name, "--tokens", args.folder / "tokens.bin", "--folder", args.folder,
            "--workers", workers, "--batch-size", args.batch_size, "--seq-len", args.seq_len,
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.versions = json.loads(self._answer().removeprefix("ready "))
        self._signal(signal.SIGSTOP)

    def ask(self, command: str) -> str:
        """The answer to a command. Until the next one all of the peer's processes stand still: some poll."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        print(command, file=self.process.stdin, flush=True)
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.name} ended; its last words:\n{self.log.read_text()[-2000:]}")
        return line

    def verify(self) -> None:
        answer = self.ask("verify")
        if answer != "ok":
            raise AssertionError(f"{self.name}: {answer}")

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self.process.communicate("quit\n")


@contextmanager
def loaders(args: argparse.Namespace) -> Iterator[tuple[dict[str, Callable[[], float]], list[dict[str, Any]]]]:
    """All that is measured, verified: {name: tokens a second} and what each row says of itself, in one order."""
    path, shape = args.folder / "tokens.bin", (args.batch_size, args.seq_len)
    write_tokens(path, args.tokens)
    path.read_bytes()  # into the page cache
    starts = planned_starts(args.tokens, args.seq_len, draws=args.tokens)
    measures: dict[str, Callable[[], float]] = {}
    rows: list[dict[str, Any]] = []

    def add(measure: Callable[[], float], loader: str, **facts: Any) -> None:
        facts = {"loader": loader, "io": None, "output": "views", "threads": None, "workers": None, **facts}
        name = " ".join(str(facts[key]) for key in ("loader", "io", "output", "threads", "workers"))
        measures[name] = measure
        rows.append({"name": name, **facts})

    with ExitStack() as stack:
        for label, batches, output in (
            (NANOGPT, nanogpt_loop(path, *shape), "two"),
            (NUMPY, numpy_loop(path, *shape), "views"),
        ):
            verify(batches, shape)
            add(lambda batches=batches: tokens_per_second(batches, args.seconds), label, output=output)
        for io in args.io:
            for output in args.outputs:
                bare = stack.enter_context(BareLoop(path, starts, shape, io, output))
                verify(bare.batches(), shape)
                add(lambda bare=bare: bare.tokens_per_second(args.seconds), "bare C++", io=io, output=output)
            # The same memory again and again stays in a near cache; a loader's batches may be kept, and do not.
            many = stack.enter_context(BareLoop(path, starts, shape, io, "two", buffers=6))
            add(lambda many=many: many.tokens_per_second(args.seconds), "bare C++, 6 buffers", io=io, output="two")
            for output in args.outputs:
                for threads in (0, 1):
                    batches = pairs(stack.enter_context(mixloader(path, shape, io, output, threads)))
                    verify_windows(batches, starts, shape[0])
                    verify(batches, shape)
                    add(
                        lambda batches=batches: tokens_per_second(batches, args.seconds),
                        "mixloader", io=io, output=output, threads=threads,
                    )  # fmt: skip
        for label, name in PEERS if args.peers_python.exists() else ():
            for workers in (0, 2):
                print(f"preparing {label}, {workers} workers ...", file=sys.stderr, flush=True)
                peer = Peer(args.peers_python, name, args, workers)
                stack.callback(peer.close)
                peer.verify()
                add(
                    lambda peer=peer: float(peer.ask(f"measure {args.seconds}")),
                    label, output="two" if name == "megatron" else "views", workers=workers, versions=peer.versions,
                )  # fmt: skip
        yield measures, rows


def mixloader(
    path: Path, shape: tuple[int, int], io: str, output: str, threads: int | None, seed: int = 0
) -> MixLoader:
    how = ARGUMENTS[output] | ({} if io == "pread" else {"io": io}) | ({"prefetch_factor": 4} if threads else {})
    return MixLoader({DOMAIN: path}, *shape, seed=seed, vocab_size=MODULUS, num_workers=threads, **how)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result; prints their table."""
    if not args.peers_python.exists():
        print(f"{args.peers_python} does not exist, so other packages are left out; `make peers` makes it\n")
    with loaders(args) as (measures, rows):
        begin = time.perf_counter()
        results = in_turn(measures, args.rounds)
        print(
            f"outputs verified, then {args.rounds} rounds in {time.perf_counter() - begin:.0f} s; B={args.batch_size} "
            f"T={args.seq_len}, {args.tokens} uint16 tokens in the page cache"
        )
    by_label = {row["loader"]: row["name"] for row in rows}
    bare = {(row["io"], row["output"]): row["name"] for row in rows if row["loader"] == "bare C++"}
    for row in rows:
        values = results[row.pop("name")]
        row["mtok_per_s"] = spread([value / 1e6 for value in values])
        row["times_nanogpt"] = ratios(values, results[by_label[NANOGPT]])
        row["times_numpy"] = ratios(values, results[by_label[NUMPY]])
        if (row["io"], row["output"]) in bare:
            row["times_bare"] = ratios(values, results[bare[row["io"], row["output"]]])
    print_table(rows)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"outputs: {', '.join(OUTPUTS)} (see bench/bare.py); x: median (range) of the ratios round by round")
    columns = ("times_bare", "times_numpy", "times_nanogpt")
    head = "".join(f"{'x ' + column.removeprefix('times_'):>22}" for column in columns)
    print(f"\n{'loader':46}{'io':6}{'output':7}{'Mtok/s':>7}{'(range)':>13}{head}")
    for row in rows:
        helpers = [f"{row[kind]} {kind}" for kind in ("threads", "workers") if row[kind] is not None]
        rate = row["mtok_per_s"]
        cells = "".join(
            f"{row[c]['median']:9.2f} ({row[c]['min']:.2f}-{row[c]['max']:.2f})".rjust(22) if c in row else " " * 22
            for c in columns
        )
        name, rates = ", ".join([row["loader"], *helpers]), f"({rate['min']:.0f}-{rate['max']:.0f})"
        print(f"{name:46.46}{row['io'] or '':6}{row['output']:7}{rate['median']:7.0f}{rates:>13}{cells}")
