"""Tokens a second from the page cache, and what the caller's thread pays, against two loops.

    python -m bench.loader [--json bench/results/loader.json]

The peers: the loop of nanoGPT's train.py (a memmap opened anew for each batch, random offsets, two
gathers), and the best loop that plain numpy allows (the map kept open as an array, one int64 buffer of
T + 1 columns, offsets as Python ints; its x and y are views, ours are two contiguous tensors). Windows
are random in all of them, and the tokens that each emits are checked before anything is timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import arguments, in_turn, ratios, spread, write_json
from mixloader import MixLoader

MODULUS = 50_021  # token p of the file is p modulo this prime, so that a row shows where it came from
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def nanogpt_loop(path: Path, batch_size: int, seq_len: int) -> Batches:
    while True:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - seq_len, (batch_size,))
        x = torch.stack([torch.from_numpy(tokens[s : s + seq_len].astype(np.int64)) for s in starts])
        y = torch.stack([torch.from_numpy(tokens[s + 1 : s + 1 + seq_len].astype(np.int64)) for s in starts])
        yield x, y


def numpy_loop(path: Path, batch_size: int, seq_len: int) -> Batches:
    tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
    rng = np.random.default_rng(0)
    buffer = np.empty((batch_size, seq_len + 1), dtype=np.int64)
    rows = torch.from_numpy(buffer)
    while True:
        for row, start in enumerate(rng.integers(0, len(tokens) - seq_len, batch_size).tolist()):
            buffer[row] = tokens[start : start + seq_len + 1]
        yield rows[:, :-1], rows[:, 1:]


def mixloader_loop(path: Path, batch_size: int, seq_len: int, num_workers: int) -> Batches:
    with MixLoader({"data": path}, batch_size, seq_len, vocab_size=MODULUS, num_workers=num_workers) as loader:
        for batch in loader:
            yield batch["input_ids"], batch["targets"]


def verify(batches: Batches, shape: tuple[int, int]) -> None:
    starts = set()
    for _ in range(20):
        x, y = next(batches)
        assert x.shape == y.shape == shape
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, (x[:, :1] + torch.arange(shape[1])) % MODULUS), "rows are runs of the file"
        assert torch.equal(y, (x + 1) % MODULUS), "targets are the next tokens"
        starts.update(x[:, 0].tolist())
    assert len(starts) > 0.9 * 20 * shape[0], "windows are random"


def throughput(batches: Batches, tokens_a_batch: int, seconds: float) -> Callable[[], float]:
    """Millions of tokens a second over about `seconds`."""

    def measure() -> float:
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for _ in range(10):
                next(batches)
            count += 10
        return count * tokens_a_batch / (time.perf_counter() - begin) / 1e6

    return measure


def caller_costs(path: Path, batch_size: int, seq_len: int, steps: int, step_seconds: float) -> list[dict[str, Any]]:
    """Microseconds of next(), of set_weights(), and of the next() right after it, between training steps."""
    times: dict[str, list[float]] = {"next()": [], "set_weights()": [], "next() after it": []}
    data = dict.fromkeys("abcdefghijklmnop", path)

    def timed(name: str, call: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        call()
        times[name].append((time.perf_counter() - begin) * 1e6)

    weights = np.random.default_rng(0).dirichlet(np.ones(len(data)), steps)
    with MixLoader(data, batch_size, seq_len, vocab_size=MODULUS) as loader:
        for step in range(steps):
            time.sleep(step_seconds)
            if step % 2:
                timed("set_weights()", lambda step=step: loader.set_weights(weights[step]))
                timed("next() after it", lambda: next(loader))
            else:
                timed("next()", lambda: next(loader))
    return [
        {"call": name, "p50_us": np.percentile(t, 50), "p99_us": np.percentile(t, 99), "max_us": max(t)}
        for name, t in times.items()
    ]


def main() -> None:
    parser = arguments("Loader throughput and latency.", "loader")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="size of the file (default 200 million)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measure (default 0.5)")
    parser.add_argument("--steps", type=int, default=4000, help="for the caller's costs (default 4000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = args.batch_size, args.seq_len
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        (np.arange(args.tokens) % MODULUS).astype(np.uint16).tofile(path)
        path.read_bytes()  # into the page cache
        loops = {
            "nanoGPT get_batch": nanogpt_loop(path, *shape),
            "best numpy loop": numpy_loop(path, *shape),
            "mixloader, in the caller": mixloader_loop(path, *shape, num_workers=0),
            "mixloader, 1 fill thread": mixloader_loop(path, *shape, num_workers=1),
        }
        for batches in loops.values():
            verify(batches, shape)
        print(f"outputs verified; B={shape[0]} T={shape[1]}, {args.tokens} uint16 tokens in the page cache\n")
        measures = {name: throughput(b, shape[0] * shape[1], args.seconds) for name, b in loops.items()}
        results = in_turn(measures, args.rounds)
        rows: list[dict[str, Any]] = [
            {
                "loader": name,
                "mtok_per_s": spread(values),
                "times_nanogpt": ratios(values, results["nanoGPT get_batch"]),
                "times_numpy": ratios(values, results["best numpy loop"]),
            }
            for name, values in results.items()
        ]
        print(f"{'loader':28}{'Mtok/s':>8}{'(min-max)':>16}{'x nanoGPT':>11}{'(min-max)':>14}{'x numpy':>9}")
        for row in rows:
            rate, nano, best = row["mtok_per_s"], row["times_nanogpt"], row["times_numpy"]
            print(
                f"{row['loader']:28}{rate['median']:8.0f}{rate['min']:9.0f}-{rate['max']:<6.0f}"
                f"{nano['median']:11.1f}{nano['min']:8.1f}-{nano['max']:<5.1f}{best['median']:9.2f}"
            )
        costs = caller_costs(path, *shape, args.steps, 0.002)
        print(f"\n{'on the caller, 2 ms steps, 16 domains':38}{'p50 us':>9}{'p99 us':>9}{'max us':>9}")
        for cost in costs:
            print(f"{cost['call']:38}{cost['p50_us']:9.1f}{cost['p99_us']:9.1f}{cost['max_us']:9.1f}")
        write_json(args.json, rows, caller=costs, batch_size=shape[0], seq_len=shape[1], tokens=args.tokens)


if __name__ == "__main__":
    main()
