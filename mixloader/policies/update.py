"""The arithmetic that the online policies share: one clock, one exponentiated step, one reading of the losses.

Sources state their rules "per update of N steps". Here a decision covers whatever was trained since the last one, and
counts as steps / N updates, so that halving the interval between decisions leaves the path nearly the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixloader.errors import ConfigError, StateError
from mixloader.observation import DomainTable, Observation
from mixloader.signals import numbers_from_json, numbers_to_json


def steps_since(observation: Observation) -> float:
    """Plan steps trained since the last observation: its tokens over the mean tokens of a step so far.

    Skipped steps are not trained, so they do not count; 0 where nothing was read.
    """
    if observation.tokens_since <= 0:
        return 0.0
    return observation.tokens_since * (observation.step + 1) / observation.tokens


def moved(weights: np.ndarray, part: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Divide what the domains of `part` have together in the proportion of `shares`; the others keep theirs.

    weights: float64 [D]. part: bool [D]. shares: float64 [part.sum()] >= 0, not all zero.
    """
    out = weights.copy()
    out[part] = weights[part].sum() * (shares / shares.sum())
    return out


def exponentiated(weights: np.ndarray, scores: np.ndarray, updates: float, floor: float = 0.0) -> np.ndarray | None:
    """`updates` steps of exponentiated gradient: p <- (1 - floor) softmax(log p + score) + floor / K, each.

    weights: float64 [D]; a domain at zero stays there. scores: float64 [D], of one update, eta included; a domain
    with NaN keeps its weight, and K counts the others. For whole `updates` and no floor it is the source's rule
    applied so often; the floor's part is that of as many updates. Returns None where no two domains can be traded.
    """
    part = (weights > 0) & np.isfinite(scores)
    n_domains = np.count_nonzero(part)
    if n_domains < 2 or updates <= 0:
        return None
    logits = np.log(weights[part]) + updates * scores[part]
    shares = np.exp(logits - logits.max())
    kept = (1 - floor) ** updates
    return moved(weights, part, kept * shares / shares.sum() + (1 - kept) / n_domains)


def latest_losses(observation: Observation, names: Sequence[str]) -> np.ndarray:
    """float64 [D], nats a token: what evaluations reported of a domain by its name, else its training loss, or NaN."""
    losses = observation.loss.value.copy()
    if observation.feedback:
        index = {name: d for d, name in enumerate(names)}
        for name, signal in observation.feedback.items():
            if name in index:
                losses[index[name]] = float(signal.value)
    return losses


def by_name(values: Mapping[str, float], names: Sequence[str], option: str) -> np.ndarray:
    """float64 [D]: a policy's option by domain name in the order of `names`, NaN where absent.

    Raises ConfigError for a name that is no domain and a value that is no finite number.
    """
    out = np.full(len(names), math.nan)
    index = {name: d for d, name in enumerate(names)}
    for name, value in values.items():
        if name not in index:
            raise ConfigError(f"{option} names {name!r}, which is no domain; the domains are {', '.join(names)}")
        if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ConfigError(f"{option} of {name!r} is {value!r}; expected a finite number")
        out[index[name]] = value
    return out


def check_options(policy: str, **options: tuple[float, float, float]) -> None:
    """Each option is (value, least, most). Raises ConfigError for one outside its range."""
    for name, (value, least, most) in options.items():
        if not least <= value <= most:  # a NaN fails, too
            raise ConfigError(f"policy {policy!r}: {name} is {value}; expected a number from {least:g} to {most:g}")


def domain_numbers(values: list[float | None], n_domains: int, policy: str) -> np.ndarray:
    """float64 [D] out of a saved state. Raises StateError for a state of another number of domains."""
    if len(values) != n_domains:
        raise StateError(
            f"the state of policy {policy!r} is of {len(values)} domains, this run has {n_domains}; resume with the "
            "manifest that the state was saved with"
        )
    return numbers_from_json(values)


class Exponentiated:
    """A policy whose decisions are exponentiated steps on scores that a subclass computes from each observation.

    eta: step size per `update_steps` plan steps. floor: part of the mixture that each update shares out evenly.
    """

    name = ""
    needs: frozenset[str] = frozenset()

    def __init__(self, eta: float, floor: float, update_steps: float):
        check_options(self.name, eta=(eta, 0, math.inf), floor=(floor, 0, 1), update_steps=(update_steps, 1e-9, 1e18))
        self.eta, self.floor, self.update_steps = float(eta), float(floor), float(update_steps)

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget everything; the run begins at the weights it has."""
        self.domains = domains
        self._weight_steps, self._steps = np.zeros(len(domains)), 0.0
        return None

    @property
    def average(self) -> np.ndarray | None:
        """float64 [D]: the mean over training of the mixtures decided, None before the first.

        It is what DoReMi and DoGE hand from their proxy run to the run proper, as weights of the policy "fixed".
        """
        return self._weight_steps / self._steps if self._steps else None

    def scores(self, observation: Observation) -> np.ndarray:
        """float64 [D]: the exponent of one update before eta; NaN for a domain that shall keep its weight."""
        raise NotImplementedError

    def decide(self, observation: Observation) -> np.ndarray | None:
        """The next mixture, float64 [D]; None while nothing was read or no two domains were measured."""
        steps = steps_since(observation)
        weights = exponentiated(
            observation.weights, self.eta * self.scores(observation), steps / self.update_steps, self.floor
        )
        if weights is not None:
            self._weight_steps = self._weight_steps + steps * weights
            self._steps += steps
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The sum that `average` is of. JSON-able and exact."""
        return {"weight_steps": numbers_to_json(self._weight_steps), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        self._weight_steps = domain_numbers(state["weight_steps"], len(self.domains), self.name)
        self._steps = state["steps"]
