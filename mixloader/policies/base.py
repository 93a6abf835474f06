"""The Policy protocol, and the registry by which `policy="name"` finds one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mixloader.errors import ConfigError
from mixloader.observation import DomainTable, Observation


@runtime_checkable
class Policy(Protocol):
    """Decides the weights of the next steps from what was observed of the earlier ones.

    A policy runs in a thread of its own while training goes on; it must not touch the loader or the
    model. One that raises, is late or returns NaN costs nothing but a warning: the last weights stay.
    """

    needs: frozenset[str]
    """The signals it cannot do without, among "loss", "feedback", "influence", "excess".

    A policy may have an attribute `uses` besides, of the same kind: signals it does without, but is better with.
    """

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Begin a run. Returns the weights of the first steps, float64 [D], or None for the prior."""

    def decide(self, observation: Observation) -> np.ndarray | None:
        """Weights from `observation.effect_step` on, float64 [D] >= 0, or None to keep them."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as this one would; JSON-able, exact."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state after `reset` with the same domains."""


def signals_of(policy: Policy) -> frozenset[str]:
    """All signals that it is worth measuring for a policy."""
    return policy.needs | getattr(policy, "uses", frozenset())


def change_domains(policy: Policy, domains: DomainTable) -> np.ndarray | None:
    """Go on in mid-run with a table that has more domains at its end, or other prior weights.

    A policy that has a method `extend(domains)`, of the kind of `reset`, remembers what it saw; others are reset.
    """
    extend: Callable[[DomainTable], np.ndarray | None] = getattr(policy, "extend", policy.reset)
    return extend(domains)


_FACTORIES: dict[str, Callable[..., Policy]] = {}

_MODULES = {
    "agent": "mixloader.agent.policy",
    **dict.fromkeys(("piecewise", "linear"), "mixloader.policies.scheduled"),
    **dict.fromkeys(("doremi", "dbl", "velocitune"), "mixloader.policies.excess"),
    "ado": "mixloader.policies.ado",
    **dict.fromkeys(("exp3", "odm", "dynamixsft"), "mixloader.policies.bandits"),
    **dict.fromkeys(("aioli", "skillit"), "mixloader.policies.crossdomain"),
    **dict.fromkeys(("influence", "doge", "dga", "rb", "pike"), "mixloader.policies.gradient"),
    "acodm": "mixloader.policies.actor_critic",
}
"""Policies whose module is imported only when they are asked for, so that importing mixloader stays light."""


def register(name: str) -> Callable[[Callable[..., Policy]], Callable[..., Policy]]:
    """Class decorator: make a policy available as `policy="name"`."""

    def add(factory: Callable[..., Policy]) -> Callable[..., Policy]:
        _FACTORIES[name] = factory
        return factory

    return add


def policy_names() -> list[str]:
    """The names that make_policy knows, sorted; imports nothing."""
    return sorted({*_FACTORIES, *_MODULES})


def make_policy(policy: str | Policy, **options: Any) -> Policy:
    """A policy from its name and options; a policy object passes through.

    Raises ConfigError for an unknown name or option.
    """
    if not isinstance(policy, str):
        if options:
            raise ConfigError(f"options {sorted(options)} were given with a policy object; set them on the object")
        return policy
    if policy not in _FACTORIES and policy in _MODULES:
        import_module(_MODULES[policy])
    if policy not in _FACTORIES:
        raise ConfigError(f"unknown policy {policy!r}; known policies are {', '.join(policy_names())}")
    try:
        return _FACTORIES[policy](**options)
    except TypeError as error:
        raise ConfigError(f"policy {policy!r} cannot be made with options {options}: {error}") from error
