"""What an action is worth: critics over sets of domains, for fitting the agent to recorded runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES
from mixloader.agent.network import COLUMNS, feature_columns


class Critic(nn.Module):
    """Q(state, mixture) of a run, one number: the sum of what its domains add, by weight and prior.

    Two blocks as those of SetNetwork, with LayerNorm in each, over the same features and what the action does to a
    domain: log(a / w), log(a / prior), and a D with its square root, so that it tells mixtures apart near a corner of
    the simplex and in its middle. Permuting the domains changes nothing; two halves of a domain count as the whole, but
    for a D and for the greatest of the domains, which is pooled, too.
    features, hidden, blocks: as of SetNetwork. centre, scale: float32 [P' + G'], set from an actor or from data.
    """

    domain_columns: Tensor
    run_columns: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        features: Sequence[str] = (*DOMAIN_FEATURES, *GLOBAL_FEATURES),
        hidden: int = 64,
        blocks: int = 2,
    ):
        super().__init__()
        for name, columns in zip(COLUMNS, feature_columns(features), strict=True):
            self.register_buffer(name, torch.from_numpy(columns))
        self.register_buffer("centre", torch.zeros(len(features)))
        self.register_buffer("scale", torch.ones(len(features)))
        self.input = nn.Linear(len(features) + 4, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(blocks + 1))
        self.own = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.pooled = nn.ModuleList(nn.Linear(4 * hidden, hidden, bias=False) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.head = nn.Sequential(nn.Linear(4 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(
        self, domain: Tensor, run: Tensor, weights: Tensor, prior: Tensor, mask: Tensor, action: Tensor
    ) -> Tensor:
        """float32 [B], the value of the action in each state.

        domain: float32 [B, D, P], all features; run: [B, G]; weights (in force), prior and action (in force from now
        on): [B, D], sums of 1, zero where padded; mask: bool [B, D].
        """
        own, common = domain[..., self.domain_columns], run[:, None, self.run_columns]
        x = torch.cat([own, common.expand(-1, domain.shape[1], -1)], dim=-1)
        x = ((x - self.centre) / self.scale).clamp(-10, 10)
        share = action * mask.sum(1, keepdim=True)
        moves = [torch.log(action.clamp_min(1e-6) / base.clamp_min(1e-6)) for base in (weights, prior)]
        hidden = self.input(torch.cat([x, torch.stack([*moves, share, (share + 1e-6).sqrt()], dim=-1)], dim=-1))
        absent = ~mask[..., None]
        parts = torch.stack([weights, prior, action], dim=1)  # [B, 3, D]
        for norm, own_map, pool_map, out in zip(self.norms, self.own, self.pooled, self.out, strict=False):
            normed = torch.relu(norm(hidden))
            inner = own_map(normed) + pool_map(_pools(normed, parts, absent))[:, None]
            hidden = hidden + out(torch.relu(inner))
        return self.head(_pools(torch.relu(self.norms[-1](hidden)), parts, absent))[:, 0]


def _pools(hidden: Tensor, parts: Tensor, absent: Tensor) -> Tensor:
    """[B, 4 H]: means by weight, prior and action, and the greatest; hidden: [B, D, H] >= 0."""
    return torch.cat([(parts @ hidden).flatten(1), hidden.masked_fill(absent, 0.0).amax(1)], dim=-1)
