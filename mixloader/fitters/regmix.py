"""RegMix's regression (Liu et al., ICLR 2025, arXiv 2407.01492): boosted trees from mixture to loss, one a loss.

`PUBLISHED` is regression_fitting/regression.ipynb: 1,000 rounds at a rate of 0.01 on the weights as they are. The
notebook stops early on the very test set that it then scores; here all rounds are taken.
`DEFAULT` has the best mean Spearman over 13 losses of `GRID` in 5-fold cross-validation on RegMix's 512 training runs
alone (`bench/regmix.py` repeats it; the grid was narrowed by hand in the same way, without the test sets): linear
models in the leaves, over the logarithm of the weights, for a loss bends with the logarithm of a share rather than in
steps; few leaves; averages over runs left out at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError
from mixloader.fitters.law import as_losses, as_mixtures


@dataclass(frozen=True)
class Boosting:
    """How the trees are grown.

    rounds, rate, leaves: trees, shrinkage of each, and leaves of each. min_leaf: runs in a leaf, at most a twentieth of
    the runs (LightGBM would refuse every split of 30 runs). linear: a ridge model, of penalty `ridge`, in every leaf.
    row_share: runs drawn for each tree. bags: forests averaged, of seeds in turn.
    log_floor: weights w enter as log(w + log_floor); None: as they are. log_losses: columns of losses that are all
    above zero are fitted in logarithm.
    """

    rounds: int = 500
    rate: float = 0.02
    leaves: int = 8
    min_leaf: int = 20
    linear: bool = True
    ridge: float = 1.0
    row_share: float = 0.6
    bags: int = 4
    log_floor: float | None = 1e-3
    log_losses: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.leaves < 2 or self.min_leaf < 1 or self.bags < 1:
            raise ConfigError(f"{self}: expected rounds, min_leaf and bags of at least 1, and 2 leaves or more")
        if not (self.rate > 0 and 0 < self.row_share <= 1 and self.ridge >= 0) or (self.log_floor or 1) <= 0:
            raise ConfigError(f"{self}: expected rate and log_floor above 0, ridge >= 0, row_share in (0, 1]")


DEFAULT = Boosting()
PUBLISHED = Boosting(
    rounds=1000, rate=0.01, leaves=31, linear=False, ridge=0.0, row_share=1.0, bags=1, log_floor=None, log_losses=False
)
PRESETS = {"default": DEFAULT, "published": PUBLISHED}

GRID: tuple[dict[str, Any], ...] = tuple(
    asdict(boosting)
    for boosting in (
        PUBLISHED,
        Boosting(rounds=800, linear=False, log_floor=None),
        Boosting(rounds=800, leaves=4),
        Boosting(rounds=800, leaves=6),
        DEFAULT,
        Boosting(log_losses=False),
    )
)
"""What cross-validation compares."""


@dataclass(frozen=True)
class Trees:
    """boosters: for each loss, those that are averaged. in_log: for each loss, whether they predict its logarithm."""

    n_domains: int
    boosters: tuple[tuple[Any, ...], ...]
    in_log: tuple[bool, ...]
    log_floor: float | None
    kl: float = 0.0

    @property
    def n_fields(self) -> int:
        return len(self.boosters)

    def predict(self, mixtures: npt.ArrayLike, fields: Sequence[int] | None = None) -> np.ndarray:
        features = _features(as_mixtures(mixtures, self.n_domains), self.log_floor)
        columns = []
        for f in range(self.n_fields) if fields is None else fields:
            mean = np.mean([booster.predict(features, num_threads=1) for booster in self.boosters[f]], axis=0)
            columns.append(np.exp(mean) if self.in_log[f] else mean)
        return np.stack(columns, axis=1)


def fit_regmix(
    mixtures: npt.ArrayLike, losses: npt.ArrayLike, *, preset: str = "default", seed: int = 0, **settings: Any
) -> Trees:
    """mixtures: [N, D], taken as they are. losses: [N, F]. preset: "default" or "published"; settings: of Boosting.

    One thread, the same trees for the same seed. Raises ConfigError for unknown settings, and without LightGBM.
    """
    x = as_mixtures(mixtures)
    y = as_losses(losses, len(x))
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r} of regmix; known are {', '.join(PRESETS)}")
    unknown = settings.keys() - asdict(DEFAULT).keys()
    if unknown:
        raise ConfigError(f"unknown setting {min(unknown)!r} of regmix; known are {', '.join(asdict(DEFAULT))}")
    boosting = Boosting(**{**asdict(PRESETS[preset]), **settings})
    in_log = tuple(bool(boosting.log_losses and column.min() > 0) for column in y.T)
    features = _features(x, boosting.log_floor)
    boosters = tuple(
        tuple(_grow(features, np.log(column) if log else column, boosting, seed + bag) for bag in range(boosting.bags))
        for column, log in zip(y.T, in_log, strict=True)
    )
    return Trees(x.shape[1], boosters, in_log, boosting.log_floor)


def _features(mixtures: np.ndarray, log_floor: float | None) -> np.ndarray:
    return mixtures if log_floor is None else np.log(mixtures + log_floor)


def _grow(features: np.ndarray, target: np.ndarray, boosting: Boosting, seed: int) -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ConfigError("RegMix's regression needs the package lightgbm; pip install 'mixloader[fit]'") from error
    parameters = {
        "objective": "regression",
        "learning_rate": boosting.rate,
        "num_leaves": boosting.leaves,
        "min_data_in_leaf": max(1, min(boosting.min_leaf, len(target) // 20)),
        "linear_tree": boosting.linear,
        "linear_lambda": boosting.ridge,
        "bagging_fraction": boosting.row_share,
        "bagging_freq": int(boosting.row_share < 1),
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    return lightgbm.train(parameters, lightgbm.Dataset(features, target), num_boost_round=boosting.rounds)
