"""What came of a suite: a row for each run that counts, and means, differences and curves over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mixloader.compare.bootstrap import Interval, paired_bootstrap
from mixloader.compare.setting import Setting
from mixloader.compare.suite import Suite


@dataclass(frozen=True)
class Row:
    """A policy in a scenario with a seed.

    result: what run_cell returned; None where there is none, and `error` says why. extra_tokens: trained in
    preparation, of which all seeds have the use. sees: "feedback" or "score", held-out text that decided the mixture.
    """

    scenario: str
    policy: str
    seed: int
    extra_tokens: int
    sees: str
    result: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows of a suite. tried: of the fixed mixtures that "score" searches tried, (source, target) losses."""

    suite: Suite
    settings: dict[str, Setting]
    rows: list[Row]
    tried: list[dict[str, float]]

    @cached_property
    def policies(self) -> list[str]:
        """By mean balanced score, the best first; those without any result last."""
        means = {name: self.mean(name, "balanced") for name in self.suite.policies}
        return sorted(means, key=lambda name: (np.isnan(means[name]), means[name]))

    def rows_of(self, policy: str) -> list[Row]:
        return [row for row in self.rows if row.policy == policy]

    def by_scenario(self, policy: str, key: str) -> dict[str, dict[int, float]]:
        """{scenario: {seed: value}} at the end of the runs; key: of Setting.summary."""
        values: dict[str, dict[int, float]] = {}
        for row in self.rows_of(policy):
            if row.result is not None:
                summary = self.settings[row.scenario].summary(row.result["points"][-1]["losses"])
                if key in summary:
                    values.setdefault(row.scenario, {})[row.seed] = summary[key]
        return values

    def mean(self, policy: str, key: str) -> float:
        """The mean over scenarios of the means over seeds; NaN where there is no result."""
        return _mean_of_means(self.by_scenario(policy, key).values())

    def before(self, key: str) -> float:
        """The same before the first step, of the models that the runs began with."""
        of: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if row.result is not None:
                summary = self.settings[row.scenario].summary(row.result["points"][0]["losses"])
                if key in summary:
                    of.setdefault(row.scenario, {})[row.seed] = summary[key]
        return _mean_of_means(of.values())

    def difference(self, policy: str, key: str = "balanced") -> Interval:
        """`policy` minus `suite.against`, over the scenarios and seeds that both have."""
        mine, theirs = self.by_scenario(policy, key), self.by_scenario(self.suite.against, key)
        pairs = {
            scenario: [value - theirs[scenario][seed] for seed, value in own.items() if seed in theirs[scenario]]
            for scenario, own in mine.items()
            if scenario in theirs
        }
        return paired_bootstrap(list(pairs.values()))

    def curve(self, policy: str, key: str = "balanced") -> list[tuple[float, float]]:
        """(total tokens, mean value) at each point of the runs: tokens of the preparation come first."""
        rows = [row for row in self.rows_of(policy) if row.result is not None]
        count = min((len(row.result["points"]) for row in rows if row.result), default=0)
        curve = []
        for i in range(count):
            tokens: dict[str, dict[int, float]] = {}
            values: dict[str, dict[int, float]] = {}
            for row in rows:
                assert row.result is not None
                point = row.result["points"][i]
                tokens.setdefault(row.scenario, {})[row.seed] = row.extra_tokens + point["tokens"]
                values.setdefault(row.scenario, {})[row.seed] = self.settings[row.scenario].summary(point["losses"])[
                    key
                ]
            curve.append((_mean_of_means(tokens.values()), _mean_of_means(values.values())))
        return curve

    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.error is not None]

    def to_json(self) -> dict[str, Any]:
        """What results.json says beside the results of the cells."""
        return {
            "suite": asdict(self.suite),
            "versions": {"numpy": np.__version__, "torch": str(torch.__version__)},
            "data": {name: setting.training.fingerprint for name, setting in self.settings.items()},
            "rows": [
                {**{k: v for k, v in asdict(row).items() if k != "result"}, "key": row.result and row.result["key"]}
                for row in self.rows
            ],
        }


def _mean_of_means(values: Iterable[Mapping[int, float]]) -> float:
    means = [float(np.mean(list(own.values()))) for own in values]
    return float(np.mean(means)) if means else float("nan")
