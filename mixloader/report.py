"""What runs ended with, as a table and as a picture, from their folders alone.

The picture is drawn from the run record (record.jsonl), the table from result.json beside it.
`python -m mixloader report RUN_FOLDER...` does both for any runs; a folder of runs stands for all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixloader.errors import RecordError
from mixloader.mixture import as_fractions
from mixloader.record import RunRecord, read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIELDS = ("source", "target", None)
_HUES = {"source": "Blues", "target": "Oranges", None: "Greys"}


@dataclass(frozen=True)
class Run:
    """A run that has ended. before, after: held-out loss of each domain, nats a token."""

    folder: Path
    record: RunRecord
    before: dict[str, float]
    after: dict[str, float]

    @property
    def label(self) -> str:
        """What decided the mixture, in words."""
        return policy_label(self.record.header["policy"])

    @property
    def seed(self) -> int:
        return int(self.record.header["seed"])

    @property
    def fields(self) -> dict[str, str | None]:
        """Domain to field, in the order of the data."""
        return dict(zip(self.record.header["domains"], self.record.header["fields"], strict=True))


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; raises RecordError if the run has not ended or is not one."""
    folder = Path(folder)
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        before, after = result["losses_before"], result["losses_after"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{folder} has no readable result.json ({error}); expected the folder of a finished run"
        ) from error
    return Run(folder, read_record(folder / "record.jsonl"), before, after)


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Run folders among `folders` and directly below them, in order; raises RecordError if there are none."""
    found = []
    for folder in map(Path, folders):
        if (folder / "record.jsonl").exists():
            found.append(folder)
        else:
            found.extend(sorted(path.parent for path in folder.glob("*/record.jsonl")))
    if not found:
        raise RecordError(f"no run (a folder with record.jsonl) is in {', '.join(map(str, folders))}")
    return found


def policy_label(policy: dict[str, Any]) -> str:
    """A policy as the record's header names it, in words: "target only", "half and half", "agent"."""
    name, options = policy["name"], dict(policy.get("options") or {})
    if name == "fields":
        share = options.pop("source", 0.5)
        name = {0.0: "target only", 0.5: "half and half", 1.0: "source only"}.get(share, f"{share:.0%} source")
    return name + "".join(f" {key}={value}" for key, value in sorted(options.items()))


def means(losses: dict[str, float], fields: dict[str, str | None]) -> dict[str, float]:
    """Mean over the domains of each field, and "balanced": the mean of those means.

    Domains without a field count as a field of their own, under the name "other".
    """
    by_field: dict[str, list[float]] = {}
    for name, loss in losses.items():
        by_field.setdefault(fields.get(name) or "other", []).append(loss)
    result = {field: statistics.fmean(values) for field, values in by_field.items()}
    return result | {"balanced": statistics.fmean(result.values())}


def table(runs: Sequence[Run], against: str = "half and half") -> str:
    """Held-out loss of each domain and field, before and after, a column for each policy.

    Cells are means over seeds, with the sample standard deviation where there are several. Below the
    table, each other policy that ran with the seeds of `against` is compared with it seed by seed.
    """
    fields = runs[0].fields
    columns: dict[str, list[Run]] = {}
    for run in runs:
        columns.setdefault(run.label, []).append(run)
    rows = [["held-out loss, nats a token", "before", *columns]]
    for field in FIELDS:
        names = [name for name, own in fields.items() if own == field and name in runs[0].after]
        if names:
            rows += [_row(f"  {name}", name, columns, lambda losses: losses) for name in names]
            rows.append(_row(f"{field or 'other'} mean", field or "other", columns, lambda x: means(x, fields)))
    rows.append(_row("balanced mean", "balanced", columns, lambda losses: means(losses, fields)))
    seeds = max(len(group) for group in columns.values())
    note = [f"Mean and standard deviation over {seeds} seeds."] if seeds > 1 else []
    return "\n".join([*_align(rows), *note, *_comparisons(columns, against, fields)])


def _row(title: str, key: str, columns: dict[str, list[Run]], pick: Any) -> list[str]:
    before = [pick(run.before)[key] for runs in columns.values() for run in runs]
    after = [[pick(run.after)[key] for run in runs] for runs in columns.values()]
    return [title, f"{statistics.fmean(before):.3f}", *map(_spread, after)]


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ±{statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *(line for text in lines[1:] for line in ([text, rule] if " mean" in text else [text]))]


def _comparisons(columns: dict[str, list[Run]], against: str, fields: dict[str, str | None]) -> list[str]:
    lines = []
    base = {run.seed: means(run.after, fields) for run in columns.get(against, [])}
    for label, runs in columns.items():
        pairs = [(means(run.after, fields), base[run.seed]) for run in runs if run.seed in base]
        if label == against or not pairs:
            continue
        lines.append(f"{label} minus {against}, seed by seed (below zero: {label} is better)")
        for key in pairs[0][0]:
            differences = [mine[key] - theirs[key] for mine, theirs in pairs]
            each = " ".join(f"{difference:+.4f}" for difference in differences)
            lines.append(f"  {key:9} mean {statistics.fmean(differences):+.4f}{_error(differences)}   each {each}")
    return lines


def _error(values: list[float]) -> str:
    """The standard error of the mean, where several values tell it."""
    if len(values) < 2:
        return ""
    return f" (standard error {statistics.stdev(values) / len(values) ** 0.5:.4f})"


def draw(runs: Sequence[Run], path: str | Path) -> Path:
    """Write a PNG: mixture and losses over time of the last run, and how all runs ended if they are several.

    Everything but the last panel comes from the run record. Raises RecordError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecordError("the picture needs matplotlib; pip install 'mixloader[plot]'") from error
    run = runs[-1]
    fields = [field for field in FIELDS if field in run.fields.values()]
    compared = len({other.label for other in runs}) > 1 and {"source", "target"} <= set(fields)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    # As many columns as panels below; the mixture spans them all.
    grid = figure.add_gridspec(2, len(fields) + compared)
    _draw_mixture(figure.add_subplot(grid[0, :]), run)
    panels = [figure.add_subplot(grid[1, i]) for i in range(len(fields) + compared)]
    for axes, field in zip(panels, fields, strict=False):
        _draw_losses(axes, run, field)
    if compared:
        _draw_outcomes(panels[-1], runs)
    path = Path(path)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def colours(fields: dict[str, str | None]) -> dict[str, Any]:
    """One hue a field, from dark to light: blue and orange, which colour-blind people can tell apart."""
    from matplotlib import colormaps

    chosen = {}
    for field in FIELDS:
        names = [name for name, own in fields.items() if own == field]
        for name, shade in zip(names, np.linspace(0.95, 0.4, max(len(names), 1)), strict=False):
            chosen[name] = colormaps[_HUES[field]](shade)
    return chosen


def mixture_over_time(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Tokens float64 [N] at which weights came into force, and the weights, float64 [N, D]."""
    steps = sorted({record.header["step"], *(step for step, _ in record.changes if step < record.steps)})
    weights = as_fractions(np.array([record.units_at(step) for step in steps]))
    tokens = (
        np.array([*steps, record.steps], dtype=np.float64) * record.header["global_batch"] * record.header["seq_len"]
    )
    return tokens, np.concatenate([weights, weights[-1:]])


def losses_over_time(record: RunRecord, points: int = 200, width: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Tokens float64 [points] and training loss of each domain there, float64 [points, D].

    Each loss is a mean over the tokens read nearby, weighted by a Gaussian whose standard deviation is
    `width` of the run; NaN where fewer than two rows were read nearby.
    """
    decisions = record.decisions
    if not decisions:
        return np.zeros(0), np.zeros((0, len(record.header["domains"])))
    tokens = np.array([decision["tokens"] for decision in decisions], dtype=np.float64)
    count = np.array([decision["loss_tokens"] for decision in decisions], dtype=np.float64)
    # null, for nothing read, becomes NaN and then nothing.
    total = np.nan_to_num(np.array([decision["loss"] for decision in decisions], dtype=np.float64)) * count
    # Long runs are summed into 1,000 parts first.
    starts = np.unique(np.linspace(0, len(tokens), 1000, endpoint=False, dtype=np.int64))
    count, total = (np.add.reduceat(sums, starts, axis=0) for sums in (count, total))
    grid = np.linspace(tokens[0], tokens[-1], points)
    near = np.exp(-0.5 * ((grid[:, None] - tokens[starts]) / max(width * tokens[-1], 1)) ** 2)
    read = near @ count
    with np.errstate(invalid="ignore", divide="ignore"):
        return grid, np.where(read >= 2 * record.header["seq_len"], near @ total / read, np.nan)


def _draw_mixture(axes: Axes, run: Run) -> None:
    draw_stack(axes, *mixture_over_time(run.record), run.fields)
    axes.set_ylabel("share of the batch (%)")
    axes.set_title(f"Mixture: {run.label}, seed {run.seed}", loc="left", fontweight="bold")
    token_axis(axes)


def draw_stack(
    axes: Axes,
    tokens: np.ndarray,
    weights: np.ndarray,
    fields: dict[str, str | None],
    *,
    labels: bool = True,
    size: float = 9,
    gap: float = 0.06,
) -> None:
    """A mixture over time as stacked areas: weights [N, D] at tokens [N], of the domains in `fields`, a hue a field.

    labels: names at the right edge; size, gap: as for label_right.
    """
    names, palette = list(fields), colours(fields)
    order = sorted(range(len(names)), key=lambda i: FIELDS.index(fields[names[i]]))
    axes.stackplot(
        tokens,
        weights.T[order] * 100,
        colors=[palette[names[i]] for i in order],
        step="post",
        edgecolor="white",
        lw=0.5,
    )
    axes.set(xlim=(0, tokens[-1]), ylim=(0, 100))
    if labels:
        middles = np.cumsum(weights[-1][order]) - weights[-1][order] / 2
        ends = [(names[i], 100 * y, palette[names[i]]) for i, y in zip(order, middles, strict=True)]
        label_right(axes, ends, size=size, gap=gap)


def _draw_losses(axes: Axes, run: Run, field: str | None) -> None:
    names, palette = list(run.fields), colours(run.fields)
    tokens, losses = losses_over_time(run.record)
    ends = []
    for i, name in enumerate(names):
        known = np.isfinite(losses[:, i])
        if run.fields[name] == field and known.any():
            axes.plot(tokens[known], losses[known, i], color=palette[name], lw=2)
            ends.append((name, float(losses[known, i][-1]), palette[name]))
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title(f"{(field or 'other').capitalize()} domains", loc="left", fontweight="bold")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    label_right(axes, ends)
    token_axis(axes)


def _draw_outcomes(axes: Axes, runs: Sequence[Run]) -> None:
    """Where every run ended: target mean against source mean, both held-out."""
    labels = list(dict.fromkeys(run.label for run in runs))
    markers = dict(zip(labels, "vsoD^PX*" * len(labels), strict=False))
    for label in labels:
        ends = [means(run.after, run.fields) for run in runs if run.label == label]
        x, y = [end["target"] for end in ends], [end["source"] for end in ends]
        axes.scatter(x, y, marker=markers[label], s=45, color="0.15" if label == "agent" else "0.6", lw=0, zorder=3)
        axes.annotate(
            label, (max(x), sum(y) / len(y)), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9
        )
    start = means(runs[0].before, runs[0].fields)
    axes.annotate(
        f"before: target {start['target']:.2f}, source {start['source']:.2f}",
        (0.02, 0.02),
        xycoords="axes fraction",
        fontsize=8,
        color="0.4",
    )
    axes.set(xlabel="target mean, held-out loss (nats a token)", ylabel="source mean, held-out loss")
    axes.set_title("All runs at the end", loc="left", fontweight="bold")
    axes.margins(x=0.35, y=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def label_right(axes: Axes, ends: list[tuple[str, float, Any]], *, size: float = 9, gap: float = 0.06) -> None:
    """Names at the right edge, at the height of what they name, moved apart where they would overlap.

    ends: name, height and colour of each. size: of the type, in points. gap: between two names at least, as a part of
    the height of the axes.
    """
    low, high = axes.get_ylim()
    gap *= high - low
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _ in ends:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    highest = high
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], highest)
        highest = heights[i] - gap
    for (name, _, colour), y in zip(ends, heights, strict=True):
        axes.annotate(
            name, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=size, color=np.multiply(colour[:3], 0.75), annotation_clip=False,
        )  # fmt: skip


def token_axis(axes: Axes) -> None:
    """Tokens along the x axis, from 0 on."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of runs and draw their pictures."""
    parser = argparse.ArgumentParser(prog="python -m mixloader report", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="a run, or a folder of runs")
    parser.add_argument("--out", type=Path, help="PNG to write; by default report.png in the first folder")
    args = parser.parse_args(argv)
    runs = [load_run(folder) for folder in find_runs(args.folders)]
    print(table(runs))
    print(f"picture {draw(runs, args.out or args.folders[0] / 'report.png')}")
    return 0
