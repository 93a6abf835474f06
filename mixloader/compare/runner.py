"""Runs a suite: what policies are prepared with, then the policies, and whatever others start from first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixloader.compare.cache import Results
from mixloader.compare.cell import Cell, is_startable, run_cell
from mixloader.compare.comparison import Comparison, Row
from mixloader.compare.preparations import Preparation
from mixloader.compare.setting import Setting, make_setting
from mixloader.compare.suite import Suite
from mixloader.errors import MixLoaderError
from mixloader.policies import make_policy
from mixloader.policies.base import signals_of
from mixloader.workers import Engine, Workers, make_workers

At = tuple[str, str]  # scenario, policy
Cells = dict[At, list[Cell]]


def compare(
    suite: Suite, out: Path, *, workers: int = 1, engine: Engine = "local", progress: bool | None = None
) -> Comparison:
    """Run what of a suite is not in `out` yet, and return all of it, which results.json then tells of.

    A run that fails leaves its row without a result; the others go on. Raises a MixLoaderError before anything is
    trained if the data of a scenario do not fit it. progress: a bar; None shows it on a terminal only.
    """
    results = Results(out)
    comparison = run_suite(suite, out, results, workers=workers, engine=engine, progress=progress)
    results.save(comparison.to_json())
    return comparison


def run_suite(
    suite: Suite,
    out: Path,
    results: Results,
    *,
    workers: int = 1,
    engine: Engine = "local",
    progress: bool | None = None,
) -> Comparison:
    """As `compare`, but results.json stays as it is: for what shares the runs in `out` with another comparison."""
    settings = {name: make_setting(suite, scenario, out) for name, scenario in suite.scenarios.items()}
    with make_workers(run_cell, workers, engine) as pool:
        runner = _Runner(results, pool, progress)
        direct, before, errors = _run_entries(settings, runner)
    rows = [
        row
        for name, setting in settings.items()
        for policy in suite.policies
        for row in _rows(setting, policy, direct.get((name, policy)), before.get((name, policy), []), runner, errors)
    ]
    return Comparison(suite, settings, rows, _tried(settings, before, results))


def _run_entries(settings: Mapping[str, Setting], runner: _Runner) -> tuple[Cells, Cells, dict[At, str]]:
    """Run all there is to run: (scored cells, those of preparations, errors of preparations), by (scenario, policy)."""
    direct: Cells = {}
    before: Cells = {}
    errors: dict[At, str] = {}
    for name, setting in settings.items():
        for policy in setting.suite.policies:
            preparation = setting.suite.preparation(policy)
            if preparation is None:
                direct[name, policy] = _scored(setting, policy)
            else:
                before[name, policy] = preparation.runs(setting, policy)
    # Seed by seed, so that what is there of a comparison that was stopped can be compared.
    runner.run("policies", [cell for of_seed in zip(*direct.values(), strict=True) for cell in of_seed])
    # Short preparations and their policies come before long searches.
    for count in sorted({len(cells) for cells in before.values()}):
        group = {at: cells for at, cells in before.items() if len(cells) == count}
        runner.run("preparations", [cell for cells in group.values() for cell in cells])
        for (name, policy), cells in group.items():
            try:
                direct[name, policy] = _prepared(settings[name], policy, cells, runner)
            except MixLoaderError as error:
                errors[name, policy] = f"its preparation failed: {error}"
        runner.run("prepared policies", [cell for at in group if at in direct for cell in direct[at]])
    return direct, before, errors


def _scored(setting: Setting, label: str, prepared: tuple[Preparation, dict[str, Any]] | None = None) -> list[Cell]:
    """The cells of an entry of the suite, one a seed."""
    suite = setting.suite
    entry = suite.policies[label]
    preparation, found = prepared or (None, {})
    policy = (preparation.policy if preparation is not None else None) or entry.policy or label
    options = entry.options_for(policy, setting.scenario.preference, found)
    feedback = entry.feedback
    if feedback is None:
        feedback = "feedback" in signals_of(make_policy(policy, **options))
    return [setting.cell(label, policy, options, seed, feedback=feedback, train=entry.train) for seed in suite.seeds]


def _prepared(setting: Setting, label: str, cells: Sequence[Cell], runner: _Runner) -> list[Cell]:
    preparation = setting.suite.preparation(label)
    assert preparation is not None
    results = [runner.result(cell) for cell in cells]
    return _scored(setting, label, (preparation, preparation.options(setting, results)))


def _rows(
    setting: Setting,
    policy: str,
    cells: Sequence[Cell] | None,
    before: Sequence[Cell],
    runner: _Runner,
    errors: Mapping[At, str],
) -> list[Row]:
    name, preparation = setting.scenario.name, setting.suite.preparation(policy)
    extra = sum({cell.key: cell.tokens for cell in before}.values())
    rows = []
    for i, seed in enumerate(setting.suite.seeds):
        if cells is None:
            rows.append(Row(name, policy, seed, extra, "", None, errors[name, policy]))
            continue
        sees = (preparation.sees if preparation is not None else "") or _sees(cells[i])
        result = runner.results.get(cells[i])
        rows.append(Row(name, policy, seed, extra, sees, result, None if result else runner.errors[cells[i].key]))
    return rows


def _sees(cell: Cell) -> str:
    """Whether held-out text reaches the policy: as losses, or as gradients that those of domains are compared with."""
    signals = signals_of(make_policy(cell.config["policy"], **cell.config["policy_options"]))
    return "feedback" if cell.config["feedback"] or "influence" in signals else ""


def _tried(settings: Mapping[str, Setting], before: Cells, results: Results) -> list[dict[str, float]]:
    """Where the fixed mixtures ended that a search on the score tried."""
    return [
        settings[name].summary(result["points"][-1]["losses"])
        for (name, policy), cells in before.items()
        if (preparation := settings[name].suite.preparation(policy)) is not None and preparation.sees == "score"
        for cell in cells
        if (result := results.get(cell)) is not None
    ]


class _Runner:
    """Runs cells that have no result yet, those that others start from first. errors: by the key of the cell."""

    def __init__(self, results: Results, workers: Workers[Cell], progress: bool | None) -> None:
        self.results, self.workers, self.progress = results, workers, progress
        self.errors: dict[str, str] = {}

    def result(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell that was run; raises MixLoaderError if it failed."""
        found = self.results.get(cell)
        if found is None:
            raise MixLoaderError(f"{cell.title}: {self.errors[cell.key]}")
        return found

    def run(self, what: str, cells: Sequence[Cell]) -> None:
        missing = list({cell.key: cell for cell in cells if self.results.get(cell) is None}.values())
        bases = {cell.base.key: cell.base for cell in missing if cell.base is not None}
        self._run("base models", [base for base in bases.values() if not is_startable(base)])
        for base in bases.values():
            self.results.get(base)  # so that what was run before counts among the results, too
        for cell in missing:
            if cell.base is not None and cell.base.key in self.errors:
                self.errors[cell.key] = f"its base model failed: {self.errors[cell.base.key]}"
        self._run(what, [cell for cell in missing if cell.key not in self.errors])

    def _run(self, what: str, cells: Sequence[Cell]) -> None:
        from tqdm import tqdm

        if not cells:
            return
        bar = tqdm(
            desc=what,
            total=sum(cell.tokens for cell in cells),
            unit="tok",
            unit_scale=True,
            disable=None if self.progress is None else not self.progress,
        )
        with bar:
            for number, outcome in enumerate(self.workers.run(cells), 1):
                cell = cells[outcome.index]
                if outcome.error is None:
                    self.results.put(outcome.value)
                else:
                    self.errors[cell.key] = outcome.error
                    tqdm.write(f"failed: {cell.title}: {outcome.error}")
                bar.update(cell.tokens)
                bar.set_postfix_str(f"{number} of {len(cells)} runs")
