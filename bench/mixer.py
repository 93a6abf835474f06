"""What a Mixer costs: step() on the caller's thread, and a decision in the policy's thread.

    python -m bench.mixer [--json bench/results/mixer.json]

A training step is a sleep of 2 ms, in which the policy's thread does its work, as it would beside a
GPU. The statistics are filled by hand, so that no model is timed; every decision is recorded. With
"natural" the weights stay, so that nothing read ahead is dropped; with "agent" they change at every step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import arguments, write_json
from mixloader import MixLoader
from mixloader.decision import Task
from mixloader.mixer import Mixer

CALLER_BUDGET_US = 20  # hand in and take out, 64 domains (design, budgets)
POLICY_BUDGET_US = 300  # one decision, 64 domains


def make_data(folder: Path, domains: int) -> dict[str, dict[str, Any]]:
    path = folder / "tokens.bin"
    np.arange(60_000, dtype=np.uint16).tofile(path)
    return {
        f"domain-{d:02d}": {"path": path, "field": ("source", "target")[d % 2], "dtype": "uint16"}
        for d in range(domains)
    }


def fill(mixer: Mixer, batch: dict[str, Any]) -> None:
    """As if every token of the batch had a loss."""
    losses = (batch["targets"] % 7).float().flatten()
    ids = batch["domain_ids"].repeat_interleave(batch["targets"].shape[1])
    counted = torch.ones_like(ids, dtype=torch.bool)
    mixer.stats.add(losses, ids, counted, ~counted)


def micros(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def caller_costs(data: dict[str, Any], policy: str, record: Path, steps: int, seconds: float) -> dict[str, Any]:
    """Medians in microseconds: step(), its 99th percentile, and its parts, each called by itself."""
    record.unlink(missing_ok=True)
    times: dict[str, list[float]] = {}
    with MixLoader(data, 64, 64) as loader, Mixer(loader, policy, token_budget=10**9, record=record) as mixer:
        for _ in range(20):  # the first steps start the threads
            fill(mixer, next(loader))
            mixer.step()
        mixer.waits = 0
        for _ in range(steps):
            fill(mixer, next(loader))
            time.sleep(seconds)
            times.setdefault("step", []).append(micros(mixer.step))
        units, waits = loader.units, mixer.waits
        parts = {
            "state": loader.state_dict,
            "snapshot": mixer.stats.snapshot,
            "set_weights": lambda: loader.set_weights(units),
        }
        for _ in range(steps // 4):
            time.sleep(seconds)
            for name, call in parts.items():
                times.setdefault(name, []).append(micros(call))
    row = {f"{name}_us": float(np.median(values)) for name, values in times.items()}
    line = max(map(len, record.read_bytes().splitlines()[1:]))
    return {**row, "step_p99_us": float(np.percentile(times["step"], 99)), "waits": waits, "line_bytes": line}


def decision_costs(data: dict[str, Any], policy: str, steps: int, seconds: float) -> dict[str, Any]:
    """Medians in microseconds: a decision where it is made, and handing one in and taking one out."""
    inside, outside = [], []
    with MixLoader(data, 64, 64, num_workers=0) as loader, Mixer(loader, policy, token_budget=10**9) as mixer:
        for step in range(2 * steps):
            fill(mixer, next(loader))
            sums = np.zeros((len(data) + 1, len(mixer.stats.COLUMNS)), dtype=np.int64)
            task = Task(step, step + 2, loader.cursors, loader.units, [], {}, sums, [mixer.stats.snapshot()])
            if step < steps:
                inside.append(micros(lambda task=task: mixer._decider.decide(task)))
                continue
            begin = time.perf_counter()
            future = mixer._decider.submit(task)
            handed_in = time.perf_counter()
            time.sleep(seconds)
            outside.append((handed_in - begin) * 1e6 + micros(future.result))
    return {
        "decision_us": float(np.median(inside)),
        "decision_p99_us": float(np.percentile(inside, 99)),
        "hand_in_and_out_us": float(np.median(outside)),
    }


COLUMNS = {
    "step_us": "step() p50", "step_p99_us": "p99", "state_us": "state", "snapshot_us": "snapshot",
    "hand_in_and_out_us": "hand in/out", "set_weights_us": "set_weights", "decision_us": "decision p50",
    "decision_p99_us": "p99", "waits": "waits", "line_bytes": "line bytes",
}  # fmt: skip


def main() -> None:
    parser = arguments("Cost of mixer.step().", "mixer")
    parser.add_argument("--steps", type=int, default=2000, help="timed steps of each row (default 2000)")
    parser.add_argument("--seconds", type=float, default=0.002, help="of a training step (default 0.002)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("microseconds, medians where nothing else is said; state to set_weights are parts of step()")
    print(f"{'policy':9}{'domains':>8}" + "".join(f"{title:>{len(title) + 2}}" for title in COLUMNS.values()))
    with tempfile.TemporaryDirectory() as name:
        for domains in (16, 64):
            data = make_data(Path(name), domains)
            for policy in ("natural", "agent"):
                record = Path(name) / f"{policy}-{domains}.jsonl"
                costs = caller_costs(data, policy, record, args.steps, args.seconds)
                costs |= decision_costs(data, policy, args.steps // 4, args.seconds)
                rows.append({"policy": policy, "domains": domains, **costs})
                cells = "".join(f"{costs[key]:{len(title) + 2}.0f}" for key, title in COLUMNS.items())
                print(f"{policy:9}{domains:8}{cells}", flush=True)
    print(
        f"\nbudget at 64 domains: hand in/out {CALLER_BUDGET_US}, decision {POLICY_BUDGET_US}; at 16: a line 1024 bytes"
    )
    write_json(args.json, rows, seconds=args.seconds)


if __name__ == "__main__":
    main()
