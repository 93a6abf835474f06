"""Excess losses: more of the domains whose loss is farthest from where it should be.

One rule for three papers, an exponentiated step with a uniform floor, p <- (1 - c) softmax(log p + eta s) + c / K:

- DoReMi (Xie et al., arXiv 2305.10429, algorithm 1): s_k is the mean over tokens of max(0, loss - reference loss).
- Dynamic batch loading of Sheared LLaMA (Xia et al., arXiv 2310.06694, algorithm 1): s_k = L_k - L*_k, not clipped.
- Velocitune (Luo et al., arXiv 2411.14318): s_k = clip((L_k - L*_k) / (L0_k - L*_k), 0, 1), L0 the losses at the start.

Losses are nats a token, weights float64 [D]. All act through sampling here; the papers' released DoReMi instead
weights the losses of evenly sampled batches, which objective weights do for any policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register
from mixloader.policies.update import Exponentiated, by_name, domain_numbers, latest_losses
from mixloader.signals import numbers_to_json


@register("doremi")
class DoReMi(Exponentiated):
    """More of the domains that could still get closest to a reference model. Its result is `average`.

    reference_losses: by domain name, nats a token; for domains whose excess over a reference model is not measured
        token by token (the signal "excess"). It is then the domain's mean that is clipped at 0, not each token's: less
        than the paper's excess wherever some tokens are better than the reference's.
    eta, floor: 1 and 1e-3 (its script for the Pile; the code's default is 1e-4), per optimizer step. Its authors
        advise eta 0.1 where weights run to one domain (issue 5 of its repository).

    A domain that was not in the last batches counts with its last excess, as in the source; one without a reference
    keeps its weight.
    """

    name = "doremi"

    def __init__(
        self,
        reference_losses: Mapping[str, float] | None = None,
        eta: float = 1.0,
        floor: float = 1e-3,
        update_steps: float = 1,
    ):
        super().__init__(eta, floor, update_steps)
        self.reference_losses = reference_losses
        self.needs = frozenset({"excess"} if reference_losses is None else {"loss"})

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Raises ConfigError for a reference loss of something that is no domain."""
        self._reference = by_name(self.reference_losses or {}, domains.names, "reference_losses")
        return super().reset(domains)

    def scores(self, observation: Observation) -> np.ndarray:
        """Excess losses, nats a token, float64 [D] >= 0."""
        excess = np.maximum(observation.loss.value - self._reference, 0.0)
        if observation.excess is None:
            return excess
        return np.where(np.isnan(observation.excess.value), excess, observation.excess.value)


@register("dbl")
class DynamicBatchLoading(Exponentiated):
    """More of the domains that are farthest above the loss they should reach.

    target_losses: by domain name, nats a token; a domain without one keeps its weight.
    eta, floor, update_steps: 1 and 1e-4 at each evaluation, every 50 steps in its pruning stage (400 in the other).

    The losses are those that evaluations report by domain name, as in the source; training losses, which are noisier
    and higher early on, for domains that none reports. Between evaluations the last one counts.
    """

    name = "dbl"
    needs = frozenset({"loss"})

    def __init__(
        self, target_losses: Mapping[str, float], eta: float = 1.0, floor: float = 1e-4, update_steps: float = 50
    ):
        super().__init__(eta, floor, update_steps)
        self.target_losses = target_losses

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Raises ConfigError for a target loss of something that is no domain."""
        self._target = by_name(self.target_losses, domains.names, "target_losses")
        return super().reset(domains)

    def scores(self, observation: Observation) -> np.ndarray:
        """Nats a token that each loss is above its target, float64 [D]."""
        return latest_losses(observation, self.domains.names) - self._target


@register("velocitune")
class Velocitune(DynamicBatchLoading):
    """More of the domains that have come least far from where they began to where they should end.

    target_losses, update_steps: as for "dbl". No floor in the paper; the interval of its evaluations is not known to
    us, so it is that of "dbl".
    initial_losses: by domain name, nats a token; by default the first loss seen of each domain.
    A domain that began at its target or below counts as done while it stays there, and else as not begun.
    """

    name = "velocitune"

    def __init__(
        self,
        target_losses: Mapping[str, float],
        initial_losses: Mapping[str, float] | None = None,
        eta: float = 1.0,
        floor: float = 0.0,
        update_steps: float = 50,
    ):
        super().__init__(target_losses, eta, floor, update_steps)
        self.initial_losses = initial_losses

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Raises ConfigError for a target or initial loss of something that is no domain."""
        self._initial = by_name(self.initial_losses or {}, domains.names, "initial_losses")
        return super().reset(domains)

    def scores(self, observation: Observation) -> np.ndarray:
        """The part of its way that each domain has still to go, float64 [D] in [0, 1]."""
        losses = latest_losses(observation, self.domains.names)
        self._initial = np.where(np.isnan(self._initial), losses, self._initial)
        way = np.maximum(self._initial - self._target, math.ulp(1.0))
        return np.clip((losses - self._target) / way, 0.0, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """With the initial losses. JSON-able and exact."""
        return {**super().state_dict(), "initial": numbers_to_json(self._initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._initial = domain_numbers(state["initial"], len(self.domains), self.name)
