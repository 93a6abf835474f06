"""Actions that the data need not contain, on which conservative Q-learning looks for values that are too high.

On a box, the usual proposals are uniform, with their density divided out. On a simplex the densities differ by tens of
nats from one domain count to the next and would drown the values, so these are a fixed set without densities (the
form CQL(rho) of Kumar et al., arXiv 2006.04779, section 3.2). Most of them lie where an actor can go: one bounded step
from the weights in force; some lie anywhere, as the data do.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from mixloader.agent.offline.transitions import States

REACHABLE, NEAR_DATA, ANYWHERE = 4, 2, 2
"""Proposals a state: random steps of the actor's size, neighbours of the action that was taken, and any mixture."""

_NEAR = 0.3  # standard deviation of a neighbour's log weights


def propose(states: States, action: Tensor, generator: Generator) -> Tensor:
    """Mixtures [K, B, D], zero where padded, K = REACHABLE + NEAR_DATA + ANYWHERE."""
    shape = states.weights.shape

    def normal(count: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    # A random step of every size up to the limit, in a direction of its own.
    size = torch.rand(REACHABLE, shape[0], 1, generator=generator)
    steps = move(states, torch.tanh(normal(REACHABLE)) * size)
    near = _normalised(torch.log(action.clamp_min(1e-6)) + _NEAR * normal(NEAR_DATA), states.mask)
    # Exponential variables over their sum are uniform on the simplex.
    anywhere = _normalised(
        torch.log(torch.empty(ANYWHERE, *shape).exponential_(generator=generator).clamp_min(1e-12)), states.mask
    )
    return torch.cat([steps, near, anywhere])


def move(states: States, part: Tensor) -> Tensor:
    """The weights after log weights have moved by `part` [..., B, D] in [-1, 1] of the limit."""
    return _normalised(torch.log(states.weights.clamp_min(1e-12)) + states.limit[:, None] * part, states.mask)


def _normalised(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)
