"""The loader against others, in five sections, or those that are named.

    python -m bench.loader [--only throughput,cold,latency,scale,company] [--json bench/results/loader.json]

throughput  tokens a second from the page cache, every loader against the bare C++ loop of its kind
cold        the same from a disk, with an empty page cache
latency     what next() and set_weights() cost the caller between training steps
scale       10,000 shards, 10^12 tokens, 4,096 domains: start-up, memory, plans, resume
company     which domains meet in a batch, and how far counts drift from quotas

`make peers` installs the other packages. Each section checks what it measures before it measures it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import loader_cold, loader_company, loader_latency, loader_scale, loader_throughput
from bench.bare import OUTPUTS
from bench.common import arguments, write_json

SECTIONS = {
    "throughput": loader_throughput.run,
    "cold": loader_cold.run,
    "latency": loader_latency.run,
    "scale": loader_scale.run,
    "company": loader_company.run,
}


def names(known: Any) -> Any:
    """An argparse type: names of `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        unknown = sorted(set(text.split(",")) - set(known))
        if unknown:
            raise ValueError(f"unknown name {unknown[0]!r}; known are {', '.join(known)}")
        return text.split(",")

    return parse


def main() -> None:
    parser = arguments("The loader against others.", "loader")
    parser.add_argument("--only", type=names(SECTIONS), default=list(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--folder", type=Path, help="where files are written; a disk, for the section cold")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measure of throughput (default 0.5)")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in the page cache (default 200 million)")
    parser.add_argument("--io", type=names(("pread", "mmap")), default=["pread", "mmap"])
    parser.add_argument("--outputs", type=names(OUTPUTS), default=list(OUTPUTS))
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="see `make peers`")
    parser.add_argument("--cold-tokens", type=int, default=2_000_000_000, help="on the disk (default 2 billion)")
    parser.add_argument("--cold-seconds", type=float, default=2.0, help="of each measure from the disk (default 2)")
    parser.add_argument("--steps", type=int, default=20_000, help="of each measure of latency (default 20,000)")
    parser.add_argument("--company-steps", type=int, default=10_000, help="over which drift is taken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for section in args.only:
        print(f"\n== {section}\n", flush=True)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            options = {**vars(args), "folder": Path(folder)}
            rows += [{"section": section, **row} for row in SECTIONS[section](type(args)(**options))]
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "folder", "peers_python")}
    write_json(args.json, rows, settings=settings)


if __name__ == "__main__":
    main()
