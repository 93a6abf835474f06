"""Which domains meet in a batch, and how far counts drift from quotas; beside chance, which has no bound."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.loader_scale import planner, verify_planner
from mixloader import _core
from mixloader.mixture import WEIGHT_ONE, quantize

ROWS = 32
MEETING_DOMAINS, MOST_STEPS, SEEDS = 64, 2_000_000, 5
DRIFT_DOMAINS = 4_096


def drawn(plan: Any, chunk: int = 1000) -> Iterator[np.ndarray]:
    """[chunk, ROWS]: the domain of each row of the next steps."""
    while True:
        yield plan.plan(chunk)[0].astype(np.int64)


def steps_until_all_met(plan: Any, domains: int) -> int | None:
    """Steps after which every pair of domains stood in one batch; None if that takes more than MOST_STEPS."""
    met = np.zeros((domains, domains), dtype=bool)
    steps = 0
    for chunk in drawn(plan):
        present = np.zeros((len(chunk), domains), dtype=np.float32)
        present[np.arange(len(chunk))[:, None], chunk] = 1
        after = met | (present.T @ present > 0)
        if after.all() or steps >= MOST_STEPS:
            break
        met, steps = after, steps + len(chunk)
    for row in present.astype(bool):
        met |= np.outer(row, row)
        steps += 1
        if met.all():
            return steps
    return None


def drift(plan: Any, units: np.ndarray, steps: int) -> tuple[float, float]:
    """The least and the greatest quota minus count, in rows, of any domain after any of `steps` steps."""
    counts, done = np.zeros(len(units), dtype=np.int64), 0
    least, greatest = 0.0, 0.0
    for chunk in drawn(plan):
        for rows in chunk[: steps - done]:
            counts += np.bincount(rows, minlength=len(units))
            done += 1
            ahead = ROWS * units * done / WEIGHT_ONE - counts
            least, greatest = min(least, ahead.min()), max(greatest, ahead.max())
        if done >= steps:
            return float(least), float(greatest)
    raise AssertionError("a plan does not end")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result; prints them."""
    verify_planner(MEETING_DOMAINS, ROWS)
    verify_planner(DRIFT_DOMAINS, ROWS)
    samplings = {"quota": _core.Sampling.QUOTA, "multinomial": _core.Sampling.MULTINOMIAL}
    rows: list[dict[str, Any]] = []
    print(f"{MEETING_DOMAINS} domains, weights Dirichlet(1), {ROWS} rows: steps until every pair stood in one batch")
    print(f"{'seed':>6}{'least weight':>14}" + "".join(f"{name:>14}" for name in samplings))
    for seed in range(SEEDS):
        units = quantize(np.random.default_rng(seed).dirichlet(np.ones(MEETING_DOMAINS)))
        row: dict[str, Any] = {"what": "meeting", "seed": seed, "least_weight": units.min() / WEIGHT_ONE}
        for name, sampling in samplings.items():
            row[name] = steps_until_all_met(planner(MEETING_DOMAINS, ROWS, units=units, sampling=sampling), len(units))
        rows.append(row)
        cells = "".join(f"{'> ' + str(MOST_STEPS) if row[name] is None else row[name]:>14}" for name in samplings)
        print(f"{seed:6}{row['least_weight']:14.2e}{cells}", flush=True)
    units = np.full(DRIFT_DOMAINS, WEIGHT_ONE // DRIFT_DOMAINS)
    bound = 2 * (sum(1 / i for i in range(1, DRIFT_DOMAINS + 1)) - 1)
    print(f"\n{DRIFT_DOMAINS} equal domains, {ROWS} rows: quota minus count in rows, over {args.company_steps} steps")
    for name, sampling in samplings.items():
        least, greatest = drift(planner(DRIFT_DOMAINS, ROWS, units=units, sampling=sampling), units, args.company_steps)
        proven = f"; proven: above -2, at most {bound:.1f}" if name == "quota" else ""
        print(f"  {name:12}{least:8.2f} to {greatest:.2f}{proven}")
        rows.append(
            {"what": "drift", "sampling": name, "steps": args.company_steps, "least": least, "greatest": greatest}
        )
    return rows
