"""Offline laws as a preparation: small runs on many mixtures, a law of their losses, the mixture it likes best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixloader.compare.preparations import FIRST_SEED, by_name
from mixloader.errors import ConfigError
from mixloader.fitters import FITTERS, fit, propose, sample_mixtures

if TYPE_CHECKING:
    from mixloader.compare.cell import Cell
    from mixloader.compare.setting import Setting


class Fitted:
    """Proxies on mixtures around the prior, and a law fitted to their losses on the probes (see mixloader.fitters).

    method: "regmix", "linear", "olmix" or "mixing-law"; entries with the same proxies share them.
    mixtures: how many proxies, by default max(64, 3 (D + 1)): Olmix asks for three a parameter of its law.
    train: keys of TrainConfig in which a proxy differs from the run it stands for, usually `steps`.
    propose: further options of `fitters.propose`. The run's repetition of each domain is limited as there.
    """

    policy = "fixed"
    sees = "feedback"
    placeholder: Mapping[str, Any] = {"weights": {}}

    def __init__(
        self,
        method: str,
        mixtures: int | None = None,
        train: Mapping[str, Any] | None = None,
        propose: Mapping[str, Any] | None = None,
        seed: int = FIRST_SEED,
    ) -> None:
        if method not in FITTERS:
            raise ConfigError(f"prepare.method is {method!r}; expected one of {', '.join(FITTERS)}")
        if mixtures is not None and mixtures < 2:
            raise ConfigError(f"prepare.mixtures is {mixtures}; expected 2 or more")
        self.method, self.mixtures, self.seeds = method, mixtures, [seed]
        self.train, self.propose = dict(train or {}), dict(propose or {})

    def runs(self, setting: Setting, label: str) -> list[Cell]:
        return [
            setting.cell(
                f"proxy {i}",
                "fixed",
                {"weights": by_name(setting, mixture)},
                self.seeds[0],
                train=self.train,
                scored=False,
            )
            for i, mixture in enumerate(self._tried(setting))
        ]

    def options(self, setting: Setting, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The mixture with the least predicted balanced loss on the probes."""
        scenario, table = setting.scenario, setting.table
        probed = scenario.probed
        losses = np.array([[result["feedback"][name] for name in probed] for result in results])
        law = fit(self.method, self._tried(setting), losses, seed=self.seeds[0])
        shares = {"source": scenario.preference, "target": 1 - scenario.preference}
        fields = [scenario.fields[name] for name in probed]
        weights = [shares[str(field)] / fields.count(field) for field in fields]
        limits = {"tokens": table.tokens, "target_tokens": setting.tokens}
        return {"weights": by_name(setting, propose(law, table.prior, weights, **{**limits, **self.propose}))}

    def _tried(self, setting: Setting) -> np.ndarray:
        count = max(64, 3 * (len(setting.table) + 1)) if self.mixtures is None else self.mixtures
        return sample_mixtures(setting.table.prior, count, seed=self.seeds[0])
