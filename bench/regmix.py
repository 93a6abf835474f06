"""How well the offline fitters rank mixtures that they have not seen: RegMix's own runs.

`python -m bench.regmix --data DIR` with the CSV files of github.com/sail-sg/regmix (data/): laws are fitted to the 512
training runs of a 1M-parameter model and predict the losses of 256 other mixtures at 1M parameters and at 60M.
Settings are chosen by cross-validation on the training runs; the test files are opened after that.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import write_json
from mixloader.fitters import FITTERS, GRIDS, best_of, cross_validate, fit, spearman
from mixloader.fitters.runs import match, read_losses, read_mixtures

RESULT = Path(__file__).parent / "results" / "regmix.json"
PILE_CC = "metric/the_pile_pile_cc_val_loss"
PUBLISHED = {"regmix": {"1m": 0.9845, "60m": 0.9864}, "linear": {"1m": 0.9008, "60m": 0.8926}}
"""Spearman on Pile-CC, RegMix's table 2."""


def runs(folder: Path, split: str, size: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    losses = read_losses(folder / f"{split}_pile_loss_{size}.csv")
    mixtures, values, _ = match(read_mixtures(folder / f"{split}_mixture_{size}.csv"), losses)
    return mixtures, values, losses.columns


def out_of_fold(mixtures: np.ndarray, losses: np.ndarray, folds: int, pile_cc: int) -> dict[str, list[dict[str, Any]]]:
    """Of each method and each of its settings, Spearman out of fold: of Pile-CC, and the mean of all losses."""
    table: dict[str, list[dict[str, Any]]] = {}
    for method, fitter in FITTERS.items():
        grid = GRIDS.get(method, ({},))
        scores = []
        for score in cross_validate(fitter, mixtures, losses, grid, folds=folds):
            scores.append(score)
            print(f"{method:<12}{score.spearman[pile_cc]:.4f} {score.spearman.mean():.4f} {json.dumps(score.settings)}")
        chosen = best_of(scores)
        table[method] = [
            {"settings": s.settings, "chosen": s is chosen, "pile_cc": s.spearman[pile_cc], "mean": s.spearman.mean()}
            for s in scores
        ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.regmix", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of RegMix's CSV files")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULT, help=f"where to write the figures (default {RESULT})")
    args = parser.parse_args()
    mixtures, losses, fields = runs(args.data, "train", "1m")
    pile_cc = fields.index(PILE_CC)
    print(
        f"out of fold on {len(mixtures)} training runs, {args.folds} folds: Spearman of Pile-CC, mean of {len(fields)}"
    )
    cv = out_of_fold(mixtures, losses, args.folds, pile_cc)
    laws: dict[str, tuple[str, dict[str, Any]]] = {
        method: (method, next(dict(row["settings"]) for row in table if row["chosen"])) for method, table in cv.items()
    }
    laws["regmix, published settings"] = ("regmix", {"preset": "published"})
    rows = []
    print(f"\n{'Spearman on unseen mixtures':<30}{'Pile-CC 1M':>12}{'60M':>9}{'mean 1M':>10}{'60M':>9}{'fit, s':>9}")
    for name, (method, settings) in laws.items():
        start = time.perf_counter()
        law = fit(method, mixtures, losses, **settings)
        row: dict[str, Any] = {"law": name, "settings": settings, "fit_s": time.perf_counter() - start}
        for size in ("1m", "60m"):
            x, y, columns = runs(args.data, "test", size)
            predicted = law.predict(x)
            found = {field: spearman(predicted[:, fields.index(field)], y[:, f]) for f, field in enumerate(columns)}
            row[size] = {"pile_cc": found[PILE_CC], "mean": float(np.mean(list(found.values()))), "fields": found}
        rows.append(row)
        print(
            f"{name:<30}{row['1m']['pile_cc']:>12.4f}{row['60m']['pile_cc']:>9.4f}{row['1m']['mean']:>10.4f}"
            f"{row['60m']['mean']:>9.4f}{row['fit_s']:>9.1f}"
        )
    write_json(args.json, rows, cross_validation=cv, folds=args.folds, published=PUBLISHED)


if __name__ == "__main__":
    main()
