"""Runs without a model: the loss of a token is a function of the token, and policies are made for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from mixloader import MixLoader
from mixloader.mixer import Mixer
from mixloader.observation import DomainTable, Observation
from mixloader.policies import base, policy_names

Batches = list[dict[str, Any]]


def shipped_policies() -> list[str]:
    """The registry without what tests have put there."""
    return [name for name in policy_names() if name in base._MODULES or _is_ours(base._FACTORIES[name])]


def _is_ours(factory: Callable[..., Any]) -> bool:
    return factory.__module__.startswith("mixloader.")


class Told:
    """Decides what a function says, and keeps the observations it saw."""

    needs = frozenset({"loss"})

    def __init__(self, decide: Callable[[Observation], Any], first: Any = None):
        self._decide, self.first, self.seen = decide, first, []

    def reset(self, domains: DomainTable) -> Any:
        return self.first

    def decide(self, observation: Observation) -> Any:
        self.seen.append(observation)
        return self._decide(observation)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RandomWalk:
    """Moves the weights at random, by the losses and by a memory of them; now and then it keeps them.

    delay: each decision takes a random time of up to so many seconds.
    """

    needs = frozenset({"loss"})

    def __init__(self, delay: float = 0.0):
        self.delay = delay

    def reset(self, domains: DomainTable) -> np.ndarray:
        self.level = np.zeros(len(domains))
        return np.arange(1.0, len(domains) + 1)

    def decide(self, observation: Observation) -> np.ndarray | None:
        time.sleep(self.delay * np.random.default_rng().random())
        self.level = 0.7 * self.level + np.nan_to_num(observation.loss.value)
        self.level += sum(float(signal.value) for signal in observation.feedback.values())
        if observation.step % 5 == 3:
            return None
        rng = np.random.default_rng(observation.step)
        return (observation.weights + 0.02) * np.exp(rng.normal(size=len(self.level)) + 0.01 * self.level)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = np.array(state["level"])


def token_losses(batch: dict[str, Any]) -> torch.Tensor:
    """float64 [B, T], nats; multiples of 1/4, which fixed point holds exactly, as it does their squares."""
    return (batch["targets"] * 7 % 101).double() / 4


def count(mixer: Mixer, batch: dict[str, Any]) -> None:
    """What domain_cross_entropy adds to the statistics of a batch with these losses."""
    losses = token_losses(batch)
    ids = batch["domain_ids"][:, None].expand_as(losses)
    valid = torch.ones(losses.numel(), dtype=torch.bool)
    mixer.stats.add(losses.flatten(), ids.flatten(), valid, ~valid)


def train(
    loader: MixLoader, mixer: Mixer, until: int, by_hand: dict[tuple[int, int], tuple[Any, int | None]] | None = None
) -> Batches:
    """Plan steps up to `until`, not included. by_hand: {(step, micro-batch): (weights, from which step)}.

    A change is made before that micro-batch is drawn, or after mixer.step() if it is one past the last.
    """
    batches: Batches = []

    def change(step: int, micro_batch: int) -> None:
        weights, first = (by_hand or {}).get((step, micro_batch), (None, None))
        if weights is not None:
            loader.set_weights(weights, step=first)

    for step in range(loader.step, until):
        for micro_batch in range(loader.grad_accumulation_steps):
            change(step, micro_batch)
            batches.append(next(loader))
            count(mixer, batches[-1])
        mixer.step()
        change(step, loader.grad_accumulation_steps)
    return batches


class Killed(Exception):
    pass


def kill(mixer: Mixer) -> None:
    """Let go of the mixer's record as the kernel does for a killed process: nothing is finished."""
    with suppress(Killed), mixer:
        raise Killed


def assert_same_batches(ours: Batches, theirs: Batches) -> None:
    assert [batch["step"] for batch in ours] == [batch["step"] for batch in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("input_ids", "targets", "domain_ids"):
            assert torch.equal(mine[key], other[key]), f"{key} of step {mine['step']}"
