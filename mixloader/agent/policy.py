"""The learned policy: reads the losses of the domains, moves their weights. Set it with `policy="agent"`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.agent.action import CAP, FLOOR, act, bound
from mixloader.agent.features import field_codes, make_features, new_state, update_state
from mixloader.agent.network import Parameters, forward, load_parameters
from mixloader.errors import ConfigError, StateError
from mixloader.observation import DomainTable, Observation, Signal
from mixloader.policies.base import register

SHIPPED = Path(__file__).with_name("agent.safetensors")
"""The parameters that come with the package; CARD.md beside them says how they were made."""


@register("agent")
class Agent:
    """Balances keeping the source field with learning the target field, from training losses alone.

    preference: the weight on keeping the source field, in [0, 1] (the lambda of the score
        lambda * mean source improvement + (1 - lambda) * mean target improvement).
    floor: every domain keeps at least this part of its prior weight. cap: no domain gets more than this, or than
        its prior weight where that is larger.
    parameters: another file of weights than the shipped one.

    Domains whose weight or prior is zero keep the weight they have. What is far from the agent's training
    is led back to the prior (see `action.act`). Without a token budget it takes the run to be half done.
    """

    needs: frozenset[str] = frozenset({"loss"})

    def __init__(
        self, preference: float = 0.5, floor: float = FLOOR, cap: float = CAP, parameters: str | Path | None = None
    ):
        for name, value in (("preference", preference), ("floor", floor), ("cap", cap)):
            if not 0 <= value <= 1:
                raise ConfigError(f"the agent's {name} is {value}; expected a number from 0 to 1")
        if floor >= 1 or cap < 0.5:
            raise ConfigError(f"floor {floor} and cap {cap} leave no room; expected floor < 1 and cap >= 0.5")
        self.preference, self.floor, self.cap = float(preference), float(floor), float(cap)
        self._parameters: Parameters = load_parameters(Path(parameters) if parameters else SHIPPED)
        self._compile()

    def _compile(self) -> None:
        """Decide once for two invented domains, so that no decision of a run waits for the compiler."""
        half, zero = np.full(2, 0.5), np.zeros(2, dtype=np.int64)
        self.reset(DomainTable(("a", "b"), ("source", "target"), (None, None), zero + 9, half))
        loss = Signal(half, zero + 1, zero)
        self.decide(Observation(0, 1, 2, 2, 0.5, half, zero + 1, half, loss, half))

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget everything seen; the run begins at the prior. Raises ConfigError if no domain has a field."""
        fields = field_codes(domains.fields)
        if not fields.any():
            raise ConfigError(
                "policy 'agent' needs to know what to keep and what to learn, but no domain has a field; mark domains "
                'with "field": "source" or "target" in the manifest, or use another policy'
            )
        self._fields = fields
        self._tokens = np.array(domains.tokens, dtype=np.int64)
        self._prior = np.array(domains.prior, dtype=np.float64)
        self._state = new_state(len(domains))
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        """The next mixture, float64 [D]; None while nothing was read or no two domains can be traded."""
        if observation.tokens_since <= 0:
            return None
        loss = observation.loss
        fresh = (loss.age == 0) & (loss.count > 0)
        # Without a budget the run is always half done: bounds and horizons then scale with its length so far.
        progress = min(observation.progress, 1.0) if observation.progress > 0 else math.nan
        budget = observation.tokens / (0.5 if math.isnan(progress) else progress)
        since = float(observation.tokens_since)
        # Copies: numba would compile anew for read-only or strided arrays.
        value, std = np.where(fresh, loss.value, math.nan), np.where(fresh, observation.loss_std, math.nan)
        update_state(self._state, value, std, np.where(fresh, loss.count, 0), since, budget)

        active = (observation.weights > 0) & (self._prior > 0)
        if active.sum() < 2:
            return None
        share = math.fsum(observation.weights[active])  # exact, so not a matter of the domains' order
        weights = observation.weights[active] / share
        prior = self._prior[active] / math.fsum(self._prior[active])
        state = np.ascontiguousarray(self._state[:, active])
        domain, run = make_features(
            state, weights, prior, self._tokens[active], observation.seen[active], observation.epochs[active],
            self._fields[active], progress, self.preference, float(observation.tokens), budget,
        )  # fmt: skip
        u = forward(domain, run, weights, prior, self._parameters)
        moved = act(u, domain, run, weights, prior, bound(since, budget), self.floor, self.cap, self._parameters)
        out = observation.weights.copy()
        out[active] = share * moved
        return out

    def state_dict(self) -> dict[str, Any]:
        """The running averages: 11 numbers a domain. Exact, and at most 4 KB of JSON at 16 domains."""
        return {"averages": self._state.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        averages = np.array(state["averages"], dtype=np.float64)
        if averages.shape != self._state.shape:
            raise StateError(
                f"the agent's state has shape {list(averages.shape)}; expected {list(self._state.shape)}, a column for "
                "each domain of this run; resume with the manifest that the state was saved with"
            )
        self._state = averages
