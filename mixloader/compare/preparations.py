"""What has to be trained before a policy can run: searches, proxies, references. Its tokens are the policy's cost.

A preparation names the runs that it needs in a setting and, given their results, decides the policy or an option
of it. Runs are cells like all others, cached like all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mixloader.errors import ConfigError
from mixloader.observation import DomainTable
from mixloader.policies import make_policy

if TYPE_CHECKING:
    from mixloader.compare.cell import Cell
    from mixloader.compare.setting import Setting

FIRST_SEED = 1000
"""Seed of preparing runs unless the suite says another: far from those that people score with."""


class Preparation(Protocol):
    """A way to prepare. Its options are keyword arguments of its constructor."""

    @property
    def policy(self) -> str | None:
        """The policy that it decides; None if it prepares an option of the entry's own."""

    @property
    def sees(self) -> str:
        """ "feedback" or "score": the held-out text that it looks at; "" for none."""

    @property
    def seeds(self) -> Sequence[int]:
        """Of the runs; none may be scored."""

    @property
    def placeholder(self) -> Mapping[str, Any]:
        """Stands for `options` until there are results, so that an entry can be checked before anything runs."""

    def runs(self, setting: Setting, label: str) -> list[Cell]:
        """The cells that have to run first."""

    def options(self, setting: Setting, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Options of the policy, from what `runs` ended with."""


class BestOf:
    """The oracle: of so many fixed mixtures, the one with the best balanced score, on seeds that are not scored.

    mixtures: how many are tried, at the full token budget; see `mixtures_around`. seeds: of their runs.
    It looks at the score text, which no user has: it says how good a fixed mixture can be, not how to find it.
    """

    policy = "fixed"
    sees = "score"
    placeholder: Mapping[str, Any] = {"weights": {}}

    def __init__(self, mixtures: int = 64, seeds: Sequence[int] = (FIRST_SEED,)) -> None:
        self.mixtures, self.seeds = _at_least_one("mixtures", mixtures), list(seeds)
        _at_least_one("seeds", len(self.seeds))

    def runs(self, setting: Setting, label: str) -> list[Cell]:
        tried = mixtures_around(setting.table, self.mixtures, FIRST_SEED)
        return [
            setting.cell(f"{label} {i}", "fixed", {"weights": by_name(setting, mixture)}, seed)
            for i, mixture in enumerate(tried)
            for seed in self.seeds
        ]

    def options(self, setting: Setting, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        scores = [setting.summary(result["points"][-1]["losses"])["balanced"] for result in results]
        means = np.array(scores).reshape(self.mixtures, len(self.seeds)).mean(axis=1)
        best = mixtures_around(setting.table, self.mixtures, FIRST_SEED)[int(means.argmin())]
        return {"weights": by_name(setting, best)}


class Reference:
    """A reference model: what a run of a fixed mixture ends with on every domain, for rules that compare losses.

    option: the policy's, that takes losses in nats a token by domain name ("target_losses", "reference_losses").
    by_policy, by_options: of the reference run, by default uniform, so that it reads every domain. train: keys of
    TrainConfig over the scenario's. The losses are means over training tokens of the run's last quarter: no held-out
    text is looked at.
    """

    policy = None
    sees = ""

    def __init__(
        self,
        option: str,
        by_policy: str = "uniform",
        by_options: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        seed: int = FIRST_SEED,
    ) -> None:
        self.option, self.by_policy, self.by_options = option, by_policy, dict(by_options or {})
        self.train, self.seeds = dict(train or {}), [seed]
        self.placeholder: dict[str, Any] = {option: {}}
        make_policy(by_policy, **self.by_options)

    def runs(self, setting: Setting, label: str) -> list[Cell]:
        return [setting.cell("reference", self.by_policy, self.by_options, self.seeds[0], train=self.train)]

    def options(self, setting: Setting, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {self.option: results[0]["late"]}


def mixtures_around(table: DomainTable, count: int, seed: int) -> np.ndarray:
    """float64 [count, D]: fixed mixtures that cover what a user might try; more of them begin with the same ones.

    Shares of the source field are spread over (0, 1) by the golden ratio. Inside a field the mixture is Dirichlet
    around the prior, with a concentration between 1 and 100 a domain, even in its logarithm: from nearly one domain
    alone to nearly the prior. Domains without a field share up to a sixth.
    """
    groups = [np.array([field == own for field in table.fields]) for own in ("source", "target", None)]
    mixtures = np.zeros((count, len(table)))
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        share = (0.5 + i * (math.sqrt(5) - 1) / 2) % 1
        for group, part in zip(groups, (share, 1 - share, rng.uniform(0, 0.2)), strict=True):
            if group.any():
                inner = table.prior[group] + 1e-3
                concentration = 10 ** rng.uniform(0, 2) * group.sum()
                mixtures[i, group] = part * rng.dirichlet(concentration * inner / inner.sum())
    return mixtures / mixtures.sum(axis=1, keepdims=True)


def by_name(setting: Setting, mixture: np.ndarray) -> dict[str, float]:
    return dict(zip(setting.table.names, map(float, mixture), strict=True))


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} is {value}; expected 1 or more")
    return value


def _fitted(**options: Any) -> Preparation:
    from mixloader.compare.proxies import Fitted

    return Fitted(**options)


PREPARATIONS: dict[str, Callable[..., Preparation]] = {"best_of": BestOf, "reference": Reference, "fit": _fitted}


def make_preparation(by: str | None = None, **options: Any) -> Preparation:
    """A preparation from its name and options; raises ConfigError for an unknown one."""
    if by not in PREPARATIONS:
        raise ConfigError(f"prepare.by is {by!r}; expected one of {', '.join(PREPARATIONS)}")
    try:
        return PREPARATIONS[by](**options)
    except TypeError as error:
        raise ConfigError(f"prepare.by {by!r} cannot be made with options {options}: {error}") from error
