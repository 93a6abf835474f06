"""What a loss will be after more tokens: L(n) = e + a n^-alpha, fitted to the losses of a run so far.

The target losses of dynamic batch loading (Sheared LLaMA, arXiv 2310.06694) and Velocitune (arXiv 2411.14318) are
such predictions. The fit is that of Hoffmann et al. (arXiv 2203.15556, appendix D.2): Huber loss on the difference of
log losses, from several starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixloader.errors import ConfigError

HUBER = 1e-3
"""Difference of log losses from which on a point counts linearly, as in the source."""

_ALPHAS = (0.03, 0.1, 0.3, 0.6, 1.0, 2.0)
_FLOORS = (0.01, 0.3, 0.6, 0.9, 0.99)  # e, as a part of the smallest loss
_ITERATIONS = 200


@dataclass(frozen=True)
class ScalingLaw:
    """L(n) = e + a n^-alpha, in nats a token and tokens. error: root mean square of log(L / loss) over its points."""

    e: float
    a: float
    alpha: float
    error: float

    def __call__(self, tokens: float) -> float:
        """Nats a token after so many tokens."""
        return self.e + self.a * tokens**-self.alpha


def fit_scaling_law(points: Iterable[tuple[float, float]]) -> ScalingLaw:
    """The law of (tokens, loss) points, all above 0.

    Raises ConfigError for fewer than three different numbers of tokens, which leave it open, and for other values.
    """
    pairs = np.array(list(points), dtype=np.float64).reshape(-1, 2)
    if not (np.isfinite(pairs) & (pairs > 0)).all():
        raise ConfigError("a scaling law is fitted to numbers of tokens and losses above 0; leave other points out")
    tokens, losses = pairs.T
    if len(np.unique(tokens)) < 3:
        raise ConfigError(
            f"a scaling law has three parameters, and there are losses after {len(np.unique(tokens))} numbers of "
            "tokens; evaluate more often (eval_every)"
        )
    # Tokens are counted in their geometric mean, where e and a n^-alpha are told apart best.
    unit = math.exp(np.log(tokens).mean())
    x, y = np.log(tokens / unit), np.log(losses)
    starts = np.array([
        (math.log(part), math.log1p(-part), math.log(alpha)) for part in _FLOORS for alpha in _ALPHAS
    ])  # fmt: skip
    starts[:, :2] += y.min()
    theta, cost = _descend(starts, x, y)
    log_e, log_a, log_alpha = theta[np.argmin(cost)]
    alpha = math.exp(log_alpha)
    residual = _residuals(theta[np.argmin(cost)][None], x, y)[0][0]
    return ScalingLaw(math.exp(log_e), math.exp(log_a + alpha * math.log(unit)), alpha, math.sqrt((residual**2).mean()))


def fit_scaling_laws(points: Mapping[str, Iterable[tuple[float, float]]]) -> dict[str, ScalingLaw]:
    """The law of each domain's (tokens, loss) points. Raises ConfigError, with the name, as fit_scaling_law does."""
    laws = {}
    for name, of_domain in points.items():
        try:
            laws[name] = fit_scaling_law(of_domain)
        except ConfigError as error:
            raise ConfigError(f"domain {name!r}: {error}") from error
    return laws


def points_of_run(folder: Path, from_tokens: float = 0.0) -> dict[str, list[tuple[float, float]]]:
    """(tokens, held-out loss) of each domain from a run's metrics.jsonl, of the evaluations after training began.

    from_tokens: leave out earlier ones, those of the warm-up for instance, which follow no law.
    Raises ConfigError if the folder holds no such losses.
    """
    path, points = folder / "metrics.jsonl", dict[str, list[tuple[float, float]]]()
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected the folder of a run") from error
    for line in lines:
        if line["tokens"] > 0 and line["tokens"] >= from_tokens:
            for name, loss in line.get("held_out", {}).items():
                points.setdefault(name, []).append((line["tokens"], loss))
    if not points:
        raise ConfigError(f"{path} holds no held-out losses of this part of the run; evaluate with eval_every")
    return points


def _descend(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt with the weights of the Huber loss, from all starts [S, 3] at once; theta and costs [S]."""
    damping = np.full(len(theta), 1e-2)
    cost = _cost(theta, x, y)
    for _ in range(_ITERATIONS):
        residual, jacobian = _residuals(theta, x, y)
        weight = np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-300))
        normal = np.einsum("sni,sn,snj->sij", jacobian, weight, jacobian)
        slope = np.einsum("sni,sn->si", jacobian, weight * residual)
        scaled = damping[:, None, None] * (normal * np.eye(3) + 1e-9 * np.eye(3))
        step = np.linalg.solve(normal + scaled, -slope[..., None])[..., 0]
        # Steps of logarithms: more than a factor of 20 at once is a step too far.
        tried = theta + np.clip(step, -3.0, 3.0)
        tried[:, 2] = np.clip(tried[:, 2], math.log(1e-3), math.log(10.0))
        new = _cost(tried, x, y)
        better = new < cost
        theta, cost = np.where(better[:, None], tried, theta), np.where(better, new, cost)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
    return theta, cost


def _residuals(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(e + a n^-alpha) - log(loss) [S, N], and its derivatives [S, N, 3] by log e, log a and log alpha."""
    log_e, log_a, alpha = theta[:, 0:1], theta[:, 1:2], np.exp(theta[:, 2:3])
    power = log_a - alpha * x
    total = np.logaddexp(log_e, power)
    part = np.exp(power - total)
    return total - y, np.stack((1 - part, part, -part * alpha * x), axis=-1)


def _cost(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = np.abs(_residuals(theta, x, y)[0])
    return np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).sum(axis=1)
