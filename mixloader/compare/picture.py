"""A comparison as a picture: differences with intervals, source against target, and loss over all tokens paid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixloader.compare.comparison import Comparison
from mixloader.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(comparison: Comparison, path: Path) -> Path:
    """Write a PNG; raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture needs matplotlib; pip install 'mixloader[plot]'") from error
    shown = [name for name in comparison.policies if not math.isnan(comparison.mean(name, "balanced"))]
    figure = Figure(figsize=(13, 4 + 0.12 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=[1.1, 1, 1.1])
    colours = _colours(shown)
    _draw_differences(panels[0], comparison, shown, colours)
    _draw_fields(panels[1], comparison, shown, colours)
    _draw_curves(panels[2], comparison, shown, colours)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _colours(names: list[str]) -> dict[str, Any]:
    """From good to bad, along a scale that colour-blind people can read too."""
    from matplotlib import colormaps

    return {name: colormaps["viridis"](0.9 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}


def _draw_differences(axes: Axes, comparison: Comparison, shown: list[str], colours: dict[str, Any]) -> None:
    against = comparison.suite.against
    for height, name in enumerate(reversed(shown)):
        interval = comparison.difference(name)
        if math.isnan(interval.mean):
            continue
        axes.plot([interval.low, interval.high], [height, height], color=colours[name], lw=3, solid_capstyle="round")
        axes.plot(interval.mean, height, "o", color=colours[name], ms=7)
    axes.axvline(0, color="0.6", lw=1, zorder=0)
    axes.set_yticks(range(len(shown)), [f"{name}  {i}" for i, name in enumerate(shown, 1)][::-1])
    axes.set_xlabel(f"minus {against}, nats a token", fontsize=9)
    axes.set_title("Balanced loss, with 95 % intervals", loc="left", fontsize=10, fontweight="bold")


def _draw_fields(axes: Axes, comparison: Comparison, shown: list[str], colours: dict[str, Any]) -> None:
    """Where the policies ended. Small dots: mixtures that a search tried, if there is one scenario alone."""
    if len(comparison.settings) == 1 and comparison.tried:
        tried = {key: [ended[key] for ended in comparison.tried] for key in ("target", "source")}
        axes.scatter(tried["target"], tried["source"], s=8, color="0.8", zorder=0)
    for i, name in enumerate(shown, 1):
        x, y = comparison.mean(name, "target"), comparison.mean(name, "source")
        axes.scatter(x, y, s=35, color=colours[name], zorder=3)
        axes.annotate(str(i), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("target, nats a token", fontsize=9)
    axes.set_ylabel("source, nats a token", fontsize=9)
    axes.set_title("The two fields", loc="left", fontsize=10, fontweight="bold")


def _draw_curves(axes: Axes, comparison: Comparison, shown: list[str], colours: dict[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for i, name in enumerate(shown, 1):
        # The model at no tokens is the same for all, and has no place on a logarithmic axis.
        curve = comparison.curve(name)[1:]
        axes.plot(*zip(*curve, strict=True), "o-", color=colours[name], lw=1.2, ms=3)
        axes.annotate(str(i), curve[-1], xytext=(4, -2), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens trained, those of preparations included", fontsize=9)
    axes.set_ylabel("balanced, nats a token", fontsize=9)
    axes.set_title("At equal total tokens", loc="left", fontsize=10, fontweight="bold")
