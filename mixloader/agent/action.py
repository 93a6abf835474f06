"""From the network's numbers to weights: a bounded residual on the previous mixture, floored and capped.

The bound on a change of log weight is proportional to the tokens read since the last decision, so two decisions
over half the tokens each may go as far as one over all of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixloader.agent.compiled import FIXED_ONE, compiled, fixed
from mixloader.agent.features import GLOBAL_FEATURES

RATE = 24.0
"""Largest change of a log weight over a whole run; 1/24 of the run may change it by 1."""

LARGEST = 1.0
"""Largest change of a log weight in one decision, however many tokens it covers."""

FLOOR = 0.1
"""By default, the part of its prior weight that every domain keeps."""

CAP = 0.95
"""By default, the most that one domain gets, or its prior weight where that is larger."""

MARGIN = 0.5
"""A feature is strange when it lies outside its training range by more than this part of the range's width."""

_SIZE = GLOBAL_FEATURES.index("log_size")


@compiled
def bound(tokens_since, budget):
    """How far a log weight may move in one decision."""
    return min(RATE * tokens_since / budget, LARGEST)


@compiled
def project(weights, prior, floor, cap):
    """Scale weights [D] > 0 to sum 1, each held between floor * prior and max(cap, prior).

    Idempotent, unlike mixing with the prior, so the floor does not act twice when decisions come twice as often.
    prior sums to 1. Returns float64 [D].
    """
    n_domains = len(weights)
    if n_domains == 1:
        return np.ones(1)
    total = 0
    for d in range(n_domains):
        total += fixed(weights[d])
    out = weights * (FIXED_ONE / total)
    inside = True
    for d in range(n_domains):
        inside = inside and floor * prior[d] <= out[d] <= max(cap, prior[d])
    if inside:
        return out
    # The clipped sum grows with the scale: bisect on its logarithm.
    low, high = -40.0, 40.0
    clipped = out.copy()
    for _ in range(60):
        middle = 0.5 * (low + high)
        scale = np.exp(middle)
        total = 0
        for d in range(n_domains):
            clipped[d] = min(max(scale * out[d], floor * prior[d]), max(cap, prior[d]))
            total += fixed(clipped[d])
        if total < FIXED_ONE:
            low = middle
        else:
            high = middle
    return clipped * (FIXED_ONE / total)


@compiled
def _strange(value, low, high):
    margin = MARGIN * (high - low) + 0.1
    # A missing signal leaves a feature at 0, which is nothing strange.
    return value != 0 and not (low - margin <= value <= high + margin)  # a NaN is strange


@compiled
def act(u, domain, run, weights, prior, limit, floor, cap, p):
    """The next weights, float64 [D], from the network's output u, float32 [D].

    A domain with a strange feature is led back to its prior weight by the same bounded steps instead of being
    led by the network; all of them are if a feature of the run is strange. A larger model than those of training is
    not: that is what the agent is for.
    """
    n_domains, split = len(domain), len(p.domain_columns)
    run_strange = False
    for i in range(len(p.run_columns)):
        column = p.run_columns[i]
        if column != _SIZE:
            run_strange = run_strange or _strange(run[column], p.low[split + i], p.high[split + i])
    moved = np.empty(n_domains)
    for d in range(n_domains):
        strange = run_strange
        for i in range(split):
            strange = strange or _strange(domain[d, p.domain_columns[i]], p.low[i], p.high[i])
        if strange:
            moved[d] = weights[d] * np.exp(min(max(np.log(prior[d] / weights[d]), -limit), limit))
        else:
            moved[d] = weights[d] * np.exp(limit * np.tanh(float(u[d])))
    return project(moved, prior, floor, cap)


def soft_step(u: Tensor, weights: Tensor, limit: Tensor, mask: Tensor) -> Tensor:
    """The residual step without floor, cap and fallback, differentiable: u, weights [B, D], limit [B, 1]."""
    logits = torch.log(weights.clamp_min(1e-12)) + limit * torch.tanh(u)
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)
