"""How much each domain helps each other one, measured within a run by training on perturbed mixtures in turn.

Aioli's LearnParams (Chen et al., arXiv 2411.05735, algorithm 2): for each domain j, in random order and several rounds,
train on a mixture with most of its mass on j and see how far the loss of every domain i falls; then solve for A in
fall_i = sum_j A_ij p_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mixloader.observation import Observation
from mixloader.policies.update import domain_numbers, latest_losses, steps_since
from mixloader.signals import numbers_to_json


@dataclass(frozen=True)
class Plan:
    """trial_steps: plan steps of one trial, at least one decision. rounds: trials of each domain.

    one_hot: the mass on the domain whose trial it is; the others share the rest evenly.
    """

    trial_steps: int
    rounds: int
    one_hot: float


class Sweep:
    """Trials over the domains, and the least-squares solution of what they showed.

    Each row of the problem is what was read of every domain between two measurements of all losses, and how far
    those fell; so the lag between deciding and reading, and trials of unequal length, need no special care. A loss
    measured in training belongs to the middle of the rows it is the mean of (which is approximate where the mixture
    changed among them); an evaluation's to the step after which it was reported. Evaluations count only where they
    cover every domain by name.
    """

    def __init__(self, names: tuple[str, ...], plan: Plan, seed: int):
        self.names, self.plan, self.seed = names, plan, seed
        n_domains = len(names)
        self.number = 0  # of sweeps begun
        self.trial = self.began = self.ends = -1  # the trial under way; the effect steps of its and the sweep's end
        self._seen = np.zeros(n_domains)
        self._at = np.full(n_domains, np.nan)  # tokens read of each domain when `_losses` were measured
        self._losses = np.full(n_domains, np.nan)
        self._measured_step = -1
        self._clear()

    def _clear(self) -> None:
        n_domains = len(self.names)
        self._squares, self._products = np.zeros((n_domains, n_domains)), np.zeros((n_domains, n_domains))

    @property
    def trying(self) -> bool:
        return self.trial >= 0

    @property
    def waiting(self) -> bool:
        """The trials are over, but what they showed was not taken yet."""
        return self.ends >= 0

    def begin(self, effect_step: int) -> None:
        """Start the first trial at `effect_step`."""
        self.number += 1
        self.trial, self.began, self.ends = 0, effect_step, -1
        self._clear()

    def mixture(self, active: np.ndarray) -> np.ndarray:
        """float64 [D] that sums to 1: that of the trial under way, over the active domains."""
        n_domains = np.count_nonzero(active)
        weights = np.where(active, (1 - self.plan.one_hot) / max(n_domains - 1, 1), 0.0)
        order = self._order(active)
        weights[order[self.trial % n_domains]] = self.plan.one_hot
        return weights / weights.sum()

    def _order(self, active: np.ndarray) -> np.ndarray:
        """The active domains in the order of this round: drawn by their names, so not a matter of their order."""
        by_name = sorted(np.flatnonzero(active), key=self.names.__getitem__)
        rng = np.random.default_rng([self.seed, self.number, self.trial // len(by_name)])
        return np.array(by_name)[rng.permutation(len(by_name))]

    def advance(self, effect_step: int, active: np.ndarray) -> None:
        """Go on to the next trial, or end the last, if the one under way has lasted long enough."""
        if self.trying and effect_step - self.began >= self.plan.trial_steps:
            self.trial, self.began = self.trial + 1, effect_step
            if self.trial >= self.plan.rounds * np.count_nonzero(active):
                self.trial, self.ends = -1, effect_step

    def observe(self, observation: Observation, active: np.ndarray) -> None:
        """Take up a measurement, if all that can be measured was measured anew."""
        read, steps = observation.seen - self._seen, steps_since(observation)
        self._seen = observation.seen.astype(np.float64)
        losses, step, part = self._measurement(observation, active, steps)
        if step <= self._measured_step or not np.isfinite(losses[active]).any():
            return
        at = self._seen - part * read
        if (self.trying or self.waiting) and np.isfinite(self._at).all():
            amount = (at - self._at) / (observation.tokens / (observation.step + 1) * self.plan.trial_steps)
            # A domain that was never measured has fallen by nothing, as far as is known.
            fall = np.nan_to_num(self._losses - losses, nan=0.0)
            self._squares += np.outer(amount, amount)
            self._products += np.outer(amount, fall)
        self._at, self._losses, self._measured_step = at, losses, step

    def _measurement(self, observation: Observation, active: np.ndarray, steps: float) -> tuple[np.ndarray, int, float]:
        """Losses [D], the step of the oldest, and the part of what the last observation brought that is newer."""
        named = [observation.feedback.get(name) for name in self.names]
        if all(signal is not None or not on for signal, on in zip(named, active, strict=True)):
            age = max(int(signal.age) for signal, on in zip(named, active, strict=True) if on and signal is not None)
            return latest_losses(observation, self.names), observation.step - age, min(1.0, age / max(steps, 1.0))
        loss = observation.loss
        known = active & (loss.age >= 0)
        oldest = int(loss.age[known].max()) if known.any() else observation.step + 1
        return np.where(known, loss.value, np.nan), observation.step - oldest, 0.5

    def is_complete(self, observation: Observation) -> bool:
        """Whether the last trial has been read to its end."""
        return self.waiting and observation.step + 1 >= self.ends

    def solve(self, active: np.ndarray) -> np.ndarray:
        """A, float64 [D, D]: how far the loss of i falls per trial that reads j alone; 0 for domains not active.

        A small ridge holds what no trial told apart at nothing.
        """
        self.ends = -1
        index = np.flatnonzero(active)
        squares = self._squares[np.ix_(index, index)]
        ridge = 1e-9 * max(float(np.trace(squares)) / max(len(index), 1), 1e-300)
        solved = np.linalg.solve(squares + ridge * np.eye(len(index)), self._products[np.ix_(index, index)])
        out = np.zeros_like(self._squares)
        out[np.ix_(index, index)] = solved.T
        return out

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact; 2 D squared numbers while a sweep is under way."""
        under_way = self.trying or self.waiting
        return {
            "trial": [self.number, self.trial, self.began, self.ends, self._measured_step],
            "seen": self._seen.tolist(),
            "at": numbers_to_json(self._at),
            "losses": numbers_to_json(self._losses),
            "squares": self._squares.tolist() if under_way else None,
            "products": self._products.tolist() if under_way else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        n_domains = len(self.names)
        self._at = domain_numbers(state["at"], n_domains, "sweep")
        self._losses = domain_numbers(state["losses"], n_domains, "sweep")
        self._seen = np.array(state["seen"], dtype=np.float64)
        self.number, self.trial, self.began, self.ends, self._measured_step = state["trial"]
        self._clear()
        if state["squares"] is not None:
            self._squares, self._products = np.array(state["squares"]), np.array(state["products"])
