"""Fit the agent in the simulator: `python -m mixloader.agent.fit` makes the shipped weights anew.

The score of simulated runs is propagated back through the simulator, which is differentiable, to the
actions. The alternative, imitation of the best schedule of each episode, was not taken: such a schedule knows the
episode's hidden rates, and an average over what hidden rates would ask for is not the best answer to what can be seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mixloader.agent.episodes import Episodes, draw, mask
from mixloader.agent.features import N_DOMAIN, N_GLOBAL, SOURCE, TARGET
from mixloader.agent.networks import NETWORKS, Network, kind_of
from mixloader.agent.policy import SHIPPED
from mixloader.agent.rollout import Rollout, back_to_actions, by_random_walk, play
from mixloader.agent.signals import Signals, draw_signals, without
from mixloader.agent.simulator import held_out, improvements, pull_back, run, score

STEPS = (24, 32, 48, 64, 96)
"""Decisions in a run, drawn for every batch, so that the agent does not lean on one cadence."""

PENALTY = 0.003
"""Nats of score that the agent pays for a run of full-size moves: it moves only for a reason."""

UNDERWAY = 0.25
"""Part of the objective that is the mean score over the run; the rest is the score at its end. Without it the agent
gives up the source for the first half of a run and counts on winning it back, which fails when a run stops early
or recovers less well than the simulator."""


CHUNKS = 4
"""Parts that a batch is made in, each with random numbers of its own."""

Drawn = Callable[[int, np.random.Generator], Episodes]
"""Draws so many episodes to learn from."""


def measure_features(network: Network, rng: np.random.Generator, episodes: int, drawn: Drawn = draw) -> None:
    """Set the network's ranges (0.1 and 99.9 %) and scales from episodes under a random walk."""
    domain, run = [], []
    for steps in STEPS:
        some = drawn(episodes, rng)
        rollout = play(some, draw_signals(some, steps, rng), steps, by_random_walk(rng), rng)
        decided = slice(0, steps - 1)
        domain.append(rollout.domain[:, decided].transpose(0, 2, 1, 3)[mask(some)].reshape(-1, N_DOMAIN))
        run.append(rollout.run[:, decided].reshape(-1, N_GLOBAL))
    columns = [
        *np.concatenate(domain)[:, network.domain_columns.numpy()].T,
        *np.concatenate(run)[:, network.run_columns.numpy()].T,
    ]
    bounds = np.array([np.quantile(column, (0.001, 0.999)) for column in columns])
    network.low.copy_(torch.from_numpy(bounds[:, 0]))
    network.high.copy_(torch.from_numpy(bounds[:, 1]))
    network.centre.copy_(torch.tensor([float(column.mean()) for column in columns]))
    network.scale.copy_(torch.tensor([float(column.std()) + 0.05 for column in columns]))


def objective_cotangent(episodes: Episodes, steps: int) -> np.ndarray:
    """The derivative of the mean objective over episodes by their held-out losses, float64 [B, T + 1, D]."""
    when = np.full(steps + 1, UNDERWAY / steps)
    when[0] = 0.0
    when[-1] += 1 - UNDERWAY
    return -when[:, None] * episodes.value[:, None] / len(episodes.size)


def policy_gradient(network: Network, rollout: Rollout, rng: np.random.Generator) -> list[Tensor]:
    """Derivatives of the objective, less the penalty on moves, by the network's parameters, in their order.

    At some of the decisions, chosen anew each time; how many is a matter of the kind of network.
    """
    episodes, decisions, kind = rollout.episodes, rollout.steps - 1, kind_of(network)
    cotangent = objective_cotangent(episodes, rollout.steps)
    by_weights = pull_back(episodes, rollout.weights, rollout.history, cotangent)
    by_actions = back_to_actions(rollout, by_weights)
    chosen = np.sort(rng.permutation(decisions)[: math.ceil(kind.chosen * decisions)])
    parameters = list(network.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for size in np.unique(episodes.size):
        which = np.flatnonzero(episodes.size == size)
        u = kind.numbers(network, rollout, which, chosen)
        wanted = torch.from_numpy(by_actions[np.ix_(which, chosen)][..., :size]).float()
        share = PENALTY / (len(episodes.size) * decisions * size)
        objective = (u * wanted).sum() - share * torch.tanh(u).square().sum()
        for sum_, grad in zip(total, torch.autograd.grad(objective, parameters), strict=True):
            sum_ += grad * (decisions / len(chosen))
    return total


def train(network: Network, rng: np.random.Generator, iterations: int, batch: int, drawn: Drawn = draw) -> None:
    """Ascend the mean objective over new random episodes; Adam with a cosine from 3e-3.

    A batch is made in CHUNKS parts, as many at once as there are processors: the result is that of one processor.
    """
    parameters, kind = list(network.parameters()), kind_of(network)
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=3e-5)
    progress = tqdm(range(iterations), desc="fit", unit="batch", mininterval=10)
    mean = 0.0
    with ThreadPoolExecutor(min(CHUNKS, os.cpu_count() or 1)) as pool:
        for _ in progress:
            steps = int(rng.choice(STEPS))

            def chunk(rng: np.random.Generator, steps=steps) -> tuple[float, list[Tensor]]:
                episodes = drawn(-(-batch // CHUNKS), rng)
                signals = draw_signals(episodes, steps, rng)
                rollout = play(episodes, signals, steps, kind.decide(network), rng)
                reached = float(score(episodes, rollout.history.held_out[:, -1]).mean())
                return reached, policy_gradient(network, rollout, rng)

            done = list(pool.map(chunk, rng.spawn(CHUNKS)))
            for number, parameter in enumerate(parameters):
                parameter.grad = -torch.stack([grads[number] for _, grads in done]).mean(0)
            torch.nn.utils.clip_grad_norm_(parameters, 0.3)
            optimizer.step()
            schedule.step()
            reached = float(np.mean([one for one, _ in done]))
            mean = 0.95 * mean + 0.05 * reached if mean else reached
            progress.set_postfix(score=f"{mean:.4f}", refresh=False)


def fit(seed: int, iterations: int, batch: int, drawn: Drawn = draw, kind: str = "set") -> Network:
    """A network of a kind of NETWORKS, from scratch.

    Deterministic on one kind of machine, on any number of processors.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network: Network = NETWORKS[kind].new()
    measure_features(network, rng, 2 * batch, drawn)
    train(network, rng, iterations, batch, drawn)
    return network


def half_and_half(episodes: Episodes, source: float = 0.5) -> np.ndarray:
    """A fixed share for the source field, natural inside a field; all of it where there is only one field; [B, D]."""
    weights = np.zeros_like(episodes.prior)
    for code, share in ((SOURCE, source), (TARGET, 1 - source)):
        inside = np.where((episodes.field == code) & mask(episodes), episodes.tokens, 0.0)
        weights += share * inside / np.maximum(inside.sum(1, keepdims=True), 1e-9)
    return weights / weights.sum(1, keepdims=True)


def run_fixed(episodes: Episodes, weights: np.ndarray, steps: int) -> np.ndarray:
    """Held-out losses [B, T + 1, D] on weights [B, D] throughout, or [B, K, D] for K parts of equal length."""
    parts = weights if weights.ndim == 3 else weights[:, None]
    return run(episodes, parts[:, np.arange(steps) * parts.shape[1] // steps]).held_out


def best_schedule(episodes: Episodes, parts: int, steps: int = 24, iterations: int = 120) -> np.ndarray:
    """The best mixture of each episode (parts = 1) or sequence of mixtures, by gradient, knowing all its numbers.

    Returns weights [B, parts, D].
    """
    begin = np.log(0.5 * episodes.prior + 0.5 * half_and_half(episodes) + 1e-6)
    logits = torch.from_numpy(begin)[:, None].repeat(1, parts, 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    padding = torch.from_numpy(~mask(episodes))[:, None]
    value, when = torch.from_numpy(episodes.value), torch.arange(steps) * parts // steps

    def weights() -> Tensor:
        return torch.softmax(logits.masked_fill(padding, -torch.inf), dim=-1)

    for _ in range(iterations):
        optimizer.zero_grad()
        (held_out(episodes, weights()[:, when])[:, -1] * value).sum().backward()
        optimizer.step()
    return weights().detach().numpy()


def _summary(episodes: Episodes, held_out: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    source, target = improvements(episodes, held_out)
    has_source, has_target = (((episodes.field == code) & (episodes.probe > 0)).any(1) for code in (SOURCE, TARGET))
    reached = score(episodes, held_out)
    ahead = reached - reference
    return {
        "score": round(float(reached.mean()), 4),
        "source": round(float(source[has_source].mean()), 4),
        "target": round(float(target[has_target].mean()), 4),
        "ahead_of_half": round(float(ahead.mean()), 4),
        "ahead_error": round(float(ahead.std(ddof=1) / len(ahead) ** 0.5), 4),
        "not_worse": round(float((ahead > -0.01).mean()), 3),
    }


def evaluate(
    network: Network, seed: int, count: int, steps: int = 48, oracles: bool = True, drawn: Drawn = draw
) -> dict[str, dict[str, float]]:
    """Scores on `count` held-out episodes: the agent with and without its signals, fixed mixtures and what knowledge
    of the episode's numbers could reach."""
    rng = np.random.default_rng(seed)
    episodes = drawn(count, rng)
    signals = draw_signals(episodes, steps, rng)

    def agent(signals: Signals) -> np.ndarray:
        again = np.random.default_rng(seed + 1)
        return play(episodes, signals, steps, kind_of(network).decide(network), again, network.ranges).history.held_out

    natural = np.where(mask(episodes), episodes.tokens, 0.0)
    runs = {
        "agent": agent(signals),
        "agent_without_influence": agent(without(signals, influence=True)),
        "agent_without_feedback": agent(without(signals, feedback=True)),
        "agent_from_losses": agent(without(signals, influence=True, feedback=True)),
        "half": run_fixed(episodes, half_and_half(episodes), steps),
        "natural": run_fixed(episodes, natural / natural.sum(1, keepdims=True), steps),
        "prior": run_fixed(episodes, episodes.prior, steps),
        "source_0.25": run_fixed(episodes, half_and_half(episodes, 0.25), steps),
        "source_0.75": run_fixed(episodes, half_and_half(episodes, 0.75), steps),
    }
    if oracles:
        runs["best_fixed_of_each_episode"] = run_fixed(episodes, best_schedule(episodes, 1), steps)
        runs["best_schedule_of_each_episode"] = run_fixed(episodes, best_schedule(episodes, 6), steps)
    reference = score(episodes, runs["half"][:, -1])
    return {name: _summary(episodes, losses[:, -1], reference) for name, losses in runs.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m mixloader.agent.fit`."""
    parser = argparse.ArgumentParser(prog="python -m mixloader.agent.fit", description=__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file of weights to write (default: the shipped one)")
    parser.add_argument("--network", choices=list(NETWORKS), default="set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=1500, help="batches of episodes to train on")
    parser.add_argument("--batch", type=int, default=48, help="episodes a batch")
    parser.add_argument("--held-out", type=int, default=512, help="episodes to score, never trained on; 0 for none")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    network = fit(args.seed, args.iterations, args.batch, kind=args.network)
    network.save(args.out, seed=args.seed, iterations=args.iterations, batch=args.batch)
    scores = evaluate(network, seed=args.seed + 1_000_003, count=args.held_out) if args.held_out else {}
    print(json.dumps({"seconds": round(time.perf_counter() - begun), "held_out": scores}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
