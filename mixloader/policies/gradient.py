"""Gradient alignment: more of the domains whose gradient points where the loss that counts would fall.

All read the same sketches (Observation.influence, gram, row_norm_sq) where the papers take whole gradients or those
of the last layer: an inner product of sketches is an unbiased estimate of that of the gradients, up to the layers that
are sketched. A domain's gradient is the mean over its latest rows, not that of one batch, and a row's is that of the
sum of its token losses; so only ratios of gradients mean anything, and where a paper uses absolute sizes its rule says
so.

Notation: g_k the mean row gradient of domain k, g_f the mean gradient of field f, G the gram of the g_k. Where a paper
has one target, `preference` (as in policy "agent") makes one of the two fields: preference * source + (1 - preference)
* target. A field that was never measured is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from mixloader.errors import ConfigError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register
from mixloader.policies.update import Exponentiated, by_name, check_options, exponentiated, moved, steps_since


def by_field(observation: Observation, preference: float, scaled: bool, norms: np.ndarray | None = None) -> np.ndarray:
    """float64 [D]: influence on the fields, weighted by the preference; NaN where a domain was not measured.

    scaled: each field's column is divided by its largest magnitude first, so that a field with large gradients does
    not outweigh the other. norms: float64 [D], of the domains' gradients, by which they are divided before that.
    """
    n_domains = len(observation.weights)
    if observation.influence is None:
        return np.full(n_domains, math.nan)
    columns = observation.influence.value
    if norms is not None:
        columns = columns / np.where(norms > 0, norms, math.nan)[:, None]
    wanted = {"source": preference, "target": 1.0 - preference}
    parts = np.array([wanted.get(name, 0.0) for name in observation.influence_fields])
    parts = np.where(np.isfinite(columns).any(axis=0), parts, 0.0)
    used = parts > 0
    if not used.any():
        return np.full(n_domains, math.nan)
    columns, parts = columns[:, used], parts[used] / parts.sum()
    if scaled:
        largest = np.nanmax(np.abs(columns), axis=0)
        columns = columns / np.where(largest > 0, largest, 1.0)
    return columns @ parts


def squared_norms(observation: Observation) -> np.ndarray:
    """float64 [D]: ||g_k||^2 >= 0; NaN where not measured. Corrected for noise, it may have come out below zero."""
    if observation.gram is None:
        return np.full(len(observation.weights), math.nan)
    return np.maximum(observation.gram.value.diagonal(), 0.0)


def measured_gram(observation: Observation) -> tuple[np.ndarray, np.ndarray]:
    """The gram of the domains, float64 [D, D], 0 where a pair was not measured, and bool [D]: which were measured."""
    n_domains = len(observation.weights)
    if observation.gram is None:
        return np.zeros((n_domains, n_domains)), np.zeros(n_domains, dtype=bool)
    gram, square = np.nan_to_num(observation.gram.value, nan=0.0), squared_norms(observation)
    np.fill_diagonal(gram, np.nan_to_num(square, nan=0.0))
    return gram, np.isfinite(square)


@register("influence")
class Influence(Exponentiated):
    """Plain exponentiated weights on the influence matrix: an untrained yardstick for the agent.

    s_k = the influence of domain k on preference * source + (1 - preference) * target, over the largest |s|;
    p <- (1 - floor) softmax(log p + eta s) + floor / K, once per update_steps plan steps. The fields are not scaled
    alike first: what a field still has to gain is in its gradient (with each over its largest, the field that the model
    knows already took two thirds of the tokens in docs/compare.md's scenario, and the balanced loss was 0.06 worse).
    No paper's rule; the constants are those of this project's first experiments with a small model.
    """

    name = "influence"
    needs = frozenset({"influence"})

    def __init__(self, preference: float = 0.5, eta: float = 0.5, floor: float = 0.04, update_steps: float = 10):
        super().__init__(eta, floor, update_steps)
        check_options(self.name, preference=(preference, 0, 1))
        self.preference = float(preference)

    def scores(self, observation: Observation) -> np.ndarray:
        """In [-1, 1], float64 [D]."""
        scores = by_field(observation, self.preference, scaled=False)
        largest = np.max(np.abs(scores), initial=0.0, where=np.isfinite(scores))
        return scores / largest if largest > 0 else scores


@register("doge")
class DoGE(Exponentiated):
    """DoGE (Fan et al., arXiv 2310.15393, equation 4): s_k = clip(<g_k, g_val> / mean_j ||g_j||, 0, 5) of clipped g.

    toward: "fields", its mode for a target domain, with g_val by the preference; or "domains", its universal mode,
        where g_val is the mean over all domains, here of training rows instead of held-out ones.
    eta: learning rate over mu, 5e-4 / 0.01 as in its 82M script, per optimizer step; the learning rate's schedule is
        not followed. No floor. `average` is what it hands from its proxy to the run proper.

    The original clips every gradient to norm 1 first, as nearly all exceed it, so s_k is a cosine that is not negative;
    here it is that. The norm of a field's gradient is not among the signals: it is taken as the least it can be, so
    that the best domain's cosine is 1, which makes larger steps. The original also trains its proxy on the reweighted
    gradients, while here the mixture is what is sampled.
    """

    name = "doge"
    needs = frozenset({"influence"})

    def __init__(
        self,
        preference: float = 0.5,
        toward: Literal["fields", "domains"] = "fields",
        eta: float = 0.05,
        floor: float = 0.0,
        update_steps: float = 1,
    ):
        super().__init__(eta, floor, update_steps)
        check_options(self.name, preference=(preference, 0, 1))
        if toward not in ("fields", "domains"):
            raise ConfigError(f"policy 'doge' cannot go toward {toward!r}; expected 'fields' or 'domains'")
        self.preference, self.toward = float(preference), toward

    def scores(self, observation: Observation) -> np.ndarray:
        """In [0, 1], float64 [D]."""
        norms = np.sqrt(squared_norms(observation))
        if self.toward == "fields":
            return np.maximum(by_field(observation, self.preference, scaled=True, norms=norms), 0.0)
        known = norms > 0
        unit = np.where(known, 1.0 / np.where(known, norms, 1.0), 0.0)
        cosines = unit * (measured_gram(observation)[0] @ unit) / max(np.count_nonzero(known), 1)
        return np.where(known, np.clip(cosines, 0.0, 1.0), math.nan)


@register("dga")
class DynamicGradientAlignment(Exponentiated):
    """DGA (Fan, Grangier, Ablin, arXiv 2410.02498): p <- (1 - beta) p + beta softmax(log p + eta s), s_k = <g_k, g_f>.

    s is divided by its root mean square over the domains, because sketches have a scale of their own; so eta is not
    the paper's step size. beta: of its moving average; 1 for none. update_steps: how often it re-estimates.
    eta, beta and update_steps are from memory and this project's experiments, not read in the paper.
    """

    name = "dga"
    needs = frozenset({"influence"})

    def __init__(self, preference: float = 0.5, eta: float = 0.5, beta: float = 0.1, update_steps: float = 10):
        super().__init__(eta, 0.0, update_steps)
        check_options(self.name, preference=(preference, 0, 1), beta=(beta, 0, 1))
        self.preference, self.beta = float(preference), float(beta)

    def scores(self, observation: Observation) -> np.ndarray:
        """float64 [D] with a mean square of 1."""
        scores = by_field(observation, self.preference, scaled=False)
        known = np.isfinite(scores)
        size = math.sqrt(np.mean(scores[known] ** 2)) if known.any() else 0.0
        return scores / size if size > 0 else scores

    def decide(self, observation: Observation) -> np.ndarray | None:
        updates = steps_since(observation) / self.update_steps
        step = exponentiated(observation.weights, self.eta * self.scores(observation), 1.0)
        if step is None or updates <= 0:
            return None
        kept = (1 - self.beta) ** updates
        return kept * observation.weights + (1 - kept) * step


@register("rb")
class RegroupBalance(Exponentiated):
    """The balancing half of R&B (arXiv 2505.00358): p = softmax(eta G q / ||G q||), anew at each decision.

    q: what the evaluation is made of. By default the preference's share of the source domains and the rest of the
        target domains, in proportion to the prior; the prior itself where no domain has a field.
    evaluation: q by domain name, instead. eta: the paper's lambda, whose value is not known to us.
    Nothing is remembered, so the interval between decisions does not matter.
    """

    name = "rb"
    needs = frozenset({"influence"})

    def __init__(self, preference: float = 0.5, evaluation: Mapping[str, float] | None = None, eta: float = 2.0):
        super().__init__(eta, 0.0, 1)
        check_options(self.name, preference=(preference, 0, 1))
        self.preference, self.evaluation = float(preference), evaluation

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Raises ConfigError if `evaluation` names something that is no domain."""
        if self.evaluation is not None:
            self._wanted = np.nan_to_num(by_name(self.evaluation, domains.names, "evaluation"), nan=0.0)
        else:
            self._wanted = _of_fields(domains, self.preference)
        return super().reset(domains)

    def decide(self, observation: Observation) -> np.ndarray | None:
        gram, measured = measured_gram(observation)
        aligned = gram @ np.where(measured, self._wanted, 0.0)
        part = measured & (observation.weights > 0)
        size = math.sqrt(np.sum(aligned[part] ** 2))
        if np.count_nonzero(part) < 2 or not size > 0:
            return None
        logits = self.eta * aligned[part] / size
        return moved(observation.weights, part, np.exp(logits - logits.max()))


def _of_fields(domains: DomainTable, preference: float) -> np.ndarray:
    """float64 [D] that sums to 1: the prior inside each field, the fields by the preference."""
    wanted = np.zeros(len(domains))
    for name, part in (("source", preference), ("target", 1.0 - preference)):
        inside = np.where([field == name for field in domains.fields], domains.prior, 0.0)
        if inside.sum() > 0:
            wanted += part * inside / inside.sum()
    return wanted / wanted.sum() if wanted.any() else domains.prior


@register("pike")
class PiKE(Exponentiated):
    """PiKE (Li et al., arXiv 2502.06244): p <- p exp(z1 ||g_k||^2 - z2 / (2 b) Var_k), normalised.

    Var_k: variance of one row's gradient about g_k, the sum over coordinates; b: rows of a batch. The exponent is
    divided by the mean over the domains of ||g_k||^2 + noise Var_k, since sketches have a scale of their own; so eta
    (z1) and noise (z2 / 2b over z1) are not the paper's numbers, which are not known to us.
    It seeks the fastest fall of the sum of all domains' losses under little conflict, so it knows no fields.
    """

    name = "pike"
    needs = frozenset({"influence"})

    def __init__(self, eta: float = 0.5, noise: float = 0.05, update_steps: float = 10):
        super().__init__(eta, 0.0, update_steps)
        check_options(self.name, noise=(noise, 0, math.inf))
        self.noise = float(noise)

    def scores(self, observation: Observation) -> np.ndarray:
        """float64 [D], of which the magnitudes average 1 at most."""
        square, total = squared_norms(observation), observation.row_norm_sq
        if total is None:
            return np.full(len(square), math.nan)
        spread = self.noise * np.maximum(total - square, 0.0)
        known = np.isfinite(square) & np.isfinite(spread)
        scale = (square + spread)[known].mean() if known.any() else 0.0
        return (square - spread) / scale if scale > 0 else np.full(len(square), math.nan)


def alignment_rewards(gram: np.ndarray) -> np.ndarray:
    """AC-ODM's reward of each domain (arXiv 2505.23878, equation 5): sum_{j != k} <g_k, g_j> / mean_j ||g_j||.

    gram: float64 [K, K]. Returns float64 [K], standardised over the domains (standard deviation with K - 1) and
    clamped to +-3 as in its code; zeros for one domain.
    """
    diagonal = gram.diagonal()
    rewards = (gram.sum(axis=1) - diagonal) / (np.sqrt(np.maximum(diagonal, 0.0)).mean() + 1e-6)
    return standardised(rewards)


def standardised(values: np.ndarray) -> np.ndarray:
    """float64 [K]: less the mean, over the standard deviation, clamped to +-3; zeros for one value."""
    if len(values) < 2:
        return np.zeros(len(values))
    return np.clip((values - values.mean()) / (values.std(ddof=1) + 1e-8), -3.0, 3.0)
