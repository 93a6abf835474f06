"""Pictures of what the agent has learned: its mixtures for several preferences, with planted domains, and when it
decides more or less often.

    python -m bench.scoreboard_data --corpora DIR && nice python -m bench.agent_pictures --out docs

plays the runs in the folder of the scoreboard's comparison, so that runs and base models that it has are not run again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.scoreboard_data import OUT as DATA
from mixloader.compare.cache import Results
from mixloader.compare.runner import run_suite
from mixloader.compare.suite import Suite
from mixloader.config import read_yaml
from mixloader.domains import Domain
from mixloader.errors import MixLoaderError
from mixloader.files import sole_user
from mixloader.manifest import Manifest
from mixloader.pack import write_shard
from mixloader.record import RunRecord, read_record
from mixloader.report import FIELDS, colours, draw_stack, label_right, mixture_over_time, token_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCOREBOARD = Path(__file__).with_name("scoreboard.yaml")
RUNS = Path("runs/scoreboard")
SEED = 0

PREFERENCES = (0.2, 0.5, 0.8)
MOST_DOMAINS = 12
"""Of a mixture that is drawn by domain; those of more are drawn by field."""

INTERVALS = (1, 2, 4)
INTERVALS_IN = "code"
"""The scenario of the scoreboard in which the agent decides at these intervals."""

PLANTED = "planted"
OWN_SHARDS = 4
"""That the target of the planted scenarios keeps: so little text that it is read several times."""
KEPT = ("prose", "kernel_docs")
LEARNED = "python"


@dataclass(frozen=True)
class Mixtures:
    """A mixture over time: weights float64 [N, D] in force from tokens float64 [N] on, the last at the run's end.
    fields: of the D domains, by name."""

    tokens: np.ndarray
    weights: np.ndarray
    fields: dict[str, str | None]

    @classmethod
    def of(cls, record: RunRecord) -> Mixtures:
        return cls(
            *mixture_over_time(record), dict(zip(record.header["domains"], record.header["fields"], strict=True))
        )

    def by_field(self) -> Mixtures:
        """The shares of the fields, as if each were one domain."""
        fields = [field for field in FIELDS if field in self.fields.values()]
        own = np.array(list(self.fields.values()), dtype=object)
        shares = np.stack([self.weights[:, own == field].sum(axis=1) for field in fields], axis=1)
        return Mixtures(self.tokens, shares, {field or "other": field for field in fields})

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """The weights in force at `tokens` [M], float64 [M, D]."""
        return self.weights[np.searchsorted(self.tokens, tokens, side="right") - 1]


def total_variation(one: Mixtures, other: Mixtures, points: int = 1000) -> float:
    """The mean over the run of half the sum of absolute differences: 0 for the same mixtures, 1 for disjoint ones."""
    tokens = np.linspace(0, one.tokens[-1], points, endpoint=False)
    return float(0.5 * np.abs(one.at(tokens) - other.at(tokens)).sum(axis=1).mean())


# What is run


def preferences_suite(scoreboard: Mapping[str, Any]) -> Suite:
    """The agent in every scenario with every preference."""
    agents = {f"{value:g}": {"policy": "agent", "options": {"preference": value}} for value in PREFERENCES}
    return _suite(scoreboard, scoreboard["scenarios"], agents)


def planted_suite(scoreboard: Mapping[str, Any], data: Path) -> Suite:
    """The agent in a small scenario, without a planted domain and with each. data: the folder of planted_data."""
    half = {**dict.fromkeys(KEPT, 0.5 / len(KEPT)), LEARNED: 0.5}
    with_planted = {name: 0.8 * weight for name, weight in half.items()} | {PLANTED: 0.2}

    def scenario(manifest: str, weights: dict[str, float]) -> dict[str, Any]:
        return {
            "data": str(data / f"planted_{manifest}.json"),
            "source": list(KEPT),
            "target": [LEARNED],
            "other": [PLANTED] if PLANTED in weights else [],
            "prior": {"policy": "fixed", "options": {"weights": weights}},
        }

    scenarios = {
        "without": scenario("without", half),
        "useful": scenario("useful", with_planted),
        "useless": scenario("useless", with_planted),
    }
    return _suite(scoreboard, scenarios, {"agent": None})


def intervals_suite(scoreboard: Mapping[str, Any]) -> Suite:
    """The agent in one scenario, deciding at each of the intervals."""
    agents = {str(every): {"policy": "agent", "train": {"decide_every": every}} for every in INTERVALS}
    return _suite(scoreboard, {INTERVALS_IN: scoreboard["scenarios"][INTERVALS_IN]}, agents)


def _suite(scoreboard: Mapping[str, Any], scenarios: Mapping[str, Any], policies: Mapping[str, Any]) -> Suite:
    changes = {"scenarios": scenarios, "policies": policies, "seeds": [SEED], "against": next(iter(policies))}
    return Suite.from_dict({**scoreboard, **changes})


def planted_data(folder: Path) -> None:
    """Write three manifests beside the scoreboard's, of two domains to keep and one to learn, which has little text:
    one without more; one with a domain of the rest of its text; and one with a domain of so many random tokens."""
    board = Manifest.open(folder / "board.json")
    learned = board.domain(LEARNED)
    own = replace(learned, shards=learned.shards[:OWN_SHARDS])
    rest = Domain(PLANTED, learned.shards[OWN_SHARDS:], bytes_per_token=learned.bytes_per_token)
    assert board.vocab_size is not None
    tokens = np.random.default_rng(SEED).integers(board.vocab_size, size=rest.tokens)
    noise = Domain(PLANTED, (write_shard(folder / "planted_random.bin", tokens, vocab_size=board.vocab_size),))
    for name, planted in (("without", ()), ("useful", (rest,)), ("useless", (noise,))):
        domains = (*map(board.domain, KEPT), own, *planted)
        replace(board, domains=domains).save(folder / f"planted_{name}.json")


def play(suite: Suite, out: Path, workers: int) -> dict[tuple[str, str], Mixtures]:
    """The mixtures of each policy in each scenario, by (scenario, policy); raises MixLoaderError if a run fails."""
    rows = run_suite(suite, out, Results(out), workers=workers).rows
    found = {}
    for row in rows:
        if row.result is None:
            raise MixLoaderError(f"{row.scenario}, {row.policy}: {row.error}")
        found[row.scenario, row.policy] = Mixtures.of(read_record(out / "runs" / row.result["key"] / "record.jsonl"))
    return found


# What is drawn


def draw_preferences(found: Mapping[tuple[str, str], Mixtures], path: Path) -> None:
    """A row a scenario, a column a preference."""
    scenarios, names = (list(dict.fromkeys(at[i] for at in found)) for i in (0, 1))
    figure = _figure(11, 1.75 * len(scenarios) + 0.6)
    panels = figure.subplots(len(scenarios), len(names), squeeze=False)
    for of_scenario, scenario in zip(panels, scenarios, strict=True):
        for axes, name in zip(of_scenario, names, strict=True):
            mixtures = found[scenario, name]
            count = len(mixtures.fields)
            shown = mixtures if count <= MOST_DOMAINS else mixtures.by_field()
            labels = axes is of_scenario[-1]
            draw_stack(axes, shown.tokens, shown.weights, shown.fields, labels=labels, size=8, gap=0.095)
            source = mixtures.by_field().weights[-1, 0]
            axes.set_title(f"λ = {name}: {source:.0%} source at the end", loc="left", fontsize=9)
            _small(axes, last=scenario == scenarios[-1])
        of_scenario[0].set_ylabel(f"{scenario}\n{count} domains", fontsize=9, fontweight="bold")
    _title(figure, "The agent's mixtures (% of the batch) by its preference λ for keeping the source")
    figure.savefig(path, dpi=150, facecolor="white")


def draw_planted(found: Mapping[tuple[str, str], Mixtures], path: Path) -> None:
    """A column for each run: without a planted domain, with a useful and with a useless one."""
    titles = {
        "without": "nothing planted",
        "useful": f"planted: more text like {LEARNED}",
        "useless": "planted: random tokens",
    }
    figure = _figure(11, 3.4)
    for axes, (scenario, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        mixtures = next(own for (of, _), own in found.items() if of == scenario)
        draw_stack(axes, mixtures.tokens, mixtures.weights, mixtures.fields)
        if PLANTED in mixtures.fields:
            weights = mixtures.weights[:, list(mixtures.fields).index(PLANTED)]
            title += f", {weights[0]:.0%} → {weights[-1]:.0%}"
        axes.set_title(title, loc="left", fontsize=10)
        _small(axes, last=True)
    _title(figure, "The agent's mixtures (% of the batch) with a planted domain that has no field")
    figure.savefig(path, dpi=150, facecolor="white")


def draw_intervals(found: Mapping[tuple[str, str], Mixtures], path: Path) -> None:
    """A panel a field, a line style an interval."""
    by_interval = {every: next(own for (_, name), own in found.items() if name == str(every)) for every in INTERVALS}
    first = by_interval[INTERVALS[0]]
    palette, names = colours(first.fields), list(first.fields)
    styles = dict(zip(INTERVALS, ("-", (0, (4, 2)), (0, (1, 1.5))), strict=True))
    fields = [field for field in FIELDS if field in first.fields.values()]
    figure = _figure(11, 4.2)
    for axes, field in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        own = [i for i, name in enumerate(names) if first.fields[name] == field]
        for every, mixtures in by_interval.items():
            for i in own:
                axes.step(
                    mixtures.tokens, 100 * mixtures.weights[:, i], where="post", color=palette[names[i]],
                    ls=styles[every], lw=1.6, label=f"every {every}" if i == own[0] else None,
                )  # fmt: skip
        axes.margins(x=0)
        label_right(axes, [(names[i], 100 * first.weights[-1, i], palette[names[i]]) for i in own])
        axes.legend(title="a decision, in steps", frameon=False, fontsize=8, title_fontsize=8)
        axes.set_title(f"{field or 'other'} domains", loc="left", fontsize=10)
        axes.set_ylabel("share of the batch (%)", fontsize=9)
        _small(axes, last=True)
    pairs = pairwise(INTERVALS)
    apart = [f"{a} and {b}: {total_variation(by_interval[a], by_interval[b]):.3f}" for a, b in pairs]
    _title(figure, f"The same run at several decision intervals; mean total variation of {', '.join(apart)}")
    figure.savefig(path, dpi=150, facecolor="white")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _small(axes: Axes, *, last: bool) -> None:
    """The look of a panel among many. last: of its column, so that it says what the axis is."""
    token_axis(axes)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("tokens" if last else "", fontsize=9)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.agent_pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    parser.add_argument("--runs", type=Path, default=RUNS, help=f"the comparison's folder (default {RUNS})")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"runs at a time, one core each (default {cores})")
    args = parser.parse_args(argv)
    scoreboard = read_yaml(SCOREBOARD)
    with sole_user(args.runs, "comparison"):
        planted_data(DATA)
        for name, suite, draw in (
            ("agent_planted", planted_suite(scoreboard, DATA), draw_planted),
            ("agent_intervals", intervals_suite(scoreboard), draw_intervals),
            ("agent_preferences", preferences_suite(scoreboard), draw_preferences),
        ):
            path = args.out / f"{name}.png"
            draw(play(suite, args.runs, args.workers), path)
            print(f"picture {path}", flush=True)


if __name__ == "__main__":
    main()
