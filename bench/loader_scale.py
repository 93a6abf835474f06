"""Ten thousand shards, 10^12 tokens, 4,096 domains, on sparse files: start-up, memory, plans, resume.

`python -m bench.loader_scale MANIFEST` is one start-up, in a process that has only imported what it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import in_turn, spread
from bench.tokens import MODULUS, write_tokens
from mixloader import MixLoader, _core
from mixloader.manifest import Manifest
from mixloader.mixture import WEIGHT_ONE, quantize
from mixloader.reference import ReferenceStream, domain_key

SHARDS, DOMAINS, TOKENS_A_SHARD = 10_000, 4_096, 100_000_000
RESUME_STEP = 10**6
BUDGETS = {"first_batch_s": 0.3, "resident_mb": 200, "state_bytes": 2048}
CURVES: dict[str, Sequence[int]] = {
    "domains": (2, 16, 64, 256, 1024, 4096),
    "shards": (1, 10, 100, 1_000, 10_000),
    "shards, in blocks of 16": (1, 10, 100, 1_000, 10_000),
    "ranks": (1, 8, 64, 512, 4096),
    "batch size": (1, 8, 32, 128, 512, 4096),
}


def planner(
    domains: int, rows: int, *, shards: int = 1, shuffle_shards: int = 0, units: np.ndarray | None = None, **rules: Any
) -> Any:
    """A plan over domains d0, d1, ... of as many windows as there are in 10^12 tokens, with random weights."""
    names = [f"d{d}" for d in range(domains)]
    windows = SHARDS * TOKENS_A_SHARD // 1024 // domains // shards
    if units is None:
        units = quantize(np.random.default_rng(0).dirichlet(np.ones(domains)))
    return _core.Planner(
        seed=0, keys=[domain_key(name) for name in names], windows=[[windows] * shards] * domains, rows=rows,
        units=units, shuffle_shards=shuffle_shards, **rules,
    )  # fmt: skip


def verify_planner(domains: int, rows: int) -> None:
    """The core's plan is that of the specification."""
    units = quantize(np.random.default_rng(0).dirichlet(np.ones(domains)))
    windows = SHARDS * TOKENS_A_SHARD // 1024 // domains
    reference = ReferenceStream(
        0, [f"d{d}" for d in range(domains)], [windows] * domains, rows, {0: [int(unit) for unit in units]}
    )
    drawn, _, places = planner(domains, rows).plan(5)
    for step in range(5):
        expected = [(row.domain, row.window) for row in reference.next_step()]
        assert list(zip(drawn[step].tolist(), places[step].tolist(), strict=True)) == expected, "the plan is another"


def plan_cost(curve: str, size: int) -> Callable[[], float]:
    """Microseconds of one step: its plan and the window of each row.

    Ranks: of the plan alone, 32 rows for each of them, which every rank makes; it then needs the windows of its own
    rows.
    """
    sizes = {"domains": 16, "batch size": 32} | {curve: size}
    if curve == "ranks":
        plan = planner(16, 32 * size)
        steps, call = max(2, 200_000 // (32 * size)), plan.skip
    else:
        shards = size if curve.startswith("shards") else 1
        plan = planner(
            1 if shards > 1 else sizes["domains"],
            sizes["batch size"],
            shards=shards,
            shuffle_shards=16 if "blocks" in curve else 0,
        )
        steps, call = max(10, 200_000 // max(sizes["domains"], sizes["batch size"])), plan.plan
    call(2)

    def measure() -> float:
        begin = time.perf_counter()
        call(steps)
        return (time.perf_counter() - begin) / steps * 1e6

    return measure


def sparse_manifest(folder: Path) -> Path:
    """Shards that are holes of 200 MB, dealt to the domains in turn; token 0 everywhere."""
    paths: list[list[Path]] = [[] for _ in range(DOMAINS)]
    for shard in range(SHARDS):
        path = folder / f"shard{shard:05d}.bin"
        path.touch()
        os.truncate(path, 2 * TOKENS_A_SHARD)
        paths[shard % DOMAINS].append(path)
    manifest = Manifest.open({f"d{d}": shards for d, shards in enumerate(paths)})
    manifest.save(folder / "manifest.json")
    return folder / "manifest.json"


def memory_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def start_up(manifest: Path) -> dict[str, float]:
    """Seconds and resident megabytes from here, where all is imported, to the first batch."""
    before, begin = memory_mb("VmRSS"), time.perf_counter()
    opened = Manifest.open(manifest)
    manifest_seconds = time.perf_counter() - begin
    with MixLoader(opened, 32, 1024, num_workers=1) as loader:
        made_seconds = time.perf_counter() - begin
        batch = next(loader)
        first_batch = time.perf_counter() - begin
        assert batch["input_ids"].shape == (32, 1024)
        assert not batch["input_ids"].any(), "holes are zeros"
        return {
            "manifest_s": manifest_seconds,
            "loader_s": made_seconds - manifest_seconds,
            "first_batch_s": first_batch,
            "resident_mb": memory_mb("VmRSS") - before,
            "peak_mb": memory_mb("VmHWM") - before,
        }


def start_ups(args: argparse.Namespace) -> dict[str, Any]:
    """Medians and ranges over rounds, each in a new process."""
    manifest = sparse_manifest(args.folder)
    command = [sys.executable, "-m", "bench.loader_scale", str(manifest)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(args.rounds)]
    return {key: spread([run[key] for run in runs]) for key in runs[0]}


def resume(args: argparse.Namespace) -> dict[str, Any]:
    """A state of step 10^6 at 16 domains: its size, and the time to the first batch from it, which is verified."""
    path = args.folder / "tokens.bin"
    write_tokens(path, 10_000_000)
    data = {f"domain_{d:02d}": path for d in range(16)}
    weights = np.random.default_rng(0).dirichlet(np.ones(16))

    def make() -> MixLoader:
        return MixLoader(data, 32, 1024, weights=weights, vocab_size=MODULUS, num_workers=1)

    with make() as loader:
        loader.skip(RESUME_STEP)
        state = json.dumps(loader.state_dict())
        expected = next(loader)
    seconds = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        with make() as loader:
            loader.load_state_dict(json.loads(state))
            batch = next(loader)
            seconds.append(time.perf_counter() - begin)
        assert batch["step"] == RESUME_STEP
        assert batch["input_ids"].equal(expected["input_ids"]), "the resumed stream is another"
    return {"state_bytes": len(state), "resume_s": spread(seconds)}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result; prints their tables."""
    assert WEIGHT_ONE % DOMAINS == 0
    started = start_ups(args)
    rows: list[dict[str, Any]] = [{"what": "start-up", **started}]
    print(f"{SHARDS} shards, {SHARDS * TOKENS_A_SHARD:.0e} tokens, {DOMAINS} domains, beyond the imports:")
    for key, value in started.items():
        budget = f"   budget {BUDGETS[key]}" if key in BUDGETS else ""
        print(f"  {key:16}{value['median']:9.3f} ({value['min']:.3f}-{value['max']:.3f}){budget}")
    resumed = resume(args)
    rows.append({"what": "resume", "step": RESUME_STEP, **resumed})
    print(
        f"\nstate of step {RESUME_STEP} at 16 domains: {resumed['state_bytes']} bytes (<= {BUDGETS['state_bytes']});"
        f" a new loader gives its first batch in {resumed['resume_s']['median'] * 1e3:.1f} ms"
    )
    verify_planner(16, 32)
    verify_planner(1024, 32)
    points = [(curve, size) for curve, sizes in CURVES.items() for size in sizes]
    costs = in_turn({f"{curve} {size}": plan_cost(curve, size) for curve, size in points}, args.rounds)
    print("\nmicroseconds of one plan step (16 domains, 32 rows where nothing else is said; shards: one domain)")
    for curve, sizes in CURVES.items():
        print(f"  {curve:26}" + "".join(f"{size:>10}" for size in sizes))
        medians = [spread(costs[f"{curve} {size}"]) for size in sizes]
        print(f"  {'':26}" + "".join(f"{cost['median']:10.1f}" for cost in medians))
        rows += [
            {"what": "plan", "curve": curve, "size": size, "us_per_step": cost}
            for size, cost in zip(sizes, medians, strict=True)
        ]
    return rows


if __name__ == "__main__":
    print(json.dumps(start_up(Path(sys.argv[1]))))
