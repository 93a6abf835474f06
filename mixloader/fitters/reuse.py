"""Mixture reuse (Olmix, arXiv 2602.12237, section 5): when domains are added, the others stay one.

The domains that did not change keep their shares among each other and stand as one virtual domain, so that only its
weight and those of the new domains are fitted: 3 (m + 1) runs for m new domains rather than for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mixloader.errors import ConfigError

_TOLERANCE = 0.01  # how far a run's shares may be from the frozen ones, in weight: files round


class Reuse:
    """Domains seen with some of them frozen into one.

    names: all D domains. frozen: weight by name of those that stay as they are, not all zero. virtual: what the one
    domain is called. `self.names`: the virtual domain first, then the others in their order.
    Raises ConfigError for unknown names, a taken name of the virtual domain, weights below zero.
    """

    def __init__(self, names: Sequence[str], frozen: Mapping[str, float], virtual: str = "existing"):
        unknown = frozen.keys() - set(names)
        if unknown or not frozen:
            raise ConfigError(
                f"the frozen domains are {', '.join(map(str, frozen)) or 'none'}; expected some of {', '.join(names)}"
            )
        self._is_frozen = np.array([name in frozen for name in names])
        self.names = (virtual, *(name for name in names if name not in frozen))
        if virtual in self.names[1:]:
            raise ConfigError(f"the virtual domain is called {virtual!r}, as a domain is; choose another name")
        shares = np.array([frozen.get(name, 0.0) for name in names], dtype=np.float64)
        if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
            raise ConfigError(f"frozen weights are {dict(frozen)}; expected finite numbers >= 0, not all zero")
        self._share = shares / shares.sum()

    def collapse(self, mixtures: np.ndarray) -> np.ndarray:
        """Mixtures (or priors) float64 [N, D] as [N, 1 + new]. Raises ConfigError where a row keeps other shares."""
        total = mixtures[:, self._is_frozen].sum(axis=1)
        off = np.abs(mixtures[:, self._is_frozen] - total[:, None] * self._share[self._is_frozen]).max(axis=1)
        if (off > _TOLERANCE).any():
            raise ConfigError(
                f"mixture {int(off.argmax())} has other shares among the frozen domains, by {off.max():.3g}; "
                "mixture reuse fits runs that kept them"
            )
        return self.total(mixtures)

    def total(self, amounts: np.ndarray) -> np.ndarray:
        """Amounts [N, D] as [N, 1 + new], whatever their shares: those of the frozen domains are added up."""
        return np.column_stack((amounts[:, self._is_frozen].sum(axis=1), amounts[:, ~self._is_frozen]))

    def expand(self, mixtures: np.ndarray) -> np.ndarray:
        """Mixtures float64 [N, 1 + new] as [N, D]."""
        full = mixtures[:, :1] * self._share
        full[:, ~self._is_frozen] = mixtures[:, 1:]
        return full

    def bounds(self, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds [D] as [1 + new]: the virtual domain may be what every frozen one allows.

        Raises ConfigError for a floor of a frozen domain without a share: no weight of the virtual one gives it that.
        """
        used = self._share > 0
        if (lower[self._is_frozen & ~used] > 0).any():
            raise ConfigError(
                "a frozen domain with weight zero has a floor; drop the floor, or the domain from the frozen"
            )
        at_most = (upper[used] / self._share[used]).min()
        at_least = (lower[used] / self._share[used]).max()
        new = ~self._is_frozen
        return np.concatenate(([at_least], lower[new])), np.concatenate(([min(at_most, 1.0)], upper[new]))
