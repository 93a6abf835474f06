"""What influence is worth and what it costs.

    python -m bench.influence [--corpora DIR] [--json bench/results/influence.json]

Runs: continued pre-training of a GPT of half a million parameters on several domains, of which three are probed and
evaluated, on other documents. Fixed mixtures against exponentiated weights on influence: from sketches in ordinary
steps, at several ranks and strides, and from full gradients with a backward pass a domain. Whatever is finished is kept
in --out, and the same command goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import arguments, write_json
from bench.influence_cost import cost_rows
from bench.influence_curve import curve_rows
from bench.influence_data import Task, corpora_task, demo_task
from mixloader import Influence, Mixer, MixLoader
from mixloader.evaluate import held_out_loss
from mixloader.loss import domain_cross_entropy
from mixloader.observation import DomainTable, Observation

DECIDE_EVERY = 10
LEARNING_RATE = 1e-3
PILOT = {"probe_every": 10, "probe_rows": 24, "half_life": 10.0}

WAYS: dict[str, dict[str, Any] | None] = {
    "natural": None,
    "careful": None,
    "known answer": None,
    "sketch r=16 stride 5": {"rank": 16, "stride": 5, **PILOT},
    "sketch r=32 stride 5": {"rank": 32, "stride": 5, **PILOT},
    "defaults": {},
    "full gradients": None,
    "sketch r=32 stride 1": {"rank": 32, "stride": 1, **PILOT},
    "sketch r=16 stride 1": {"rank": 16, "stride": 1, **PILOT},
    "sketch r=8 stride 1": {"rank": 8, "stride": 1, **PILOT},
    "sketch r=8 stride 5": {"rank": 8, "stride": 5, **PILOT},
}
"""By name: options of Influence, or None for a mixture or a measurement made another way. The most telling first."""


class ExponentiatedWeights:
    """w <- w exp(rate x score), a floor kept: the score is the mean influence on the fields, each in units of its root
    mean square over the domains, divided by the largest."""

    needs = frozenset({"influence"})

    def __init__(self, rate: float = 0.5, floor: float = 0.04):
        self.rate, self.floor = rate, floor

    def reset(self, domains: DomainTable) -> np.ndarray:
        self.weights = np.full(len(domains), 1 / len(domains))
        return self.weights

    def decide(self, observation: Observation) -> np.ndarray:
        if observation.influence is not None and np.isfinite(observation.influence.value).any(0).all():
            self.weights = self.next(observation.influence.value)
        return self.weights

    def next(self, influence: np.ndarray) -> np.ndarray:
        scale = np.sqrt(np.nanmean(influence**2, axis=0)) + 1e-30
        score = np.nan_to_num((influence / scale).mean(1))
        weights = self.weights * np.exp(self.rate * score / (np.abs(score).max() + 1e-30))
        return (1 - self.floor) * weights / weights.sum() + self.floor / len(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = np.array(state["weights"])


class ByBackward(ExponentiatedWeights):
    """The same rule on full gradients, over the layers that sketches are taken of: a backward pass a domain."""

    needs = frozenset()

    def __init__(self, task: Task, model: nn.Module, rows: int = 16):
        super().__init__()
        self.task, self.model, self.rows = task, model, rows

    def measure(self, loader: MixLoader, number: int) -> None:
        """Called between steps, and not from decide(), whose thread must leave the model alone."""
        probes = []
        for field in ("source", "target"):
            names = [d.name for d in loader.manifest.domains if d.field == field]
            batches = loader.held_out(64, windows_per_domain=24 // len(names), domains=names)
            probes.append(sum(full_gradient(self.model, batch) for batch in batches))
        drawn = [next(loader.probe(name, self.rows, seed=number)) for name in loader.names]
        gradients = torch.stack([full_gradient(self.model, batch) for batch in drawn])
        self.measured = (gradients @ torch.stack(probes).T).double().numpy()

    def decide(self, observation: Observation) -> np.ndarray:
        self.weights = self.next(self.measured)
        return self.weights


def full_gradient(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """float32 [parameters of the linear layers in blocks]: of the sum of token losses."""
    weights = [m.weight for part in model.h for m in part.modules() if isinstance(m, nn.Linear)]
    logits = model(batch["input_ids"])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def train(task: Task, way: str, seed: int) -> dict[str, Any]:
    """One run; losses in nats a token on the test documents of each field."""
    model = task.fresh_model()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    options = WAYS[way]
    influence = None if options is None else Influence(model, **options)
    mixtures = {"careful": task.careful, "known answer": task.known}
    if influence is not None:
        policy: Any = ExponentiatedWeights()
    elif way == "full gradients":
        policy = ByBackward(task, model)
    else:
        policy = "natural" if way == "natural" else "fixed"
    chosen = {"weights": mixtures[way]} if policy == "fixed" else {}
    begin = time.perf_counter()
    with (
        MixLoader(task.train, task.batch_size, task.seq_len, seed=seed, max_steps=task.steps, num_workers=0) as loader,
        Mixer(loader, policy, decide_every=DECIDE_EVERY, lag=0, influence=influence, **chosen) as mixer,
    ):
        for batch in loader:
            step = batch["step"]
            for group in optimizer.param_groups:
                group["lr"] = (
                    LEARNING_RATE * min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / task.steps))
                )
            logits = model(batch["input_ids"])
            domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], stats=mixer.stats).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(policy, ByBackward) and (step + 1) % DECIDE_EVERY == 0:
                policy.measure(loader, step)
            mixer.step()
        weights = loader.weights
    seconds = time.perf_counter() - begin
    losses = held_out_loss(model, task.test, seq_len=task.seq_len, windows_per_domain=96, batch_size=32)
    means = {
        field: float(np.mean([losses[d.name] for d in task.test.domains if d.field == field]))
        for field in ("source", "target")
    }
    return {
        "way": way, "seed": seed, **means, "balanced": sum(means.values()) / 2, "seconds": seconds, "losses": losses,
        "last_weights": dict(zip(task.train.names, np.round(weights, 4).tolist(), strict=True)),
    }  # fmt: skip


def run_all(task: Task, out: Path, ways: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """All runs that are not there yet, one after the other; returns all of them."""
    rows = []
    for seed in range(seeds):
        for way in ways:
            path = out / f"{way.replace(' ', '_')}-seed{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(train(task, way, seed)) + "\n")
            rows.append(json.loads(path.read_text()))
            print(
                "  ".join(
                    f"{rows[-1][k]:.4f}" if k == "balanced" else str(rows[-1][k]) for k in ("way", "seed", "balanced")
                ),
                flush=True,
            )
    return rows


def markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table: the mean over seeds of each way."""
    lines = [f"| {title} | source | target | balanced | largest difference between seeds |", "|---|---|---|---|---|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        cells = [f"{np.mean([row[key] for row in mine]):.3f}" for key in ("source", "target", "balanced")]
        spread = np.ptp([row["balanced"] for row in mine])
        lines.append(f"| {way} | {' | '.join(cells)} | {spread:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments("What influence is worth and what it costs.", "influence")
    parser.add_argument("--out", type=Path, default=Path("runs/influence"), help="data, and runs that are finished")
    parser.add_argument("--corpora", type=Path, help="a folder of NAME.jsonl.gz, for the larger experiment as well")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--only", help="sections, of demo, corpora, code, curve, cost", default="demo,corpora,code,curve,cost"
    )
    parser.add_argument("--ways", help="comma-separated, by default all", default=",".join(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    only, results = args.only.split(","), {}
    tasks = {"demo": lambda out: demo_task(out)}
    if args.corpora is not None:
        proofs = {"dictionary": "source", "perl_docs": "source", "coq": "target"}
        code = {"dictionary": "source", "perl_docs": "source", "c": "target"}
        tasks["corpora"] = lambda out: corpora_task(out, args.corpora, proofs)
        tasks["code"] = lambda out: corpora_task(out, args.corpora, code)
    for name, make in tasks.items():
        if name in only:
            out = args.out / name
            results[name] = run_all(make(out), out, args.ways.split(","), args.seeds)
            print(markdown(name, results[name]), flush=True)
    if "curve" in only:
        results["curve"] = curve_rows(demo_task(args.out / "demo"))
    if "cost" in only:
        results["cost"] = cost_rows(args.rounds)
    write_json(args.json, [], **results)


if __name__ == "__main__":
    main()
