"""Cross-domain effects: more of the domains that help the others, by a matrix of who helps whom.

A_ij is how far the loss of domain i falls when domain j is read. Aioli learns it anew in every round of the run;
Skill-It has it from before the run (or learns it once, at the beginning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixloader.errors import ConfigError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register
from mixloader.policies.sweep import Plan, Sweep
from mixloader.policies.update import check_options, domain_numbers, exponentiated, latest_losses, moved
from mixloader.signals import numbers_to_json

Graph = Mapping[str, Mapping[str, float]] | Sequence[Sequence[float]] | np.ndarray


def normalised(matrix: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Aioli's normalisation of A over the active domains: shifted to be >= 0 if any entry is not, to a sum of 1."""
    block = matrix[np.ix_(active, active)]
    block = block - min(block.min(), 0.0)
    out = np.zeros_like(matrix)
    if block.sum() > 0:
        out[np.ix_(active, active)] = block / block.sum()
    return out


@register("aioli")
class Aioli:
    """Aioli (Chen et al., arXiv 2411.05735, algorithm 1): p_j <- p_j exp(eta sum_i A_ij) with A learned in the run.

    In each round of update_steps plan steps, trials come first (`sweep.Sweep`): rounds * K of them, trial_steps long;
    then A is solved for, normalised (`normalised`), and the rest of the round trains on the new mixture.
    eta 0.2, ema 0.1, rounds 4, trial_steps 4, update_steps 250, one_hot 0.625: defaults of its code.
    ema: its code with an average, A <- (1 - ema) A + ema A_before, takes each mixture from the initial one (here the
        prior) instead of from the last; None for the paper's rule.
    seed: of the order of trials.

    A trial lasts at least one decision, and the trials of K domains take 16 K steps by default: with many domains they
    outlast the round, and the next begins at once. Losses are those of training rows unless evaluations report every
    domain by name, where the source evaluates after each trial.
    """

    needs = frozenset({"loss"})

    def __init__(
        self,
        eta: float = 0.2,
        ema: float | None = 0.1,
        rounds: int = 4,
        trial_steps: int = 4,
        update_steps: int = 250,
        one_hot: float = 0.625,
        seed: int = 0,
    ):
        check_options(
            "aioli", eta=(eta, 0, math.inf), ema=(ema or 0.0, 0, 1), rounds=(rounds, 1, math.inf),
            trial_steps=(trial_steps, 1, math.inf), update_steps=(update_steps, 1, math.inf), one_hot=(one_hot, 0, 1),
        )  # fmt: skip
        self.eta, self.ema, self.update_steps, self.seed = float(eta), ema, update_steps, seed
        self.plan = Plan(trial_steps, rounds, one_hot)

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget A; the run begins at the weights it has, and the first trial with the first decision."""
        self.domains = domains
        self.sweep = Sweep(domains.names, self.plan, self.seed)
        self._next_round = 0
        self._mixture = np.full(len(domains), math.nan)  # that of the rounds, without the trials
        self._help: np.ndarray | None = None  # the average of sum_i A_ij
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        active, effect = observation.weights > 0, observation.effect_step
        if np.count_nonzero(active) < 2:
            return None
        self.sweep.observe(observation, active)
        weights = None
        self.sweep.advance(effect, active)
        if self.sweep.is_complete(observation):
            weights = self._update(normalised(self.sweep.solve(active), active), active, observation)
        elif self.sweep.waiting:
            weights = self._mixture.copy()
        if not self.sweep.trying and not self.sweep.waiting and effect >= self._next_round:
            self._mixture = observation.weights.copy() if weights is None else weights
            self._next_round = effect + self.update_steps
            self.sweep.begin(effect)
        return self.sweep.mixture(active) if self.sweep.trying else weights

    def _update(self, matrix: np.ndarray, active: np.ndarray, observation: Observation) -> np.ndarray:
        help_ = matrix.sum(axis=0)
        # A domain never measured has never been tried, either: it keeps its share.
        known = active & (observation.loss.age >= 0)
        start = self._mixture
        if self.ema is not None:
            self._help = help_ if self._help is None else (1 - self.ema) * help_ + self.ema * self._help
            help_ = self._help
            prior = np.where(active, self.domains.prior, 0.0)
            start = prior / prior.sum() if prior.any() else start
        weights = exponentiated(start, np.where(known, self.eta * help_, math.nan), 1.0)
        self._mixture = start if weights is None else weights
        return self._mixture.copy()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact; see Sweep.state_dict for its size."""
        return {
            "sweep": self.sweep.state_dict(),
            "next_round": self._next_round,
            "mixture": numbers_to_json(self._mixture),
            "help": None if self._help is None else self._help.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        self._mixture = domain_numbers(state["mixture"], len(self.domains), "aioli")
        self.sweep.load_state_dict(state["sweep"])
        self._next_round = state["next_round"]
        self._help = None if state["help"] is None else np.array(state["help"])


@register("skillit")
class SkillIt:
    """Skill-It (Chen et al., arXiv 2307.14430, algorithm 1): p_j is proportional to p0_j exp(eta sum_i G_ji S_i).

    S_i is the sum of the last `window` losses of domain i, one every update_steps plan steps; p0 the prior; G_ji the
    edge from j to i, how much reading j helps i.
    graph: a mapping {from: {to: edge}} by domain name (absent edges are 0), or [D, D] in the order of the domains. By
        default it is learned in one sweep at the beginning (`sweep.Sweep`), normalised as Aioli's and scaled to a
        largest edge of 1; its authors train one model a domain for it.
    eta 0.2, window 3, update_steps 400: of its run in Aioli's repository.
    rounds, trial_steps, one_hot, seed: of the sweep, as for "aioli".
    Losses are held-out ones where evaluations report them by domain name, as in the source, else training losses.
    """

    needs = frozenset({"loss"})

    def __init__(
        self,
        graph: Graph | None = None,
        eta: float = 0.2,
        window: int = 3,
        update_steps: int = 400,
        rounds: int = 4,
        trial_steps: int = 4,
        one_hot: float = 0.625,
        seed: int = 0,
    ):
        check_options(
            "skillit", eta=(eta, 0, math.inf), window=(window, 1, math.inf), update_steps=(update_steps, 1, math.inf),
            rounds=(rounds, 1, math.inf), trial_steps=(trial_steps, 1, math.inf), one_hot=(one_hot, 0, 1),
        )  # fmt: skip
        self.graph, self.eta, self.window, self.update_steps = graph, float(eta), window, update_steps
        self.plan, self.seed = Plan(trial_steps, rounds, one_hot), seed

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget the losses, and a graph that was learned. Raises ConfigError for one given that does not fit."""
        self.domains = domains
        self._edges = None if self.graph is None else _edges(self.graph, domains.names)
        self.sweep = Sweep(domains.names, self.plan, self.seed)
        self._losses: list[np.ndarray] = []
        self._next_update = 0
        self._mixture = np.full(len(domains), math.nan)
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        active = observation.weights > 0
        if np.count_nonzero(active) < 2:
            return None
        trial = self._learn(observation, active) if self._edges is None else None
        if trial is not None:
            return trial
        if self._edges is None or observation.effect_step < self._next_update:
            return None
        self._next_update = observation.effect_step + self.update_steps
        self._losses = [*self._losses, latest_losses(observation, self.domains.names)][-self.window :]
        total = np.sum(self._losses, axis=0)
        known = active & np.isfinite(total) & (self.domains.prior > 0)
        weights = observation.weights if np.isnan(self._mixture).all() else self._mixture  # not the last trial's
        weights = np.where(active, weights, 0.0)
        weights, self._mixture = weights / weights.sum(), np.full(len(active), math.nan)
        if np.count_nonzero(known) < 2:
            return weights
        logits = self.eta * (self._edges[np.ix_(known, known)] @ total[known])
        return moved(weights, known, self.domains.prior[known] * np.exp(logits - logits.max()))

    def _learn(self, observation: Observation, active: np.ndarray) -> np.ndarray | None:
        """The mixture of the next trial, or that from before while the last is read out; None when all is known."""
        sweep, effect = self.sweep, observation.effect_step
        sweep.observe(observation, active)
        if not sweep.trying and not sweep.waiting:
            self._mixture = observation.weights.copy()
            sweep.begin(effect)
            return sweep.mixture(active)
        sweep.advance(effect, active)
        if sweep.is_complete(observation):
            edges = normalised(sweep.solve(active), active).T
            self._edges = edges / edges.max() if edges.any() else edges
            return None
        return sweep.mixture(active) if sweep.trying else self._mixture.copy()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact; D squared numbers for a graph that was learned."""
        learned = self.graph is None and self._edges is not None
        return {
            "sweep": self.sweep.state_dict() if self.graph is None else None,
            "edges": self._edges.tolist() if learned and self._edges is not None else None,
            "losses": [numbers_to_json(losses) for losses in self._losses],
            "next_update": self._next_update,
            "mixture": numbers_to_json(self._mixture),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        n_domains = len(self.domains)
        self._mixture = domain_numbers(state["mixture"], n_domains, "skillit")
        self._losses = [domain_numbers(losses, n_domains, "skillit") for losses in state["losses"]]
        if state["sweep"] is not None:
            self.sweep.load_state_dict(state["sweep"])
        if self.graph is None:
            self._edges = None if state["edges"] is None else np.array(state["edges"])
        self._next_update = state["next_update"]


def _edges(graph: Graph, names: tuple[str, ...]) -> np.ndarray:
    """float64 [D, D], from row to column."""
    if isinstance(graph, Mapping):
        index = {name: d for d, name in enumerate(names)}
        edges = np.zeros((len(names), len(names)))
        for start, ends in graph.items():
            for end, edge in ends.items():
                if start not in index or end not in index:
                    raise ConfigError(
                        f"the graph has an edge from {start!r} to {end!r}; the domains are {', '.join(names)}"
                    )
                edges[index[start], index[end]] = edge
    else:
        edges = np.array(graph, dtype=np.float64)
        if edges.shape != (len(names), len(names)):
            raise ConfigError(f"the graph has shape {list(edges.shape)}; expected {[len(names)] * 2}")
    if not np.isfinite(edges).all():
        raise ConfigError("the graph has an edge that is no finite number")
    return edges
