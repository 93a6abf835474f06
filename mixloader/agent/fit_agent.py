"""`python -m mixloader fit-agent [TRAJECTORIES] --out FOLDER`: the agent's weights from recorded runs.

1. Calibrate: which episodes of the simulator the runs are (twins.py), and from which ranges others are drawn.
2. Warm up: a network in that simulator, by the derivative of the score (fit.py).
3. Learn: from the decisions of the runs themselves (offline/), beginning with 2.
4. Choose: of 2 and 3, what does best on the twins of runs that neither of them has seen.

Each stage is a file of FOLDER, which the same command does not make again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixloader import files
from mixloader.agent.calibrate import UNSEEN, fitted_ranges, influence_agreement, predictions, some
from mixloader.agent.episodes import Episodes, Ranges, draw, read_ranges
from mixloader.agent.fit import Drawn, evaluate, fit
from mixloader.agent.measured import measured_runs
from mixloader.agent.network import read_tensors
from mixloader.agent.networks import NETWORKS, Network, load_network
from mixloader.agent.offline.dataset import of_trajectories
from mixloader.agent.offline.fit import learn
from mixloader.agent.offline.learners import LEARNERS
from mixloader.agent.split import Split
from mixloader.agent.trajectories import Trajectory, read_trajectories
from mixloader.agent.twins import draw_twins, twins_of
from mixloader.errors import ConfigError

OF_TWINS = 0.5
"""Part of the warm-up's episodes that are twins; the others are drawn from the ranges, which are wider."""

RUNS = Path(__file__).parent / "data" / "trajectories.zst"
"""The runs that the shipped agent was fitted to; DATA.md beside them says what they are."""

LEAST = 10  # runs


class Fit:
    """One making of the agent in a folder.

    runs: those that may be learned from; every fifth episode is left out for the choice. network: a name of NETWORKS.
    learners: names of LEARNERS.
    """

    def __init__(
        self,
        runs: Sequence[Trajectory],
        out: Path,
        *,
        seed: int = 0,
        network: str = "set",
        batches: int = 1500,
        batch: int = 48,
        learners: Sequence[str] = ("cql",),
        updates: int = 4000,
    ):
        if len(runs) < LEAST:
            raise ConfigError(f"{len(runs)} runs are too few to fit an agent to; expected {LEAST} or more")
        if wrong := sorted(set(learners) - set(LEARNERS)):
            raise ConfigError(f"there is no learner {wrong[0]!r}; expected some of {', '.join(LEARNERS)}")
        every = round(1 / UNSEEN)
        self.runs, self.out, self.seed = list(runs), out, seed
        self.network, self.learners = network, tuple(learners)
        self.batches, self.batch, self.updates = batches, batch, updates
        self.measured = measured_runs(self.runs)
        self.left_out = self.measured.episode % every == every - 1
        self._folds = sorted({str(one.meta.get("fold")) for one in self.runs})
        content = [[one.weights.tolist(), one.held_out.tolist(), one.meta.get("number")] for one in self.runs]
        self._runs_digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def calibrate(self) -> tuple[Ranges, dict[str, Any]]:
        """Ranges from the runs that are not left out, and how well those that are, are predicted."""
        path, key = self.out / "calibration.json", [self._runs_digest, self.seed]
        if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
            return Ranges(**{name: tuple(pair) for name, pair in kept["ranges"].items()}), kept["unseen"]
        before, rng = read_ranges(), np.random.default_rng([self.seed, 1])
        seen, unseen = (some(self.measured, np.flatnonzero(which)) for which in (~self.left_out, self.left_out))
        ranges = fitted_ranges(seen, before, rng)
        report = predictions(unseen, ranges, before)
        kept_out = [one for one, out in zip(self.runs, self.left_out, strict=True) if out]
        report["influence_agreement"] = influence_agreement(kept_out, unseen, ranges)
        content = {"key": key, "ranges": ranges._asdict(), "unseen": report}
        files.replace(path, json.dumps(content, indent=1) + "\n")
        return ranges, report

    def twins(self, ranges: Ranges, left_out: bool) -> Episodes:
        """Twins of the runs that are left out, or of the others."""
        rng = np.random.default_rng([self.seed, 2, left_out])
        return twins_of(some(self.measured, np.flatnonzero(self.left_out == left_out)), ranges, rng)

    def warm_up(self, ranges: Ranges) -> Network:
        """A network that does well in the simulator."""
        path = self.out / "warm-up.safetensors"
        made = self._made_with()
        if self._is_made(path, made):
            return load_network(path)
        twins = self.twins(ranges, left_out=False)

        def drawn(count: int, rng: np.random.Generator) -> Episodes:
            if rng.random() < OF_TWINS:
                return draw_twins(twins, count, rng, ranges)
            return draw(count, rng, ranges)

        network = fit(self.seed, self.batches, self.batch, drawn, self.network)
        network.save(path, **made)
        return network

    def learn(self, start: Network, learner: str) -> Network:
        """What a learner makes of the start and the runs."""
        path = self.out / f"{learner}.safetensors"
        made = self._made_with() | {"learner": learner, "updates": self.updates}
        if self._is_made(path, made):
            return load_network(path)
        data = of_trajectories([one for one, out in zip(self.runs, self.left_out, strict=True) if not out])
        actor, _ = learn(data, start, learner, self.updates, self.seed, progress=True)
        actor.save(path, **made)
        return actor

    def _made_with(self) -> dict[str, Any]:
        """What decides the warmed-up weights, for their file."""
        return {
            "folds": self._folds, "runs": self._runs_digest, "seed": self.seed, "network": self.network,
            "batches": self.batches, "batch": self.batch,
        }  # fmt: skip

    def _is_made(self, path: Path, made: dict[str, Any]) -> bool:
        return path.exists() and read_tensors(path)[1].get("fit") == made

    def judge(self, network: Network, twins: Episodes) -> dict[str, dict[str, float]]:
        """Scores on the twins of runs that are left out, asked what the runs were asked."""
        same: Drawn = lambda count, rng: twins  # noqa: E731
        return evaluate(network, self.seed + 1_000_003, len(twins.size), oracles=False, drawn=same)

    def run(self) -> dict[str, Any]:
        """All stages: writes agent.safetensors and report.json, whose content it returns."""
        begun = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        ranges, unseen = self.calibrate()
        candidates = {"warm-up": self.warm_up(ranges)}
        for learner in self.learners:
            candidates[learner] = self.learn(candidates["warm-up"], learner)
        twins = self.twins(ranges, left_out=True)
        judged = {name: self.judge(network, twins) for name, network in candidates.items()}
        best = max(judged, key=lambda name: judged[name]["agent"]["score"])
        files.replace(self.out / "agent.safetensors", (self.out / f"{best}.safetensors").read_bytes())
        report = {
            "chosen": best, "runs": len(self.runs), "left_out": int(self.left_out.sum()), "unseen": unseen,
            "scores_on_twins": judged, "seconds": round(time.perf_counter() - begun),
        }  # fmt: skip
        files.replace(self.out / "report.json", json.dumps(report, indent=1) + "\n")
        return report


def main(argv: Sequence[str] | None = None) -> int:
    """Fit the agent to recorded runs. Stopped, the same command goes on with the next stage."""
    parser = argparse.ArgumentParser(prog="python -m mixloader fit-agent", description=main.__doc__)
    parser.add_argument(
        "trajectories", type=Path, nargs="*", default=[RUNS], help="of `collect --pack` (default: the shipped runs)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/agent"), help="folder for what it makes")
    parser.add_argument("--fold", help="learn from the runs of this fold alone (default: the shipped one; 'all': all)")
    parser.add_argument("--network", choices=list(NETWORKS), default="set")
    parser.add_argument("--learners", nargs="*", default=["cql"], choices=list(LEARNERS), help="to try after warm-up")
    parser.add_argument("--batches", type=int, default=1500, help="of episodes, to warm up on")
    parser.add_argument("--batch", type=int, default=48, help="episodes a batch")
    parser.add_argument("--updates", type=int, default=4000, help="of a learner")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    fold = args.fold or Split.load().shipped
    found = [one for path in args.trajectories for one in read_trajectories(path)]
    runs = [one for one in found if fold in ("all", one.meta.get("fold"))]
    options = {name: getattr(args, name) for name in ("seed", "network", "batches", "batch", "learners", "updates")}
    with files.sole_user(args.out, "fit"):
        report = Fit(runs, args.out, **options).run()
    print(json.dumps(report, indent=1))
    print(f"agent {args.out / 'agent.safetensors'} ({report['chosen']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
