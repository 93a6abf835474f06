"""The losses against others', forward and backward, with and without statistics: `python -m bench.loss`.

On a CPU with few tokens (see `bench.loss_cpu` for a whole batch under two settings of malloc), on a GPU at the sizes of
the design's budgets, which are checked. Bandwidth counts one read of the logits and one write of the gradient, and is
compared with that of a copy in the same run. Outputs are verified against float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from bench import loss_head, loss_plain
from bench.budgets import Budget, table
from bench.common import arguments, write_json

CLASSES = [8192, 50257, 50304, 128256]
HEADS = {50304: (768,), 128256: (768, 4096)}
"""Widths of the hidden states that a fused head is measured with, by vocabulary; on a CPU CPU_WIDTH."""
CPU_WIDTH = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments_given: list[str] | None = None) -> int:
    args = parse(arguments_given)
    device = args.device
    torch.set_num_threads(args.threads)
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    failed: list[Budget] = []

    def budgets() -> list[Budget]:
        return [*failed, *(loss_plain.budgets(rows) if device == "cuda" else [])]

    def save(told: bool = False) -> None:
        more = {"device": device, "threads": args.threads, "heads": heads, "missing": missing}
        more["budgets"] = [budget.to_json() for budget in budgets()]
        write_json(args.json, rows, told=told, **more)

    def tried(name: str, measure: Callable[[], tuple[list[dict[str, Any]], dict[str, str]]]) -> list[dict[str, Any]]:
        """Rows of one size. What is wrong or too late with one costs only its own."""
        if args.seconds is not None and time.monotonic() - begin > args.seconds:
            missing[name] = "no time was left"
            return []
        try:
            found, without = measure()
        except Exception as error:
            failed.append(Budget(f"loss, {name}: failures", 1.0, 0.0, "", note=f"{type(error).__name__}: {error}"))
            return []
        missing.update(without)
        return found

    print(f"{device}, {args.tokens:,} tokens, {args.threads} threads; losses and gradients verified against float64\n")
    title = f"{'V':>8}{'dtype':>10}{'ms':>9}{'(min-max)':>20}{'x torch':>9}"
    print(f"{'cross-entropy, forward and backward':38}{title}{'GB/s':>8}{'of copy':>9}{'peak MB':>9}")
    for n_classes, dtype in product(args.classes, args.dtypes):
        size = (args.tokens, n_classes, DTYPES[dtype], device, args.rounds)
        found = tried(f"V = {n_classes}, {dtype}", partial(loss_plain.measure, *size, compiled=args.compile))
        for row in found:
            rate, share = row["gb_per_s"]["median"], row["share_of_copy"]["median"]
            print(f"{_line(row, 38)}{rate:8.1f}{share:9.2f}{_memory(row)}", flush=True)
        rows += found
        save()
    print(f"\n{'head and cross-entropy':46}{title}{'H':>6}{'peak MB':>9}")
    for n_classes in args.classes:
        for width in HEADS.get(n_classes, ()) if device == "cuda" else (CPU_WIDTH,):
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            size = (args.tokens, width, n_classes, dtype, device, args.rounds)
            found = tried(f"head, V = {n_classes}, H = {width}", partial(loss_head.measure, *size))
            for row in found:
                print(f"{_line(row, 46)}{row['width']:6}{_memory(row)}", flush=True)
            heads += found
            save()
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    if budgets():
        print("\n" + table(budgets()))
    if device == "cpu":
        print("\na batch of 4,096 tokens under two settings of malloc: python -m bench.loss_cpu")
    save(told=True)
    return int(any(budget.met is False for budget in budgets()))


def parse(arguments_given: list[str] | None) -> argparse.Namespace:
    parser = arguments("Cross-entropy, forward and backward.", "loss")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=there)
    parser.add_argument("--tokens", type=int, help="in a batch (default 256 on a CPU, 16384 on a GPU)")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help=f"vocabularies (default {CLASSES})")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", help="of logits (default both on a CPU, else bfloat16)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long")
    args = parser.parse_args(arguments_given)
    if args.tokens is None:
        args.tokens = 256 if args.device == "cpu" else 16384
    if args.dtypes is None:
        args.dtypes = list(DTYPES) if args.device == "cpu" else ["bfloat16"]
    return args


def _line(row: dict[str, Any], width: int) -> str:
    ms = row["ms"]
    between = f"{ms['min']:.2f}-{ms['max']:.2f}"
    speedup = row["speedup"]["median"]
    return f"{row['loss']:{width}}{row['classes']:8}{row['dtype']:>10}{ms['median']:9.2f}{between:>20}{speedup:9.2f}"


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_mb']:9.0f}" if row["peak_mb"] is not None else " " * 9


if __name__ == "__main__":
    sys.exit(main())
