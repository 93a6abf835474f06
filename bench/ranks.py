"""What a Mixer costs on several ranks: step() on the caller's thread, and a decision in the policy's.

    python -m bench.ranks [--json bench/results/ranks.json]

The ranks are processes of this machine that talk over gloo. A training step is a sleep, so that the processes do not
contend for cores more than they must; the statistics are filled by hand, as in bench.mixer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.common import arguments, write_json
from bench.mixer import fill, make_data, micros
from mixloader import MixLoader
from mixloader.decision import Decision, Task
from mixloader.mixer import Mixer

WORLDS, DOMAINS, ROWS = (1, 2, 4), (16, 64), 64


def costs(data: dict[str, Any], steps: int, seconds: float) -> dict[str, float]:
    """Of this rank: medians and 99th percentiles in microseconds, and the share of steps that waited."""
    answered: list[float] = []
    ranks = dist.get_world_size()
    with MixLoader(data, ROWS // ranks, 64) as loader, Mixer(loader, "agent", token_budget=10**9) as mixer:
        decide = mixer._decider.decide

        def timed(task: Task) -> Decision:
            decision = decide(task)
            answered.append(time.perf_counter())
            return decision

        mixer._decider.decide = timed  # type: ignore[method-assign]
        times, handed_in = [], []
        for step in range(20 + steps):  # the first steps start the threads
            fill(mixer, next(loader))
            time.sleep(seconds)
            handed_in.append(time.perf_counter())
            took = micros(mixer.step)
            if step == 20:
                mixer.waits = 0
            if step >= 20:
                times.append(took)
        waits, state = mixer.waits, micros(mixer.state_dict)
        took_us = (np.array(answered[20:]) - np.array(handed_in[20 : len(answered)])) * 1e6
    return {
        "step_us": float(np.median(times)), "step_p99_us": float(np.percentile(times, 99)),
        "decision_us": float(np.median(took_us)), "decision_p99_us": float(np.percentile(took_us, 99)),
        "waits": waits / steps, "state_us": state,
    }  # fmt: skip


def rank_of(folder: str, rank: str, ranks: str, data: str, steps: str, seconds: str) -> None:
    """One process; rank 0 writes what it measured."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", int(ranks))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks))
    found = costs(json.loads(data), int(steps), float(seconds))
    if rank == "0":
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


COLUMNS = {
    "step_us": "step() p50", "step_p99_us": "step() p99",
    "decision_us": "decision p50", "decision_p99_us": "decision p99", "waits": "waits", "state_us": "state_dict()",
}  # fmt: skip


def main() -> None:
    parser = arguments("Cost of mixer.step() on several ranks.", "ranks")
    parser.add_argument("--steps", type=int, default=500, help="timed steps of each row (default 500)")
    parser.add_argument("--seconds", type=float, default=0.01, help="of a training step (default 0.01)")
    args = parser.parse_args()
    rows = []
    print("microseconds; a decision from step() being called to its answer; waits: share of steps")
    print(f"{'ranks':>6}{'domains':>8}" + "".join(f"{title:>{len(title) + 2}}" for title in COLUMNS.values()))
    for domains in DOMAINS:
        for ranks in WORLDS:
            with tempfile.TemporaryDirectory() as folder:
                program = [sys.executable, "-m", "bench.ranks", "--rank", folder]
                data = json.dumps(make_data(Path(folder), domains), default=str)
                tail = [str(ranks), data, str(args.steps), str(args.seconds)]
                started = [subprocess.Popen([*program, str(rank), *tail]) for rank in range(ranks)]
                if sum(process.wait() for process in started):
                    raise SystemExit("a rank failed; see above")
                found = json.loads(Path(folder, "found.json").read_text())
            rows.append({"ranks": ranks, "domains": domains, **found})
            cells = "".join(f"{found[key]:{len(title) + 2}.{2 * (key == 'waits')}f}" for key, title in COLUMNS.items())
            print(f"{ranks:6}{domains:8}{cells}", flush=True)
    write_json(args.json, rows, seconds=args.seconds)


if __name__ == "__main__":
    rank_of(*sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
