"""Objective weights: a policy acts through a weight of each token's loss, and the mixture that is drawn stays.

If domain d is drawn with probability q[d], weighting its token losses with w[d] / q[d] makes the mean loss, and so its
gradient, that of the mixture w in expectation (importance weighting; Xie et al., arXiv 2305.10429, train DoReMi's
proxy in this way on evenly drawn domains). A new w acts at once on what was drawn with the old q.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixloader.mixture import as_fractions, quantize

FLOOR = 0.01
"""A domain that is drawn less often than this part of an equal share is weighted as if it were drawn that often: where
q is near zero, w / q would leave the gradient of a step to a row that is rarely there."""


def objective_weights(wanted: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """float64 [D]: factors of the token losses of each domain, whose mean over tokens drawn with `drawn` is 1.

    wanted, drawn: [D] >= 0, not all zero. A domain that is not drawn has factor 0, and the others share what is wanted
    of it, in proportion; if none of those wanted is drawn, all factors are 1.
    """
    q = drawn / drawn.sum()
    ratio = np.where(q > 0, wanted / np.maximum(q, FLOOR / len(q)), 0.0)
    mean = q @ ratio
    return ratio / mean if mean > 0 else np.ones(len(q))


class Objective:
    """The weights that a policy wants, and the factors of token losses that they make.

    units: int64 [D], integer weights in force. device: of the factors.
    """

    def __init__(self, units: np.ndarray, device: torch.device):
        self.units = units
        self._factors = torch.ones(len(units), dtype=torch.float32, device=device)

    def factors(self, drawn: np.ndarray) -> Tensor:
        """float32 [D]: the factors for rows drawn with integer weights [D]; written anew at one address."""
        values = torch.from_numpy(objective_weights(self.units, drawn)).float()
        if self._factors.is_cuda:
            values = values.pin_memory()
        self._factors.copy_(values, non_blocking=True)
        return self._factors

    def grow(self, sampled: np.ndarray, removed: np.ndarray) -> None:
        """Go on with more domains at the end, which get their part of the mixture `sampled`, and without those removed.

        sampled: int64 [D], integer weights; removed: bool [D]. The others keep their ratios.
        """
        known = len(self.units)
        weights = as_fractions(sampled)
        kept = np.where(removed[:known], 0.0, as_fractions(self.units))
        if kept.any():
            weights[:known] = kept * (weights[:known].sum() / kept.sum())
        self.units = quantize(weights)
        self._factors = torch.ones(len(weights), dtype=torch.float32, device=self._factors.device)
