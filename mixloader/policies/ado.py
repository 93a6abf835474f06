"""ADO: more of the domains whose loss still falls fast by its own power law.

Adaptive Data Optimization (Jiang, Zhou, Feng, Malladi, Kolter, arXiv 2410.11820), as in its released code: every
`fit_steps` steps a law L_k(n) = E_k + B_k n^-alpha_k is fitted to the training losses of each domain over all tokens
n read so far (of all domains), and from then on

    rho_k is proportional to mu_k sqrt(h_k) alpha_k (L_k(n) - E_k) / n,   p = 0.9 mean(rho) + 0.1 rho

with mu the prior, h the moving average of what was read, mean(rho) the average over all steps, and rho >= 1 %.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mixloader.errors import StateError
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register
from mixloader.policies.update import check_options, domain_numbers, moved, steps_since
from mixloader.signals import numbers_from_json, numbers_to_json

POINTS = 32
"""Most points of a loss curve that are kept; beyond, neighbours are averaged two by two."""

LEAST_POINTS = 8
"""A law is not fitted to fewer."""

EXPONENTS = np.concatenate([[0.001], np.linspace(0.02, 0.8, 40)])
"""Candidates for alpha; the range is the source's."""


def fit_power_laws(amount: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of E + B (n / n_last)^-alpha to loss curves, with E >= 0 and B >= 0, over the grid EXPONENTS.

    amount: float64 [T] > 0, rising, the n of the points. losses: float64 [T, D], finite.
    Returns E, B and alpha, float64 [D] each; B is 0 for a loss that does not fall.
    """
    basis = (amount / amount[-1]) ** -EXPONENTS[:, None]  # [A, T]
    centred = basis - basis.mean(axis=1, keepdims=True)
    mean_loss = losses.mean(axis=0)
    rest = losses - mean_loss
    products = centred @ rest  # [A, D]
    rise = products / (centred**2).sum(axis=1, keepdims=True)
    floor = mean_loss - rise * basis.mean(axis=1, keepdims=True)
    error = (rest**2).sum(axis=0) - rise * products
    # E < 0 is outside: the best B with E = 0. B < 0 is, too: the mean.
    alone = basis @ losses
    size = (basis**2).sum(axis=1, keepdims=True)
    below = floor < 0
    rise = np.where(below, alone / size, rise)
    error = np.where(below, (losses**2).sum(axis=0) - alone**2 / size, error)
    floor = np.where(below, 0.0, floor)
    rising = rise <= 0
    error = np.where(rising, (rest**2).sum(axis=0), error)
    rise, floor = np.where(rising, 0.0, rise), np.where(rising, mean_loss, floor)
    best = error.argmin(axis=0)
    domain = np.arange(losses.shape[1])
    return floor[best, domain], rise[best, domain], EXPONENTS[best]


@register("ado")
class AdaptiveDataOptimization:
    """More of the domains whose loss still falls fast by its own power law; one setting for all scales.

    start_step, fit_steps: the first fit and the interval of the later ones, in plan steps. ignore_steps: losses before
        that step are left out. The source has 1000 for all three, which leaves its first fit one point; here 500 for
        the last.
    smoothing: 0.1, the part of rho itself in p. least_share: 1 %, but at most half an even share, since the source's
        own rule fails over 100 domains.

    A fit takes effect with the decision after the one it was made for, so its time never delays the weights it made.
    Approximations: means over blocks of steps instead of a Savitzky-Golay filter, and least squares in the loss over a
    grid of alpha instead of a Huber loss in its logarithm from 512 starts; E >= 0 instead of E >= 1.65 nats, a bound
    that fits one tokenizer.
    """

    needs = frozenset({"loss"})

    def __init__(
        self,
        start_step: int = 1000,
        fit_steps: int = 1000,
        ignore_steps: int = 500,
        smoothing: float = 0.1,
        least_share: float = 0.01,
    ):
        check_options(
            "ado", start_step=(start_step, 0, math.inf), fit_steps=(fit_steps, 1, math.inf),
            ignore_steps=(ignore_steps, 0, math.inf), smoothing=(smoothing, 0, 1), least_share=(least_share, 0, 1),
        )  # fmt: skip
        self.start_step, self.fit_steps, self.ignore_steps = start_step, fit_steps, ignore_steps
        self.smoothing, self.least_share = float(smoothing), float(least_share)

    def reset(self, domains: DomainTable) -> np.ndarray | None:
        """Forget the loss curves; the run begins at the weights it has."""
        self._prior = np.array(domains.prior, dtype=np.float64)
        self._curve = _Curve(len(domains))
        self._seen = np.zeros(len(domains), dtype=np.int64)
        self._drawn, self._mean_share = self._prior.copy(), self._prior.copy()
        self._laws: np.ndarray | None = None  # [4, D]: E, B, alpha, and the n that B belongs to
        self._next_laws: np.ndarray | None = None
        self._next_fit = self.start_step
        return None

    def decide(self, observation: Observation) -> np.ndarray | None:
        """None until the first laws are there, and while nothing was read."""
        steps = steps_since(observation)
        if steps <= 0:
            return None
        if self._next_laws is not None:
            self._laws, self._next_laws = self._next_laws, None
        self._follow(observation, steps)
        weights = None if self._laws is None else self._weights(observation, steps)
        if observation.step >= self._next_fit:
            self._next_fit += self.fit_steps * (1 + (observation.step - self._next_fit) // self.fit_steps)
            self._fit()
        return weights

    def _follow(self, observation: Observation, steps: float) -> None:
        read = (observation.seen - self._seen).astype(np.float64)
        self._seen = observation.seen.copy()
        kept = 0.9**steps
        if read.sum() > 0:
            self._drawn = kept * self._drawn + (1 - kept) * read / read.sum()
        if observation.step >= self.ignore_steps:
            self._curve.add(observation.tokens - observation.tokens_since / 2, observation.loss.value, steps)

    def _fit(self) -> None:
        amount, losses = self._curve.points()
        known = np.isfinite(losses).all(axis=0)
        if len(amount) >= LEAST_POINTS and known.any():
            laws = np.full((4, len(known)), math.nan)
            laws[:3, known] = fit_power_laws(amount, losses[:, known])
            laws[3] = amount[-1]
            self._next_laws = laws

    def _weights(self, observation: Observation, steps: float) -> np.ndarray | None:
        assert self._laws is not None
        _, rise, alpha, fitted_at = self._laws
        reducible = rise * (observation.tokens / fitted_at) ** -alpha
        slope = np.maximum(alpha, 0.05) * reducible / observation.tokens
        share = self._prior * slope * np.sqrt(self._drawn)
        part = (observation.weights > 0) & np.isfinite(share) & (self._prior > 0)
        n_domains = np.count_nonzero(part)
        if n_domains < 2 or not share[part].sum() > 0:
            return None
        rho = share[part] / share[part].sum()
        rho = np.maximum(rho, min(self.least_share, 0.5 / n_domains))
        rho /= rho.sum()
        average = self._mean_share[part] / self._mean_share[part].sum()
        weights = moved(observation.weights, part, (1 - self.smoothing) * average + self.smoothing * rho)
        # The running mean over plan steps 0 .. step: what was before these steps keeps its part.
        kept = max(0.0, (observation.step + 1 - steps) / (observation.step + 1))
        self._mean_share[part] = self._mean_share[part].sum() * (kept * average + (1 - kept) * rho)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The curves, at most POINTS numbers a domain, and the laws. JSON-able and exact."""
        return {
            "curve": self._curve.state_dict(),
            "seen": self._seen.tolist(),
            "drawn": self._drawn.tolist(),
            "mean_share": self._mean_share.tolist(),
            "laws": _rows(self._laws),
            "next_laws": _rows(self._next_laws),
            "next_fit": self._next_fit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError for a state of another number of domains."""
        n_domains = len(self._prior)
        self._drawn = domain_numbers(state["drawn"], n_domains, "ado")
        self._mean_share = domain_numbers(state["mean_share"], n_domains, "ado")
        self._seen = np.array(state["seen"], dtype=np.int64)
        self._laws, self._next_laws = _from_rows(state["laws"]), _from_rows(state["next_laws"])
        self._next_fit = state["next_fit"]
        self._curve.load_state_dict(state["curve"])


def _rows(array: np.ndarray | None) -> list[list[float | None]] | None:
    return None if array is None else [numbers_to_json(row) for row in array]


def _from_rows(rows: list[list[float | None]] | None) -> np.ndarray | None:
    return None if rows is None else np.array([numbers_from_json(row) for row in rows])


class _Curve:
    """Loss curves of the domains in bounded room: means over blocks of steps, all of them equally long.

    A block's loss is rounded to 1e-5 nats, so that a state is small.
    """

    def __init__(self, n_domains: int):
        self._amount: list[float] = []
        self._losses: list[np.ndarray] = []
        self._block = 1.0  # steps
        self._steps = self._amount_sum = 0.0
        self._sum = np.zeros(n_domains)

    def add(self, amount: float, losses: np.ndarray, steps: float) -> None:
        """amount: n in the middle of these steps, in tokens. losses: float64 [D], NaN where never measured."""
        self._steps += steps
        self._amount_sum += steps * amount
        self._sum = self._sum + steps * losses
        if self._steps < self._block:
            return
        self._amount.append(self._amount_sum / self._steps)
        self._losses.append(np.round(self._sum / self._steps, 5))
        self._steps, self._amount_sum, self._sum = 0.0, 0.0, np.zeros(len(losses))
        if len(self._losses) == POINTS:
            self._amount = [(a + b) / 2 for a, b in zip(self._amount[::2], self._amount[1::2], strict=True)]
            pairs = zip(self._losses[::2], self._losses[1::2], strict=True)
            # A domain that was measured in the second half only has that.
            self._losses = [np.round(np.where(np.isnan(a), b, (a + b) / 2), 5) for a, b in pairs]
            self._block *= 2

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """n, float64 [T], and losses, float64 [T, D]."""
        return np.array(self._amount), np.array(self._losses).reshape(len(self._amount), len(self._sum))

    def state_dict(self) -> dict[str, Any]:
        return {
            "amount": self._amount,
            "losses": [numbers_to_json(losses) for losses in self._losses],
            "block": self._block,
            "under_way": [self._steps, self._amount_sum],
            "sum": numbers_to_json(self._sum),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        n_domains = len(self._sum)
        if any(len(losses) != n_domains for losses in state["losses"]):
            raise StateError(f"the loss curves of policy 'ado' are not of this run's {n_domains} domains")
        self._amount = list(state["amount"])
        self._losses = [numbers_from_json(losses) for losses in state["losses"]]
        self._block, (self._steps, self._amount_sum) = state["block"], state["under_way"]
        self._sum = domain_numbers(state["sum"], n_domains, "ado")
