"""A comparison as Markdown: the policies, best first, and below the loss on every domain of each scenario."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mixloader.compare.bootstrap import DRAWS
from mixloader.compare.comparison import Comparison, Row

_SEES = {"feedback": "feedback", "score": "the score", "": ""}


def table(comparison: Comparison) -> str:
    """The whole text of table.md."""
    parts = [_policies(comparison), *_notes(comparison)]
    parts += [_domains(comparison, name) for name in comparison.settings]
    return "\n\n".join(parts) + "\n"


def _policies(comparison: Comparison) -> str:
    suite = comparison.suite
    has_unprobed = not math.isnan(comparison.before("unprobed"))
    keys = ["source", *(["unprobed"] if has_unprobed else []), "target"]
    titles = {"source": "source", "unprobed": "source, no probe", "target": "target"}
    rows = [
        ["policy", "balanced", f"minus {suite.against} [95 %]", *(titles[key] for key in keys), "source read",
         "tokens", "extra tokens", "sees"]
    ]  # fmt: skip
    for policy in comparison.policies:
        own = comparison.rows_of(policy)
        interval = comparison.difference(policy)
        against = "" if policy == suite.against or math.isnan(interval.mean) else (
            f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
        )  # fmt: skip
        rows.append(
            [policy + _marks(own), _loss(comparison.mean(policy, "balanced")), against,
             *(_loss(comparison.mean(policy, key)) for key in keys), _source_read(comparison, own),
             _tokens([row.result["tokens"] for row in own if row.result]),
             _tokens([row.extra_tokens for row in own]), " and ".join(sorted({_SEES[r.sees] for r in own} - {""}))]
        )  # fmt: skip
    before = [_loss(comparison.before(key)) for key in ("balanced", *keys)]
    rows.append(["*before*", before[0], "", *before[1:], "", "", "", ""])
    return markdown(rows)


def _notes(comparison: Comparison) -> list[str]:
    suite, lines = comparison.suite, []
    scenarios, seeds = len(suite.scenarios), len(suite.seeds)
    lines.append(
        f"Held-out loss, nats a token, lower is better; mean over {_count(scenarios, 'scenario')} of the mean over "
        f"{_count(seeds, 'seed')}. Balanced: preference * source + (1 - preference) * target, each the mean over all "
        f"domains of the field. Intervals: paired bootstrap over scenarios, then seeds, {DRAWS:,} draws. Extra tokens: "
        "trained in a scenario before the policy runs. Sees: held-out text that decides the mixture; it has no "
        "document in common with the text of the score, except where it says that it sees the score."
    )
    for row in comparison.failures():
        lines.append(f"† failed: {row.scenario}, {row.policy}, seed {row.seed}: {row.error}")
    errors = [row for row in comparison.rows if row.result and row.result["policy_errors"]]
    for row in errors:
        count = row.result["policy_errors"] if row.result else 0
        lines.append(f"‡ {row.scenario}, {row.policy}, seed {row.seed}: {_count(count, 'decision')} failed")
    return lines


def _domains(comparison: Comparison, scenario: str) -> str:
    setting = comparison.settings[scenario]
    results = {
        policy: [r.result["points"] for r in comparison.rows_of(policy) if r.scenario == scenario and r.result]
        for policy in comparison.policies
    }
    some = next((points for of in results.values() for points in of), None)
    if some is None:
        return f"{scenario}: no run ended"
    names = [name for name in setting.scenario.fields if name in some[0]["losses"]]
    rows = [["policy", *(_domain_title(setting.scenario.fields[n], n, n in setting.scenario.probed) for n in names)]]
    for policy, runs in results.items():
        if runs:
            means = [np.mean([points[-1]["losses"][name] for points in runs]) for name in names]
            rows.append([policy, *map(_loss, means)])
    rows.append(["*before*", *(_loss(some[0]["losses"][name]) for name in names)])
    fields = f"preference {setting.scenario.preference:g}; `p` marks the domains that probes cover"
    return f"**{scenario}**: loss on every domain ({fields})\n\n{markdown(rows)}"


def _domain_title(field: str | None, name: str, probed: bool) -> str:
    return f"{name} ({field or 'other'}{', p' if probed else ''})"


def _marks(rows: Sequence[Row]) -> str:
    failed = any(row.error is not None for row in rows)
    undecided = any(row.result and row.result["policy_errors"] for row in rows)
    return " †" * failed + " ‡" * undecided


def _source_read(comparison: Comparison, rows: Sequence[Row]) -> str:
    """The share of the tokens that were of the source field."""
    shares = []
    for row in rows:
        if row.result:
            read = row.result["read"]
            source = comparison.settings[row.scenario].scenario.source
            shares.append(sum(read[name] for name in source) / sum(read.values()))
    return f"{np.mean(shares):.0%}" if shares else ""


def _tokens(counts: Sequence[int]) -> str:
    mean = float(np.mean(counts)) if counts else 0.0
    return f"{mean / 1e6:.2f}M" if mean >= 1e5 else f"{mean:,.0f}" if mean else ""


def _loss(value: float | np.floating) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, whose first row is its head, with columns as wide as they have to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
