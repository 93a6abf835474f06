"""A scenario with its data at hand: makes the cells that run in it, and says what their losses amount to."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixloader.compare.cache import key_of, parameters_digest
from mixloader.compare.cell import Cell
from mixloader.compare.suite import Scenario, Suite
from mixloader.compare.texts import split_manifest
from mixloader.config import TrainConfig, merge
from mixloader.manifest import Manifest
from mixloader.observation import DomainTable
from mixloader.policies import make_policy
from mixloader.policies.base import signals_of

BASE_SEED = 0


@dataclass(frozen=True)
class Setting:
    """A scenario, ready.

    training, scored: manifests whose held-out text is the feedback's and the score's; both are saved in `folder`.
    base: the cell that the runs start from, if the suite says how to train one; else None.
    """

    suite: Suite
    scenario: Scenario
    folder: Path
    runs: Path
    training: Manifest
    scored: Manifest
    base: Cell | None = None

    @property
    def table(self) -> DomainTable:
        return self.training.table(self.prior)

    @property
    def prior(self) -> dict[str, float]:
        """The mixture that policies without one of their own begin with, by domain."""
        prior = self.scenario.prior
        table = self.training.table()
        weights = make_policy(prior["policy"], **prior.get("options", {})).reset(table)
        if weights is None:
            weights = table.prior
        return dict(zip(table.names, map(float, weights), strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of a run, unless an entry of the suite says otherwise."""
        return self.cell("", "natural", {}, 0).tokens

    def cell(
        self,
        label: str,
        policy: str,
        options: Mapping[str, Any],
        seed: int,
        *,
        feedback: bool = False,
        train: Mapping[str, Any] | None = None,
        keep: bool = False,
        scored: bool = True,
    ) -> Cell:
        """A run of a policy. train: keys of TrainConfig over those of the scenario; `keep` as in Cell.

        scored: with points on the score text; a proxy, whose feedback alone is asked for, has none.
        """
        values = merge(self.scenario.train, train or {})
        steps = TrainConfig.from_dict({**values, "data": "data", "out": "out"}).steps
        values |= {
            "data": str(self.folder / "training.json"),
            "out": "out",
            "seed": seed,
            "policy": policy,
            "policy_options": dict(options),
            "weights": self.prior,
            "feedback": feedback,
            "eval_every": (self.suite.feedback_every or max(1, steps // 40)) if feedback else 0,
            "init_from": str(self.scenario.base) if isinstance(self.scenario.base, (str, Path)) else None,
        }
        if self.base is not None:
            values["init_from"] = str(self.base.out)
        if "influence" in signals_of(make_policy(policy, **options)):
            values.setdefault("influence", {})  # at its defaults
        return self._make(f"{self.scenario.name}, {label}, seed {seed}", values, self.training, keep, scored)

    def base_cell(self) -> Cell | None:
        """The run that pre-trains the base on the source domains, if that is asked for."""
        if not isinstance(self.scenario.base, Mapping):
            return None
        source = tuple(d for d in self.training.domains if d.field == "source")
        training = dataclasses.replace(self.training, domains=source)
        training.save(self.folder / "base.json")
        values = merge(self.scenario.train, self.scenario.base)
        values |= {"data": str(self.folder / "base.json"), "out": "out", "seed": BASE_SEED, "policy": "natural"}
        return self._make(f"{self.scenario.name}, base", values, training, keep=True)

    def _make(self, title: str, values: dict[str, Any], training: Manifest, keep: bool, scored: bool = True) -> Cell:
        suite = self.suite
        windows = suite.score_windows if scored else 0
        config = TrainConfig.from_dict(values | {"eval_windows": suite.feedback_windows, "threads": 1})
        every = max(1, -(-config.steps // suite.points))
        roots = self.training.roots_outside(self.folder / "training.json")
        config = dataclasses.replace(
            config, checkpoint_every=every, keep_checkpoints=suite.points + 2, log_every=every, roots=roots
        )
        start: str | None = None
        if config.init_from is not None:
            start = self.base.key if self.base is not None else parameters_digest(Path(config.init_from))
        key = key_of(config, training, self.scored, start, windows=windows, points=suite.points, keep=keep)
        config = dataclasses.replace(config, out=str(self.runs / key))
        return Cell(
            key=key,
            title=title,
            config=config.to_dict(),
            score=str(self.folder / "scored.json"),
            score_roots=self.scored.roots_outside(self.folder / "scored.json"),
            score_windows=windows,
            base=self.base if start is not None else None,
            keep=keep,
        )

    def summary(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Losses of domains, on either text, as those of the fields: "source", "target", "balanced" and "unprobed".

        "balanced" is preference * source + (1 - preference) * target, each the mean over its domains in `losses`;
        "unprobed" the mean over source domains that no probe covers, if there are any.
        """
        scenario = self.scenario
        source = statistics.fmean(losses[name] for name in scenario.source if name in losses)
        target = statistics.fmean(losses[name] for name in scenario.target if name in losses)
        result = {
            "balanced": scenario.preference * source + (1 - scenario.preference) * target,
            "source": source,
            "target": target,
        }
        unprobed = [losses[name] for name in scenario.source if name in losses and name not in scenario.probed]
        return result | ({"unprobed": statistics.fmean(unprobed)} if unprobed else {})


def make_setting(suite: Suite, scenario: Scenario, out: Path) -> Setting:
    """Open the data of a scenario, split its held-out text, and save its manifests under `out`.

    Raises ManifestError or ConfigError if the data do not have what the scenario names.
    """
    manifest = _open(scenario, out)
    folder = out / "scenarios" / scenario.name
    training, scored = split_manifest(manifest, scenario.fields, scenario.probed, folder)
    training.save(folder / "training.json")
    scored.save(folder / "scored.json")
    setting = Setting(suite, scenario, folder, out / "runs", training, scored)
    return dataclasses.replace(setting, base=setting.base_cell())


def _open(scenario: Scenario, out: Path) -> Manifest:
    if scenario.data != "demo":
        return Manifest.open(scenario.data, roots=scenario.roots)
    from mixloader.demo.base import load_tokenizer
    from mixloader.demo.corpus import build_corpus, pack_corpus

    path = out / "demo" / "manifest.json"
    if path.exists():
        return Manifest.open(path)
    return pack_corpus(build_corpus(), path.parent, load_tokenizer())
