"""Fit the simulator to real runs: `python -m mixloader.agent.calibrate TRAJECTORIES --out ranges.json`.

Every run is identified with an episode (identify.py); how the numbers of the episodes spread becomes the ranges that
new ones are drawn from. A fifth of the runs is left out of that, and tells how well the simulator predicts held-out
losses: from all that was measured in the first half of a run, and its mixtures, those of the second half.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixloader.agent.episodes import RANGES, Ranges, read_ranges, take
from mixloader.agent.features import TARGET
from mixloader.agent.identify import OF_DOMAIN, OF_RUN, identify
from mixloader.agent.measured import STEPS, Runs, measured_runs
from mixloader.agent.simulator import influence_now, run
from mixloader.errors import ConfigError
from mixloader.files import replace

if TYPE_CHECKING:
    from mixloader.agent.trajectory import Trajectory

UNSEEN = 0.2
"""Part of the runs that predictions are made of and nothing is fitted to."""

_INSIDE = (0.025, 0.975)
"""Quantiles that become the bounds of a range."""

FARTHEST = 1.5
"""By this factor at most is a range widened at either end: of what single runs say little of, quantiles run away."""


def fitted_ranges(runs: Runs, ranges: Ranges, rng: np.random.Generator, iterations: int = 300) -> Ranges:
    """Ranges with the bounds that hold 95 % of the numbers of the runs' episodes; `ranges` says what is likely before
    that, and no bound goes over FARTHEST times beyond it.

    What held-out losses do not tell (noise of training losses and how they differ from held-out ones) stays as it is.
    """
    start = np.where(np.arange(runs.of.shape[2]) < runs.episodes.size[:, None], runs.episodes.start, np.nan)
    values = identify(runs, ranges, sample=rng, iterations=iterations).values | {"start": start}
    found = {}
    for name in (*OF_RUN, *OF_DOMAIN, "start"):
        each = values[name][runs.first]
        known = each[np.isfinite(each)]
        if len(known):
            least, most = getattr(ranges, name)
            low, high = np.quantile(known, _INSIDE).clip(least / FARTHEST, most * FARTHEST)
            found[name] = (float(f"{low:.3g}"), float(f"{high:.3g}"))
    return ranges._replace(**found)


def _rms(error: np.ndarray) -> float:
    return round(float(np.sqrt(np.mean(error**2))), 4)


def predictions(runs: Runs, ranges: Ranges, before: Ranges, iterations: int = 300) -> dict[str, object]:
    """How far predictions of the second half of runs are off, nats, root mean square over runs, domains and times.

    by: the simulator with `ranges` and with those `before`; a power law for each domain, without transfer and
    forgetting; and the last known loss. `blind` knows nothing but the losses before training.
    """
    half = runs.when <= STEPS / 2 + 1e-9
    asked = runs.by_domain & ~half & np.isfinite(runs.error)
    target = np.einsum("bmd,bd->bm", runs.of, (runs.episodes.field == TARGET).astype(float)) > 0.5
    methods = {
        "calibrated": identify(runs, ranges, use=half, iterations=iterations).predicted,
        "before": identify(runs, before, use=half, iterations=iterations).predicted,
        "power_law": identify(runs, before, use=half, alone=True, iterations=iterations).predicted,
        "last": _last(runs, half),
        "calibrated_blind": identify(runs, ranges, use=runs.when == 0, iterations=iterations).predicted,
        "before_blind": identify(runs, before, use=runs.when == 0, iterations=iterations).predicted,
        "first": np.einsum("bmd,bd->bm", runs.of, runs.episodes.start),
    }
    return {
        "runs": len(runs.weights),
        "losses": int(asked.sum()),
        **{
            name: {
                "all": _rms((predicted - runs.value)[asked]),
                "target": _rms((predicted - runs.value)[asked & target]),
                "others": _rms((predicted - runs.value)[asked & ~target]),
            }
            for name, predicted in methods.items()
        },
    }


def _last(runs: Runs, known: np.ndarray) -> np.ndarray:
    """For each measurement of a domain, its last one that is known; [B, M]."""
    out = np.zeros_like(runs.value)
    usable = known & runs.by_domain & np.isfinite(runs.error)
    for b in range(len(out)):
        for m in np.flatnonzero(runs.by_domain[b]):
            same = usable[b] & (runs.of[b] == runs.of[b, m]).all(1)
            out[b, m] = runs.value[b, np.flatnonzero(same)[np.argmax(runs.when[b, same])]]
    return out


def influence_agreement(trajectories: Sequence[Trajectory], runs: Runs, ranges: Ranges, iterations: int = 300) -> float:
    """How well the influence that was measured in runs agrees with that of the episodes they are identified with.

    Identified by their losses alone. The median over measurements of the correlation over domains and fields; NaN where
    no run has influence on both fields.
    """
    episodes = identify(runs, ranges, iterations=iterations).episodes
    history = run(episodes, runs.weights)
    found = []
    for b, trajectory in enumerate(trajectories):
        if not {"source", "target"} <= set(trajectory.influence_fields):
            continue
        columns = [trajectory.influence_fields.index(name) for name in ("source", "target")]
        simulated = np.empty((len(trajectory.table), 2))
        for t, measured in zip(trajectory.influence_at, trajectory.influence, strict=True):
            step = trajectory.step[min(t, len(trajectory) - 1)] + 1
            influence_now(episodes, b, history, round(step / trajectory.steps * STEPS), simulated)
            known = np.isfinite(measured[:, columns])
            pair = measured[:, columns][known], simulated[known]
            if known.sum() > 3 and min(side.std() for side in pair) > 0:
                found.append(np.corrcoef(*pair)[0, 1])
    return round(float(np.median(found)), 4) if found else math.nan


def some(runs: Runs, which: np.ndarray) -> Runs:
    """Those of the runs."""
    return Runs(take(runs.episodes, which), *(np.ascontiguousarray(array[which]) for array in runs[1:]))


def calibrate(runs: Runs, ranges: Ranges, seed: int = 0, iterations: int = 300) -> tuple[Ranges, dict[str, object]]:
    """New ranges, and how well the simulator predicts runs that they were not made from. Deterministic given `seed`.

    Raises ConfigError for fewer than 5 runs.
    """
    count = len(runs.weights)
    if count < 5:
        raise ConfigError(f"{count} runs are too few to fit to some and predict the others; expected at least 5")
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    unseen, seen = np.sort(order[: round(UNSEEN * count)]), np.sort(order[round(UNSEEN * count) :])
    found = fitted_ranges(some(runs, seen), ranges, rng, iterations)
    return found, predictions(some(runs, unseen), found, ranges, iterations)


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m mixloader.agent.calibrate`."""
    parser = argparse.ArgumentParser(prog="python -m mixloader.agent.calibrate", description=__doc__)
    parser.add_argument("trajectories", type=Path, help="file of trajectories")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of ranges to write")
    parser.add_argument(
        "--ranges", type=Path, default=RANGES, help="what is likely before (default: the shipped ranges)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=300, help="of gradient descent")
    args = parser.parse_args(argv)
    from mixloader.agent.trajectories import read_trajectories

    begun = time.perf_counter()
    trajectories = read_trajectories(args.trajectories)
    runs = measured_runs(trajectories)
    found, report = calibrate(runs, read_ranges(args.ranges), args.seed, args.iterations)
    report["influence_agreement"] = influence_agreement(trajectories, runs, found, args.iterations)
    replace(args.out, "{\n" + ",\n".join(f' "{k}": {json.dumps(v)}' for k, v in found._asdict().items()) + "\n}\n")
    print(json.dumps({"seconds": round(time.perf_counter() - begun), "unseen": report}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
