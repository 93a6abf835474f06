"""`python -m mixloader.agent.offline.fit TRAJECTORIES --out FILE`: from finished runs to an agent's weights.

One learner (learners.py) on the decisions of the runs, from an actor that knows something already.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mixloader.agent.networks import Network, load_network
from mixloader.agent.offline.dataset import of_trajectories
from mixloader.agent.offline.learner import Learner
from mixloader.agent.offline.learners import LEARNERS
from mixloader.agent.offline.transitions import Transitions
from mixloader.agent.policy import SHIPPED
from mixloader.agent.trajectories import read_trajectories
from mixloader.errors import ConfigError


def spread(data: Transitions) -> float:
    """The standard deviation of what runs return, in the unit of the rewards; NaN for fewer than two."""
    totals = torch.tensor([float(data.reward[list(run)].sum()) for run in data.runs()])
    return float(totals.std()) if len(totals) > 1 else math.nan


def learn(
    data: Transitions, start: Network, learner: str, updates: int, seed: int, *, progress: bool = False
) -> tuple[Network, Learner]:
    """A copy of `start` after so many updates of a learner on `data`, and the learner. Deterministic.

    Raises ConfigError for a learner that is not known, or data that say nothing.
    """
    if learner not in LEARNERS:
        raise ConfigError(f"learner is {learner!r}; expected one of {', '.join(LEARNERS)}")
    scale = spread(data)
    if not scale > 0:
        raise ConfigError("the runs to learn from are fewer than two, or all ended alike; collect more of them")
    actor = copy.deepcopy(start).requires_grad_()
    made = LEARNERS[learner](data.scaled(1 / scale), actor, seed, updates)
    bar = tqdm(range(updates), desc=learner, unit="update", mininterval=10, disable=not progress)
    for _ in bar:
        measured = made.learn()
        bar.set_postfix({key: f"{value:.3f}" for key, value in measured.items()}, refresh=False)
    return actor, made


def main(argv: Sequence[str] | None = None) -> int:
    """Improve an agent's weights on finished runs."""
    parser = argparse.ArgumentParser(prog="python -m mixloader.agent.offline.fit", description=main.__doc__)
    parser.add_argument("trajectories", type=Path, help="a file of `python -m mixloader collect --pack`")
    parser.add_argument("--start", type=Path, default=SHIPPED, help="weights to begin with (default: the shipped ones)")
    parser.add_argument("--out", type=Path, required=True, help="file of weights to write")
    parser.add_argument("--learner", choices=list(LEARNERS), default="cql")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = load_network(args.start)
    data = of_trajectories(read_trajectories(args.trajectories))
    actor, _ = learn(data, start, args.learner, args.updates, args.seed, progress=True)
    actor.save(args.out, seed=args.seed, updates=args.updates)
    print(
        f"{args.out}: {args.learner}, {args.updates} updates on {len(data)} decisions of {len(list(data.runs()))} runs"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
