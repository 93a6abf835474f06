"""Whole training steps: what mixing adds to them, and how long they wait for data, ours and others'.

    python -m bench.end_to_end [--device cuda] [--json bench/results/end_to_end.json]

mixing   a step with the agent (loss with statistics of 16 domains, a decision a step, a record) against one with mixing
         off (the same loss without statistics, weights that stay), in blocks of steps that alternate
loaders  the same trainer fed by mixloader, by torch's DataLoader over a memory map and by mosaicml-streaming (after
         `make peers`), each in its process, one at a time, the others standing still

Each loader is verified before it is timed. Rows are medians and ranges over rounds; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import arguments, ratios, spread, write_json
from bench.gpu_training import interval
from bench.loader_throughput import Peer, pairs
from bench.plain_trainer import SIZES, Loss, PlainTrainer, cross_entropy
from bench.tokens import verify, write_tokens
from mixloader import MixLoader
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer

DOMAINS = 16
BLOCK = 5
"""Steps of one side before the other's turn: few, as machines drift, but what the policy does meanwhile is its own."""
PEERS = (("torch DataLoader, map-style", "torch-map"), ("torch DataLoader, whole batches", "torch"))
MOSAIC = ("mosaicml-streaming MDS", "mosaic")


def open_loader(args: argparse.Namespace, **options: Any) -> MixLoader:
    """16 domains, which are the one file of all loaders."""
    path = args.folder / "tokens.bin"
    data = {
        f"domain-{d:02d}": {"path": path, "field": ("source", "target")[d % 2], "dtype": "uint16"}
        for d in range(DOMAINS)
    }
    pinned = {"pin_memory": args.device == "cuda"}
    return MixLoader(data, args.batch_size, args.seq_len, **pinned | options)


def triples(loader: MixLoader) -> Iterator[Any]:
    for batch in loader:
        yield batch["input_ids"], batch["targets"], batch["domain_ids"]


def mixing(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both sides train one model, in blocks; which one begins alternates."""
    trainer = PlainTrainer(args.device)
    with ExitStack() as stack:
        loader = stack.enter_context(open_loader(args))
        mixer = stack.enter_context(
            Mixer(loader, "agent", token_budget=10**9, device=args.device, record=args.folder / "record.jsonl")
        )
        fixed = stack.enter_context(open_loader(args, weights=[1.0] * DOMAINS))

        def counted(domain_ids: torch.Tensor) -> Loss:
            return partial(domain_cross_entropy, domain_ids=domain_ids.to(args.device), stats=mixer.stats)

        on: Callable[[], dict[str, float]] = partial(trainer.run, triples(loader), BLOCK, counted, mixer.step)
        off = partial(trainer.run, triples(fixed), BLOCK, lambda _: domain_cross_entropy)
        on(), off()  # compiles, fills queues
        mixer.waits = 0
        found: dict[str, list[dict[str, float]]] = {"mixing": [], "mixing off": []}
        for number in range(args.rounds * -(-args.steps // BLOCK)):
            sides = (("mixing", on), ("mixing off", off))
            for name, run in sides if number % 2 == 0 else reversed(sides):
                found[name].append(run())
        waits = mixer.waits
    ms = {name: [values["ms"] for values in runs] for name, runs in found.items()}
    over, low, high = interval(*(np.array(ms[name]) for name in found))
    busy = interval(*(np.array([run["cpu_ms"] for run in runs]) for runs in found.values()))
    rows = [
        {"side": side, **summary(runs), "ratio": ratios(ms[side], ms["mixing off"])} for side, runs in found.items()
    ]
    rows[0] |= {"overhead_percent": over, "interval_95_percent": [low, high], "decisions_waited_for": waits}
    rows[0] |= {"processor_overhead_percent": busy[0], "processor_interval_95_percent": list(busy[1:])}
    show(rows, "side", "mixing off")
    interval_text = f"95 % interval [{low:.2f}, {high:.2f}]"
    print(f"mixing costs {over:.2f} % of a step, {interval_text}; mixer.step() {shown(rows[0]['after_ms'], 1, 2)} ms")
    print(f"in processor time {busy[0]:.2f} %, 95 % interval [{busy[1]:.2f}, {busy[2]:.2f}]")
    print(f"{waits} decisions of {len(ms['mixing']) * BLOCK} were waited for")
    return rows


def loaders(args: argparse.Namespace) -> list[dict[str, Any]]:
    trainer, shape = PlainTrainer(args.device), (args.batch_size, args.seq_len)
    known = [(title, name, sys.executable) for title, name in PEERS]
    if args.peers_python.exists():
        known.append((*MOSAIC, str(args.peers_python)))
    else:
        print(f"{args.peers_python} is not there, so mosaicml-streaming is left out; see `make peers`")
    with ExitStack() as stack:
        loader = stack.enter_context(open_loader(args, weights=[1.0] * DOMAINS))
        verify(pairs(loader), shape)
        batches = ((x, y, None) for x, y in pairs(loader))
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "mixloader": partial(trainer.run, batches, args.steps, lambda _: cross_entropy)
        }
        versions: dict[str, Any] = {}
        for title, name, python in known:
            for workers in args.workers:
                peer = Peer(Path(python), name, args, workers)
                stack.callback(peer.close)
                peer.verify()
                versions |= peer.versions
                command = f"train {args.device} {args.steps}"
                runs[f"{title}, {workers} workers"] = lambda peer=peer, command=command: json.loads(peer.ask(command))
        for run in runs.values():
            run()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for number in range(args.rounds):
            first = number % len(runs)  # so that none is always measured after the same one
            for name in [*runs, *runs][first : first + len(runs)]:
                found[name].append(runs[name]())
    ms = {name: [values["ms"] for values in results] for name, results in found.items()}
    rows = [
        {"loader": name, **summary(runs), "ratio": ratios(ms[name], ms["mixloader"])} for name, runs in found.items()
    ]
    show(rows, "loader", "mixloader")
    return [*rows, {"loader": "versions", **versions}]


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {key: spread([run[key] for run in runs]) for key in runs[0]}


def show(rows: list[dict[str, Any]], key: str, base: str) -> None:
    print(f"{key:44}{'ms a step':>24}{'processor ms':>24}{'waits, % of time':>20}{f'x {base}':>24}")
    for row in rows:
        cells = [shown(row["ms"], 1, 1), shown(row["cpu_ms"], 1, 1)]
        cells += [shown(row["wait_share"], 100, 2), shown(row["ratio"], 1, 3)]
        print(f"{row[key]:44}{cells[0]:>24}{cells[1]:>24}{cells[2]:>20}{cells[3]:>24}")


def shown(values: dict[str, float], scale: float, digits: int) -> str:
    median, low, high = (f"{values[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}..{high})"


SECTIONS = {"mixing": mixing, "loaders": loaders}


def main() -> None:
    parser = arguments("Whole training steps.", "end_to_end")
    parser.add_argument("--only", choices=SECTIONS, help="one of the two sections")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="of each measure (default 20)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the other loaders (default 0 2)")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="in the file (default 20 million)")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="see `make peers`")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    sizes = SIZES[args.device]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder, args.batch_size, args.seq_len = Path(folder), sizes.rows, sizes.seq_len
        write_tokens(args.folder / "tokens.bin", args.tokens)
        for name, section in SECTIONS.items():
            if args.only in (None, name):
                print(f"\n== {name}\n", flush=True)
                rows += [{"section": name, **row} for row in section(args)]
    write_json(args.json, rows, device=args.device, steps=args.steps, sizes=vars(sizes))


if __name__ == "__main__":
    main()
