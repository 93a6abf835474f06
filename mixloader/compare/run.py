"""`python -m mixloader compare SUITE --out DIR`: run, then print the table and draw the picture."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from mixloader.compare.picture import draw
from mixloader.compare.runner import compare
from mixloader.compare.suite import Suite
from mixloader.compare.table import table
from mixloader.errors import MixLoaderError
from mixloader.files import replace, sole_user


def main(argv: Sequence[str] | None = None) -> int:
    """Compare policies on the same data, tokens and seeds. Stopped, the same command goes on with what is missing."""
    parser = argparse.ArgumentParser(prog="python -m mixloader compare", description=main.__doc__)
    parser.add_argument("suite", type=Path, help="what is compared: a YAML or JSON file (docs/compare.md)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for all it writes")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"runs at a time, one core each (default {cores})")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="processes here, or Ray")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar, also on a terminal")
    parser.add_argument("--against", metavar="POLICY", help="that the others are compared with (default: the suite's)")
    args = parser.parse_args(argv)
    suite = Suite.load(args.suite)
    if args.against is not None:
        suite = dataclasses.replace(suite, against=args.against)
    with sole_user(args.out, "comparison"):
        comparison = compare(
            suite, args.out, workers=args.workers, engine=args.engine, progress=False if args.no_progress else None
        )
        text = table(comparison)
        replace(args.out / "table.md", text)
        print(text)
        print(f"table    {args.out / 'table.md'}")
        print(f"results  {args.out / 'results.json'}")
        try:
            print(f"picture  {draw(comparison, args.out / 'compare.png')}")
        except MixLoaderError as error:
            print(f"picture  not drawn: {error}")
        print(f"records  {args.out}/runs/*/record.jsonl")
    failed = comparison.failures()
    if failed:
        print(f"{len(failed)} of {len(comparison.rows)} runs failed, see †; the same command tries them again")
    return 1 if failed else 0
