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
