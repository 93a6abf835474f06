"""The learned policy: reads what is measured of the domains, moves their weights. Set it with `policy="agent"`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.agent.action import CAP, FLOOR, act
from mixloader.agent.feature_maker import FeatureMaker
from mixloader.agent.features import OF_SIGNALS
from mixloader.agent.network import Parameters, Ranges, forward, load_parameters, read_tensors
from mixloader.agent.transformer import KIND, History, HistoryNetwork
from mixloader.errors import ConfigError, StateError
from mixloader.observation import DomainTable, Observation, Signal
from mixloader.policies.base import register

SHIPPED = Path(__file__).with_name("agent.safetensors")
"""The parameters that come with the package; CARD.md beside them says how they were made."""


@register("agent")
class Agent:
    """Balances keeping the source field with learning the target field.

    It reads training losses; influence of the domains on the fields and feedback of evaluations where they come, as far
    as its weights know these signals (`uses`).

    preference: the weight on keeping the source field, in [0, 1] (the lambda of the score
        lambda * mean source improvement + (1 - lambda) * mean target improvement).
    floor: every domain keeps at least this part of its prior weight. cap: no domain gets more than this, or than
        its prior weight where that is larger.
    parameters: another file of weights than the shipped one; what it says of itself decides which network it is for,
        that of network.py or that of transformer.py.
    model_size: number of parameters of the model that is trained, if it shall be known.
    use_influence, use_feedback: False ignores that signal where it comes.

    Domains whose weight or prior is zero keep the weight they have. What is far from the agent's training
    is led back to the prior (see `action.act`). Without a token budget it takes the run to be half done.
    """

    needs: frozenset[str] = frozenset({"loss"})

    def __init__(
        self,
        preference: float = 0.5,
        floor: float = FLOOR,
        cap: float = CAP,
        parameters: str | Path | None = None,
        model_size: float | None = None,
        use_influence: bool = True,
        use_feedback: bool = True,
    ):
        for name, value in (("preference", preference), ("floor", floor), ("cap", cap)):
            if not 0 <= value <= 1:
                raise ConfigError(f"the agent's {name} is {value}; expected a number from 0 to 1")
        if floor >= 1 or cap < 0.5:
            raise ConfigError(f"floor {floor} and cap {cap} leave no room; expected floor < 1 and cap >= 0.5")
        if model_size is not None and not 1 <= model_size < math.inf:
            raise ConfigError(f"the agent's model_size is {model_size}; expected the number of parameters, or None")
        self.preference, self.floor, self.cap = float(preference), float(floor), float(cap)
        self.model_size = model_size
        path = Path(parameters) if parameters else SHIPPED
        self._network: Parameters | HistoryNetwork
        self._ranges: Parameters | Ranges  # what `act` asks of the network
        if read_tensors(path)[1].get("network") == KIND:
            self._network = HistoryNetwork.load(path)
            self._ranges = self._network.ranges
        else:
            self._network = self._ranges = load_parameters(path)
        known = set(self._network.features)
        wanted = {"influence": use_influence, "feedback": use_feedback}
        self.uses = frozenset(name for name, of in OF_SIGNALS.items() if wanted[name] and known.intersection(of))
        """Signals that it does without, but decides better with."""
        self._maker = FeatureMaker("influence" in self.uses, "feedback" in self.uses)
        self._compile()

    def _compile(self) -> None:
        """Decide once for two invented domains, so that no decision of a run waits for the compiler."""
        half, zero = np.full(2, 0.5), np.zeros(2, dtype=np.int64)
        self.reset(DomainTable(("a", "b"), ("source", "target"), (None, None), zero + 9, half))
        loss = Signal(half, zero + 1, zero)
        self.decide(Observation(0, 1, 2, 2, 0.5, half, zero + 1, half, loss, half))

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget everything seen; the run begins at the prior. Raises ConfigError if no domain has a field."""
        if not any(field in ("source", "target") for field in domains.fields):
            raise ConfigError(
                "policy 'agent' needs to know what to keep and what to learn, but no domain has a field; mark domains "
                'with "field": "source" or "target" in the manifest, or use another policy'
            )
        self._maker.reset(domains, self.preference, self.model_size)
        self._history = History(self._network, len(domains)) if isinstance(self._network, HistoryNetwork) else None
        return None

    def extend(self, domains: DomainTable) -> np.ndarray | None:
        """Go on with more domains at the end of the table, or another prior; nothing seen is forgotten.

        Raises StateError if it is another table.
        """
        before = self._maker.table.names
        if domains.names[: len(before)] != before:
            raise StateError(
                f"the agent cannot go on with domains {', '.join(domains.names)} after {', '.join(before)}; expected "
                "these and more at the end"
            )
        self._maker.extend(domains)
        if self._history is not None:
            self._history.extend(len(domains))
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        """The next mixture, float64 [D]; None while nothing was read or no two domains can be traded."""
        if observation.tokens_since <= 0:
            return None
        maker = self._maker
        domain, run = maker.see(observation)
        active = maker.active
        if active.sum() < 2:
            return None
        u = self._answer(domain, run, observation.tokens)
        bounds = (maker.limit, self.floor, self.cap)
        moved = act(u, domain[active], run, maker.weights, maker.prior, *bounds, self._ranges)
        out = observation.weights.copy()
        out[active] = maker.share * moved
        return out

    def _answer(self, domain: np.ndarray, run: np.ndarray, tokens: int) -> np.ndarray:
        """The network's numbers for the active domains, float32 [A]."""
        maker, active = self._maker, self._maker.active
        if self._history is None:
            return forward(domain[active], run, maker.weights, maker.prior, self._network)
        weights = np.zeros(len(active))
        weights[active] = maker.weights
        return self._history.answer(domain, run, weights, maker.table.prior, tokens, maker.budget)[active]

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of the run. Exact, and at most 5 KB of JSON at 16 domains."""
        state = self._maker.state_dict()
        return state if self._history is None else {**state, "history": self._history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        self._maker.load_state_dict(state)
        if self._history is not None:
            self._history.load_state_dict(state["history"])
