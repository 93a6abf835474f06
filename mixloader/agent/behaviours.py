"""What acts in the episodes that the agent learns from: random walks, random schedules, and the policies of mixloader.

Two policies are made for it, "walk" and "perturbed"; importing this module registers them. `draw_behaviour` chooses.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixloader.errors import StateError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import make_policy, register
from mixloader.signals import numbers_from_json, numbers_to_json

_LEAST = 1e-4  # of a weight, over an even share


class _Noise:
    """A Gaussian walk that is drawn back to zero, over the part of the run that has passed.

    size: its standard deviation in the long run; memory: the part of the run over which it forgets. seed: of its steps,
    each of which depends on the seed, its number and the domain's name alone: a resumed run has the same, and so has
    one with its domains in another order.
    """

    def __init__(self, size: float, memory: float, seed: int):
        self.size, self.memory, self.seed = size, memory, seed

    def reset(self, domains: DomainTable) -> None:
        self._names, self._fields = domains.names, [f"field {field}" for field in domains.fields]
        self.value = self._shocks(0) * self.size
        self.count, self.progress = 0, 0.0

    def move(self, progress: float) -> np.ndarray:
        """float64 [D], to be added to log weights."""
        if not np.isfinite(progress):
            progress = self.progress + 0.01  # a run of unknown length: as if it took a hundred decisions
        kept = np.exp(-max(0.0, progress - self.progress) / self.memory)
        self.count, self.progress = self.count + 1, progress
        new = self._shocks(self.count) * self.size
        self.value = kept * self.value + np.sqrt(1 - kept * kept) * new
        return self.value

    def _shocks(self, number: int) -> np.ndarray:
        # Domains of a field move together, too: what matters most is how much goes to each field.
        own, of_field = (_normal_by_name(names, self.seed, number) for names in (self._names, self._fields))
        return np.sqrt(0.5) * (own + of_field)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value.tolist(), "count": self.count, "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["value"]) != len(self._names):
            raise StateError(
                f"the state of a random walk is of {len(state['value'])} domains; expected {len(self._names)}, those "
                "of this run: resume with the manifest that it was saved with"
            )
        self.value, self.count, self.progress = np.array(state["value"]), state["count"], state["progress"]


def _normal_by_name(names: Sequence[str], *seed: int) -> np.ndarray:
    """A standard normal number for each name, the same wherever it stands; float64 [len(names)]."""
    return np.array([np.random.default_rng([*seed, zlib.crc32(name.encode())]).normal() for name in names])


def _mixture(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    weights = np.maximum(weights / weights.sum(), _LEAST / len(weights))
    return weights / weights.sum()


@register("walk")
class Walk:
    """A random walk on the simplex around a random mixture. Sees nothing.

    temperature: standard deviation of the log weights of the mixture that it walks around, within a field.
    target_share: the part of that mixture that goes to the target field; None leaves it to chance.
    noise, memory: how far it strays (in log weights), and the part of the run over which it returns. seed: of all that.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        temperature: float = 1.0,
        target_share: float | None = None,
        noise: float = 0.5,
        memory: float = 0.2,
        seed: int = 0,
    ):
        self.temperature, self.target_share, self.seed = temperature, target_share, seed
        self._noise = _Noise(noise, memory, seed + 1)

    def reset(self, domains: DomainTable) -> np.ndarray:
        logits = self.temperature * _normal_by_name(domains.names, self.seed)
        weights = _mixture(logits)
        target = np.array([field == "target" for field in domains.fields])
        if self.target_share is not None and 0 < target.sum() < len(target):
            weights[target] *= self.target_share / weights[target].sum()
            weights[~target] *= (1 - self.target_share) / weights[~target].sum()
        self._home = np.log(weights)
        self._noise.reset(domains)
        return _mixture(self._home + self._noise.value)

    def decide(self, observation: Observation) -> np.ndarray:
        return _mixture(self._home + self._noise.move(observation.progress))

    def state_dict(self) -> dict[str, Any]:
        return self._noise.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._noise.load_state_dict(state)


@register("perturbed")
class Perturbed:
    """Another policy whose weights stray from what it decides, by a random walk in log weights.

    inner, inner_options: as make_policy takes them. The policy is told that its own weights are in force, so that what
    it makes of them does not add up the noise. noise, memory, seed: as for "walk".
    """

    def __init__(
        self,
        inner: str = "natural",
        inner_options: Mapping[str, Any] | None = None,
        noise: float = 0.5,
        memory: float = 0.1,
        seed: int = 0,
    ):
        self.inner = make_policy(inner, **dict(inner_options or {}))
        self.needs = self.inner.needs
        self._noise = _Noise(noise, memory, seed)

    def reset(self, domains: DomainTable) -> np.ndarray:
        first = self.inner.reset(domains)
        self._own = np.array(domains.prior if first is None else first, dtype=np.float64)
        self._own = self._own / self._own.sum()
        self._noise.reset(domains)
        return self._strayed()

    def decide(self, observation: Observation) -> np.ndarray:
        answer = self.inner.decide(replace(observation, weights=self._own.copy()))
        if answer is not None:
            self._own = np.array(answer, dtype=np.float64)
        self._noise.move(observation.progress)
        return self._strayed()

    def _strayed(self) -> np.ndarray:
        # A domain to which the policy gives nothing gets a little: what came of that is worth seeing.
        return _mixture(np.log(np.maximum(self._own, _LEAST)) + self._noise.value)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.inner.state_dict(), "own": numbers_to_json(self._own), "noise": self._noise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["policy"])
        self._own = numbers_from_json(state["own"])
        self._noise.load_state_dict(state["noise"])


@dataclass(frozen=True)
class Behaviour:
    """label: what it is called in reports. policy, options: as make_policy takes them."""

    label: str
    policy: str
    options: dict[str, Any]


_CYCLE = ("walk",) * 9 + ("pieces",) * 3 + ("ramp",) * 2 + ("policy",) * 6 + ("perturbed",) * 5
"""Kinds of 25 episodes of a fold; their order is drawn for each 25."""

POLICIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("agent", "agent", {}),
    ("agent", "agent", {}),
    ("influence", "influence", {"update_steps": 5}),
    ("influence", "influence", {"update_steps": 5, "eta": 1.0, "floor": 0.02}),
    ("influence", "influence", {}),
    ("dga", "dga", {"update_steps": 5}),
    ("doge", "doge", {}),
    ("half and half", "fields", {"source": 0.5}),
    ("half and half", "fields", {"source": 0.5}),
    ("one quarter source", "fields", {"source": 0.25}),
    ("target only", "fields", {"source": 0.0}),
    ("natural", "natural", {}),
    ("uniform", "uniform", {}),
    ("unimax", "unimax", {}),
    ("ado", "ado", {"start_step": 10, "fit_steps": 10, "ignore_steps": 5}),
    ("dynamixsft", "dynamixsft", {"update_steps": 4}),
    ("odm", "odm", {}),
    ("exp3", "exp3", {"update_steps": 4}),
    ("pike", "pike", {}),
    ("rb", "rb", {}),
)
"""Label, name and options: those that mean something in runs of a few hundred steps."""

_PREFERRING = ("agent", "influence", "dga", "doge", "rb")


def draw_behaviour(
    seed: int, index: int, fields: Mapping[str, str | None], preference: float, steps: int, rng: np.random.Generator
) -> Behaviour:
    """The behaviour of the index-th episode of a fold. fields: of its domains, by name. steps: of its run."""
    cycle = np.random.default_rng([seed, 25, index // len(_CYCLE)]).permutation(len(_CYCLE))
    kind = _CYCLE[cycle[index % len(_CYCLE)]]
    own = int(rng.integers(2**31))
    if kind == "walk":
        return _walk(rng, own)
    if kind == "pieces":
        return _pieces(rng, list(fields), fields, steps)
    if kind == "ramp":
        return _ramp(rng, fields, steps)
    label, policy, options = POLICIES[int(rng.integers(len(POLICIES)))]
    if policy in _PREFERRING:
        options = {**options, "preference": preference}
    if kind == "policy":
        return Behaviour(label, policy, options)
    noise = {"noise": round(float(rng.uniform(0.2, 1.0)), 3), "memory": round(float(rng.uniform(0.03, 0.3)), 3)}
    return Behaviour(
        f"{label}, perturbed", "perturbed", {"inner": policy, "inner_options": options, **noise, "seed": own}
    )


def _walk(rng: np.random.Generator, seed: int) -> Behaviour:
    """Half of them with a sensible share for the target."""
    sensible = rng.random() < 0.6
    return Behaviour(
        "walk, sensible share" if sensible else "walk",
        "walk",
        {
            "temperature": round(float(rng.choice([0.3, 1.0, 2.0])), 3),
            "target_share": round(float(rng.uniform(0.25, 0.85)), 3) if sensible else None,
            "noise": round(float(rng.choice([0.3, 0.7, 1.4])), 3),
            "memory": round(float(np.exp(rng.uniform(np.log(0.02), np.log(0.5)))), 3),
            "seed": seed,
        },
    )


def _pieces(rng: np.random.Generator, names: Sequence[str], fields: Mapping[str, str | None], steps: int) -> Behaviour:
    """Mixtures that hold for a while each: 1 is a fixed one, as in a search."""
    count = min(int(rng.choice([1, 2, 3, 4, 6])), steps)
    later = sorted(int(at) for at in rng.choice(np.arange(1, steps), size=count - 1, replace=False))
    knots = {at: _random_mixture(rng, fields) for at in (0, *later)}
    return Behaviour(f"{count} fixed" if count > 1 else "fixed", "piecewise", {"knots": knots})


def _ramp(rng: np.random.Generator, fields: Mapping[str, str | None], steps: int) -> Behaviour:
    """From one mixture to another over the run, as a curriculum does."""
    return Behaviour(
        "ramp", "linear", {"knots": {0: _random_mixture(rng, fields), steps: _random_mixture(rng, fields)}}
    )


def _random_mixture(rng: np.random.Generator, fields: Mapping[str, str | None]) -> dict[str, float]:
    """By name: a drawn share for the target, and the rest for the others; Dirichlet inside each."""
    target = [name for name, field in fields.items() if field == "target"]
    others = [name for name in fields if name not in target]
    share = float(rng.uniform(0.1, 0.9))
    concentration = float(rng.choice([0.3, 1.0, 5.0]))
    weights: dict[str, float] = {}
    for names, part in ((others, 1 - share), (target, share)):
        weights |= dict(zip(names, part * rng.dirichlet([concentration] * len(names)), strict=True))
    return {name: round(float(weights[name]), 5) for name in fields}
