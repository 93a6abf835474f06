"""A million batches with a new mixture at every step: the stream equals the specification's, and memory stays flat.

    python -m bench.soak [--steps 1000000] [--folder runs/soak] [--json bench/results/soak.json]

Two processes run side by side: MixLoader, and mixloader/reference.py with a plain array in place of the shards.
Each hashes the rows that it draws, block by block; the hashes must agree. Both save where they are after every
block, so that the same command goes on after it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import write_json
from bench.loader_scale import memory_mb
from bench.tokens import MODULUS
from mixloader import MixLoader
from mixloader.files import replace
from mixloader.mixture import quantize
from mixloader.reference import ReferenceStream

BLOCK = 1000
"""Steps between two hashes."""
SETTLED, GROWTH_MB = 0.1, 8.0
"""Memory is flat if after this part of the steps it never exceeds what it was there by more than this."""


def names(args: argparse.Namespace) -> list[str]:
    return [f"d{d}" for d in range(args.domains)]


def shard_tokens(args: argparse.Namespace, domain: int) -> list[np.ndarray]:
    """uint16: the shards of a domain, of different lengths, so that epochs end at different steps."""
    counts = [args.seq_len * (300 + 70 * domain) + 5, args.seq_len * 41 + 1]
    return [
        ((np.arange(count) * (domain + 3) + 1000 * shard) % MODULUS).astype(np.uint16)
        for shard, count in enumerate(counts)
    ]


def mixture(args: argparse.Namespace, block: int) -> np.ndarray:
    """int64 [BLOCK, D]: the units of each step of a block, pure in the block; some domains get nothing."""
    rng = np.random.default_rng((args.seed, block))
    weights = rng.dirichlet(np.full(args.domains, 0.5), BLOCK)
    weights[:, 0] += 1e-3  # so that no step is without weights
    weights[:, 1:][rng.random((BLOCK, args.domains - 1)) < 0.2] = 0
    return np.array([quantize(row) for row in weights])


def ours(args: argparse.Namespace, state: Any) -> Iterator[tuple[bytes, Any]]:
    """For each step the bytes of its batch, and what to go on from after it."""
    folder = args.folder / "shards"
    folder.mkdir(exist_ok=True)
    data: dict[str, list[Path]] = {}
    for domain, name in enumerate(names(args)):
        data[name] = [folder / f"{name}_{shard}.bin" for shard in range(2)]
        for path, tokens in zip(data[name], shard_tokens(args, domain), strict=True):
            tokens.tofile(path)
    with MixLoader(
        data, args.batch_size, args.seq_len, seed=args.seed, vocab_size=MODULUS, num_workers=1, prefetch_factor=4
    ) as loader:
        if state is not None:
            loader.load_state_dict(state)
        while True:
            if loader.step % BLOCK == 0:
                units = mixture(args, loader.step // BLOCK)
            loader.set_weights(units[loader.step % BLOCK])
            batch = next(loader)
            yield (
                batch["domain_ids"].numpy().tobytes()
                + batch["input_ids"].numpy().tobytes()
                + batch["targets"].numpy().tobytes(),
                loader.state_dict,
            )


def specified(args: argparse.Namespace, state: Any) -> Iterator[tuple[bytes, Any]]:
    """The same of the specification."""
    length = args.seq_len
    windows: list[np.ndarray] = []
    for domain in range(args.domains):
        parts = [
            np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
            for tokens in shard_tokens(args, domain)
        ]
        windows.append(np.concatenate(parts).astype(np.int64))
    stream = ReferenceStream(args.seed, names(args), [len(w) for w in windows], args.batch_size, {})
    if state is not None:
        stream.step, stream.cursors, stream.residuals = state["step"], state["cursors"], state["residuals"]

    def position() -> dict[str, Any]:
        return {"step": stream.step, "cursors": stream.cursors, "residuals": stream.residuals}

    while True:
        if stream.step % BLOCK == 0:
            units = mixture(args, stream.step // BLOCK).tolist()
        stream.weights = {stream.step: units[stream.step % BLOCK]}
        rows = stream.next_step()
        tokens = np.stack([windows[row.domain][row.window] for row in rows])
        domains = np.array([row.domain for row in rows], dtype=np.int64)
        yield domains.tobytes() + tokens[:, :-1].tobytes() + tokens[:, 1:].tobytes(), position


SIDES: dict[str, Callable[[argparse.Namespace, Any], Iterator[tuple[bytes, Any]]]] = {
    "mixloader": ours,
    "reference": specified,
}


def run_side(side: str, args: argparse.Namespace) -> None:
    """Go on from the last block saved to the last of all; each block's progress is whole or not there."""
    path = args.folder / f"{side}.json"
    settings = {key: getattr(args, key) for key in ("domains", "batch_size", "seq_len", "seed")}
    progress: dict[str, Any] = {"settings": settings, "state": None, "digests": [], "memory_mb": [], "seconds": 0.0}
    if path.exists():
        progress = json.loads(path.read_text())
        if progress["settings"] != settings:
            raise SystemExit(f"{path} is of a soak with {progress['settings']}; remove it or give another --folder")
    stream = SIDES[side](args, progress["state"])
    while len(progress["digests"]) < args.steps // BLOCK:
        begin, digest = time.perf_counter(), hashlib.sha256()
        for _ in range(BLOCK):
            content, state = next(stream)
            digest.update(content)
        progress["digests"].append(digest.hexdigest()[:16])
        progress["memory_mb"].append(round(memory_mb("VmRSS"), 2))
        progress["seconds"] += time.perf_counter() - begin
        progress["state"] = state()
        replace(path, json.dumps(progress))


def summary(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the two sides. Raises SystemExit where they differ, naming the first block that does."""
    sides = {side: json.loads((args.folder / f"{side}.json").read_text()) for side in SIDES}
    blocks = args.steps // BLOCK
    digests = {side: progress["digests"][:blocks] for side, progress in sides.items()}
    for block, (own, specified_one) in enumerate(zip(digests["mixloader"], digests["reference"], strict=True)):
        if own != specified_one:
            raise SystemExit(f"the streams differ between steps {block * BLOCK} and {(block + 1) * BLOCK}")
    memory = sides["mixloader"]["memory_mb"][:blocks]
    settled = memory[int(SETTLED * blocks)]
    grown = max(memory[int(SETTLED * blocks) :]) - settled
    return {
        "batches": blocks * BLOCK,
        "weight_changes": blocks * BLOCK,
        "stream_hash": hashlib.sha256("".join(digests["mixloader"]).encode()).hexdigest(),
        "equals_reference": True,
        "memory_settled_mb": settled,
        "memory_last_mb": memory[-1],
        "memory_growth_mb": round(grown, 2),
        "memory_flat": grown <= GROWTH_MB,
        "seconds": {side: round(progress["seconds"]) for side, progress in sides.items()},
        "settings": sides["mixloader"]["settings"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="A million batches, and what they were.")
    parser.add_argument("--steps", type=int, default=1_000_000, help=f"a multiple of {BLOCK} (default 10^6)")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="progress and data (default runs/soak)")
    parser.add_argument("--domains", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the summary, hardware and versions to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < BLOCK or args.steps % BLOCK:
        parser.error(f"--steps is {args.steps}; expected a multiple of {BLOCK}")
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.side:
        run_side(args.side, args)
        return
    children = [subprocess.Popen([sys.executable, "-m", "bench.soak", *sys.argv[1:], "--side", side]) for side in SIDES]
    if sum(child.wait() != 0 for child in children):
        raise SystemExit("a side failed, and its error is above; the same command goes on from its last block")
    result = summary(args)
    for key, value in result.items():
        print(f"{key:20}{value}")
    write_json(args.json, [result])
    if not result["memory_flat"]:
        raise SystemExit(f"memory grew by {result['memory_growth_mb']} MB; at most {GROWTH_MB} were expected")


if __name__ == "__main__":
    main()
