"""Mixtures that stay as they are: the baselines, and what a user with a mixture of their own asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixloader.errors import ConfigError
from mixloader.mixture import as_weights
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register


class _Static:
    """Sets its mixture at `reset` and keeps it. Stateless, needs no signal."""

    needs: frozenset[str] = frozenset()

    def decide(self, observation: Observation) -> np.ndarray | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _normalised(amounts: np.ndarray, names: Sequence[str]) -> np.ndarray:
    weights = as_weights(amounts, names)
    return weights / weights.sum()


@register("natural")
class Natural(_Static):
    """Every domain in proportion to its tokens: one pass over everything takes one epoch of each."""

    def reset(self, domains: DomainTable) -> np.ndarray:
        return _normalised(domains.tokens, domains.names)


@register("uniform")
class Uniform(_Static):
    """Every domain the same."""

    def reset(self, domains: DomainTable) -> np.ndarray:
        return _normalised(np.ones(len(domains)), domains.names)


@register("temperature")
class Temperature(_Static):
    """Every domain in proportion to its tokens to the power 1 / temperature: 1 is natural, infinity uniform.

    temperature: 3.33, an exponent of 0.3, as in XLM-R (arXiv 1911.02116) and mT5 (arXiv 2010.11934).
    Raises ConfigError for one that is not above 0.
    """

    def __init__(self, temperature: float = 1 / 0.3):
        if not temperature > 0:
            raise ConfigError(f"the temperature is {temperature}; expected a number above 0")
        self.temperature = temperature

    def reset(self, domains: DomainTable) -> np.ndarray:
        parts = domains.tokens / max(domains.tokens.max(), 1)
        return _normalised(np.where(domains.tokens > 0, parts ** (1 / self.temperature), 0.0), domains.names)


@register("unimax")
class UniMax(_Static):
    """Every domain the same, but none read more than `max_epochs` times (Chung et al., arXiv 2304.09151, algorithm 1).

    Water-filling: from the smallest domain on, each gets an even part of the budget that is left, or max_epochs
    times its tokens where that is less. If all run into the cap, they get their shares of that.
    max_epochs: 4, up to which repeated tokens are nearly as good as new ones (Muennighoff et al., arXiv 2305.16264);
        the paper tries 1, 5 and 10. budget: tokens of the whole run; by default the Mixer's, which the first decision
        knows: until then the run is uniform. Without either, decisions raise ConfigError.
    """

    def __init__(self, max_epochs: float = 4, budget: int | None = None):
        if not max_epochs > 0 or (budget is not None and not budget > 0):
            raise ConfigError(f"max_epochs is {max_epochs} and budget {budget}; expected numbers above 0")
        self.max_epochs, self.budget = max_epochs, budget

    def reset(self, domains: DomainTable) -> np.ndarray:
        self._domains = domains
        return _normalised(domains.tokens > 0 if self.budget is None else self._filled(self.budget), domains.names)

    def decide(self, observation: Observation) -> np.ndarray | None:
        if self.budget is not None:
            return None
        if not observation.progress > 0:
            raise ConfigError(
                "policy 'unimax' caps epochs over the whole run, whose length is not known; give the Mixer a "
                "token_budget, or the policy a budget"
            )
        # A run past its budget would seem to have a larger one at each decision; what it has is what it has read.
        budget = observation.tokens / observation.progress if observation.progress < 1 else observation.tokens
        tokens = np.where(observation.weights > 0, self._domains.tokens, 0)
        return _normalised(self._filled(budget, tokens), self._domains.names)

    def _filled(self, budget: float, tokens: np.ndarray | None = None) -> np.ndarray:
        """float64 [D]: tokens to read of each domain, those of `tokens` at most max_epochs times."""
        limit = self.max_epochs * np.asarray(self._domains.tokens if tokens is None else tokens, dtype=np.float64)
        rising = np.sort(limit)
        below = np.concatenate([[0.0], np.cumsum(rising)[:-1]])  # read of the smaller ones if all are at their cap
        even = (budget - below) / np.arange(len(rising), 0, -1)
        uncapped = rising > even
        return np.minimum(limit, even[uncapped.argmax()]) if uncapped.any() else limit


@register("fixed")
class Fixed(_Static):
    """The user's own mixture.

    weights: as in `mixture.as_weights`; a mapping by name (absent names get zero) or one number a domain.
    Raises WeightsError at `reset` if they do not fit the domains.
    """

    def __init__(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray):
        self.weights = weights

    def reset(self, domains: DomainTable) -> np.ndarray:
        return _normalised(as_weights(self.weights, domains.names), domains.names)


@register("fields")
class Fields(_Static):
    """A fixed share for the source field, the rest for the target field; natural inside each.

    source: share of the source field in [0, 1]. Domains without a field get zero.
    Raises ConfigError for another share, and at `reset` for a field that gets a share but has no domain.
    """

    def __init__(self, source: float = 0.5):
        if not 0 <= source <= 1:
            raise ConfigError(f"the share of the source field is {source}; expected a number from 0 to 1")
        self.source = source

    def reset(self, domains: DomainTable) -> np.ndarray:
        weights = np.zeros(len(domains))
        for field, share in (("source", self.source), ("target", 1 - self.source)):
            tokens = np.where([name == field for name in domains.fields], domains.tokens, 0)
            if share > 0 and not tokens.any():
                raise ConfigError(
                    f"policy 'fields' gives {share:g} of the mixture to the {field} field, but no domain of that "
                    f'field has tokens; mark domains with "field": "{field}" in the manifest or use another policy'
                )
            if share > 0:
                weights += share * tokens / tokens.sum()
        return weights
