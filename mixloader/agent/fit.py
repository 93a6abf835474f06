"""Fit the agent in the simulator: `python -m mixloader.agent.fit` makes the shipped weights anew.

The score of simulated runs is propagated back through the simulator, which is differentiable, to the
actions. The alternative, imitation of the best schedule of each episode, was not taken: such a schedule knows the
episode's hidden rates, and an average over what hidden rates would ask for is not the best answer to what can be seen.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mixloader.agent.features import SOURCE, TARGET
from mixloader.agent.network import Parameters, SetNetwork, save_parameters
from mixloader.agent.policy import SHIPPED
from mixloader.agent.rollout import by_network, by_parameters, by_random_walk, play
from mixloader.agent.simulator import Episodes, Simulator

STEPS = (24, 32, 48, 64, 96)
"""Decisions in a run, drawn for every batch, so that the agent does not lean on one cadence."""

PENALTY = 0.003
"""Nats of score that the agent pays for a run of full-size moves: it moves only for a reason."""

UNDERWAY = 0.25
"""Part of the objective that is the mean score over the run; the rest is the score at its end. Without it the agent
gives up the source for the first half of a run and counts on winning it back, which fails when a run stops early
or recovers less well than the simulator."""


def measure_features(network: SetNetwork, rng: np.random.Generator, episodes: int) -> None:
    """Set the network's ranges (0.1 and 99.9 %) and scales from episodes under a random walk."""
    domain, run = [], []
    for steps in STEPS:
        walk = by_random_walk(rng)

        def record(watcher, weights, walk=walk):
            domain.append(watcher.domain[watcher.mask.numpy()])
            run.append(watcher.run.copy())
            return walk(watcher, weights)

        play(Episodes.draw(episodes, rng), steps, record, rng)
    columns = [
        *np.concatenate(domain)[:, network.domain_columns.numpy()].T,
        *np.concatenate(run)[:, network.run_columns.numpy()].T,
    ]
    bounds = np.array([np.quantile(column, (0.001, 0.999)) for column in columns])
    network.low.copy_(torch.from_numpy(bounds[:, 0]))
    network.high.copy_(torch.from_numpy(bounds[:, 1]))
    network.centre.copy_(torch.tensor([float(column.mean()) for column in columns]))
    network.scale.copy_(torch.tensor([float(column.std()) + 0.05 for column in columns]))


def train(network: SetNetwork, rng: np.random.Generator, iterations: int, batch: int) -> None:
    """Ascend the mean objective over new random episodes; Adam with a cosine from 3e-3."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=3e-5)
    progress = tqdm(range(iterations), desc="fit", unit="batch", mininterval=10)
    mean = 0.0
    for _ in progress:
        penalties: list[Tensor] = []
        scores: list[Tensor] = []
        play(Episodes.draw(batch, rng), int(rng.choice(STEPS)), by_network(network, penalties), rng, scores)
        score = scores[-1].mean()
        objective = (1 - UNDERWAY) * score + UNDERWAY * torch.stack(scores).mean()
        loss = -objective + PENALTY * torch.stack(penalties).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.3)
        optimizer.step()
        schedule.step()
        mean = 0.95 * mean + 0.05 * score.item() if mean else score.item()
        progress.set_postfix(score=f"{mean:.4f}", refresh=False)


def fit(seed: int, iterations: int, batch: int) -> Parameters:
    """Parameters from scratch. Deterministic on one kind of machine: one thread, all randomness from `seed`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = SetNetwork()
    measure_features(network, rng, episodes=2 * batch)
    train(network, rng, iterations, batch)
    return network.parameters_as_arrays()


def half_and_half(episodes: Episodes, source: float = 0.5) -> Tensor:
    """A fixed share for the source field, natural inside a field; all of it where there is only one field."""
    weights = torch.zeros_like(episodes.prior)
    for code, share in ((SOURCE, source), (TARGET, 1 - source)):
        inside = torch.where((episodes.field == code) & episodes.mask, episodes.tokens, torch.zeros(()))
        weights = weights + share * inside / inside.sum(1, keepdim=True).clamp_min(1e-9)
    return weights / weights.sum(1, keepdim=True)


def run_fixed(episodes: Episodes, weights: Tensor, steps: int) -> Simulator:
    """Run with weights [B, D] throughout, or [B, K, D] for K parts of equal length."""
    simulator = Simulator(episodes, steps, np.random.default_rng(0))
    parts = weights if weights.dim() == 3 else weights[:, None]
    for step in range(steps):
        simulator.step(parts[:, step * parts.shape[1] // steps])
    return simulator


def best_schedule(episodes: Episodes, parts: int, steps: int = 24, iterations: int = 120) -> Tensor:
    """The best mixture of each episode (parts = 1) or sequence of mixtures, by gradient, knowing all its rates."""
    start = torch.log(0.5 * episodes.prior + 0.5 * half_and_half(episodes) + 1e-6).detach()
    logits = start[:, None].repeat(1, parts, 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    masked = episodes.mask[:, None]
    for _ in range(iterations):
        weights = torch.softmax(logits.masked_fill(~masked, -torch.inf), dim=-1)
        loss = -run_fixed(episodes, weights, steps).score().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.softmax(logits.detach().masked_fill(~masked, -torch.inf), dim=-1)


@torch.no_grad()
def _summary(simulator: Simulator, reference: Tensor) -> dict[str, float]:
    source, target = simulator.improvements()
    e = simulator.episodes
    has_source, has_target = (((e.field == code) & e.mask).any(1) for code in (SOURCE, TARGET))
    ahead = simulator.score() - reference
    return {
        "score": round(simulator.score().mean().item(), 4),
        "source": round(source[has_source].mean().item(), 4),
        "target": round(target[has_target].mean().item(), 4),
        "ahead_of_half": round(ahead.mean().item(), 4),
        "ahead_error": round((ahead.std() / len(ahead) ** 0.5).item(), 4),
        "not_worse": round((ahead > -0.01).float().mean().item(), 3),
    }


def evaluate(
    parameters: Parameters, seed: int, count: int, steps: int = 48, oracles: bool = True
) -> dict[str, dict[str, float]]:
    """Scores on `count` held-out episodes: the agent, fixed mixtures and what knowledge of the rates could reach."""
    episodes = Episodes.draw(count, np.random.default_rng(seed))
    half = run_fixed(episodes, half_and_half(episodes), steps)
    reference = half.score()
    natural = torch.where(episodes.mask, episodes.tokens, torch.zeros(()))
    runs = {
        "agent": play(episodes, steps, by_parameters(parameters), np.random.default_rng(seed + 1)),
        "half": half,
        "natural": run_fixed(episodes, natural / natural.sum(1, keepdim=True), steps),
        "prior": run_fixed(episodes, episodes.prior, steps),
        "source_0.25": run_fixed(episodes, half_and_half(episodes, 0.25), steps),
        "source_0.75": run_fixed(episodes, half_and_half(episodes, 0.75), steps),
    }
    if oracles:
        runs["best_fixed_of_each_episode"] = run_fixed(episodes, best_schedule(episodes, 1), steps)
        runs["best_schedule_of_each_episode"] = run_fixed(episodes, best_schedule(episodes, 6), steps)
    return {name: _summary(simulator, reference) for name, simulator in runs.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m mixloader.agent.fit`."""
    parser = argparse.ArgumentParser(prog="python -m mixloader.agent.fit", description=__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file of weights to write (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=1500, help="batches of episodes to train on")
    parser.add_argument("--batch", type=int, default=48, help="episodes a batch")
    parser.add_argument("--held-out", type=int, default=512, help="episodes to score, never trained on; 0 for none")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    parameters = fit(args.seed, args.iterations, args.batch)
    save_parameters(parameters, args.out, seed=args.seed, iterations=args.iterations, batch=args.batch)
    scores = evaluate(parameters, seed=args.seed + 1_000_003, count=args.held_out) if args.held_out else {}
    print(json.dumps({"seconds": round(time.perf_counter() - begun), "held_out": scores}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
