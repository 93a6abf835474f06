"""CSV files of runs, as RegMix and Olmix write them: a mixture or the losses of one run a line.

RegMix: the first column, `index`, names the run; the others are domains, or losses (metric/..._val_loss).
Olmix: `run` or `run_id` names it in ratios.csv and metrics.csv; `name`, `index` and unnamed columns are left out.
Two files are matched by the run's name, not by line: Olmix keeps the order of each file, which pairs a mixture with the
losses of another run where the orders differ.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixloader.errors import TableError
from mixloader.files import replace

RUN_COLUMNS = ("run", "run_id", "index")
"""Columns that name a run, in order of preference."""

_NOT_NUMBERS = ("run", "run_id", "index", "name")


@dataclass(frozen=True)
class Table:
    """path: of the file. run_column: which column named the runs. runs: their names. values: float64 [N, columns]."""

    path: Path
    run_column: str
    runs: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray

    def select(self, columns: Sequence[str]) -> np.ndarray:
        """float64 [N, len(columns)] in this order. Raises TableError for a column that the file has not."""
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise TableError(f"{self.path} has no column {missing[0]!r}; its columns are {', '.join(self.columns)}")
        return self.values[:, [self.columns.index(column) for column in columns]]


def read_mixtures(path: str | Path) -> Table:
    """A file of mixtures: the columns are domains, the values weights >= 0 that sum to 1 within 0.01, left as they are.

    Raises TableError, which names file, line and column, for anything else.
    """
    table, lines = _read(Path(path))
    for values, line in zip(table.values, lines, strict=True):
        if (values < 0).any():
            column = table.columns[int((values < 0).argmax())]
            raise TableError(f"{path}, line {line}, column {column!r}: a weight is {values.min():g}; expected >= 0")
        if abs(values.sum() - 1) > 0.01:
            raise TableError(
                f"{path}, line {line}: the weights sum to {values.sum():.6g}; expected 1 within 0.01. "
                "A column that is no domain must be called run, run_id, index or name"
            )
    return table


def read_losses(path: str | Path) -> Table:
    """A file of losses: the columns are fields, the values finite numbers. Raises TableError as `read_mixtures`."""
    return _read(Path(path))[0]


def match(mixtures: Table, losses: Table) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Mixtures [N, D], losses [N, F] and names of the runs in both tables, in the order of the first.

    Raises TableError if they have no run in common.
    """
    at = {run: row for row, run in enumerate(losses.runs)}
    rows = [row for row, run in enumerate(mixtures.runs) if run in at]
    if not rows:
        raise TableError(
            f"{mixtures.path} and {losses.path} have no run in common: the first begins with {mixtures.runs[0]!r}, the "
            f"second with {losses.runs[0]!r}"
        )
    runs = tuple(mixtures.runs[row] for row in rows)
    return mixtures.values[rows], losses.values[[at[run] for run in runs]], runs


def write_table(
    path: str | Path, run_column: str, runs: Iterable[object], columns: Sequence[str], values: np.ndarray
) -> None:
    """Write such a file, whole or not at all. Numbers are the shortest that read back the same."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((run_column, *columns))
    writer.writerows((run, *map(repr, row)) for run, row in zip(runs, values.tolist(), strict=True))
    _write(Path(path), text.getvalue())


def read_weights(path: str | Path) -> dict[str, float]:
    """{domain: number} of a CSV file with columns domain and weight (or tokens), one domain a line."""
    path = Path(path)
    (header, *rows), lines = _lines(path)
    if len(header) != 2 or header[0] != "domain":
        raise TableError(f"{path}, line 1: the columns are {', '.join(header)}; expected domain and weight")
    weights: dict[str, float] = {}
    for (name, text), line in zip(rows, lines, strict=True):
        if name in weights:
            raise TableError(f"{path}, line {line}: domain {name!r} stands there twice")
        weights[name] = _number(path, line, header[1], text)
    return weights


def write_weights(path: str | Path, weights: Mapping[str, float]) -> None:
    """Write {domain: weight} as `read_weights` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("domain", "weight"))
    writer.writerows((name, repr(float(weight))) for name, weight in weights.items())
    _write(Path(path), text.getvalue())


def read_log_probs(path: str | Path) -> tuple[Table, tuple[str, ...]]:
    """A file for MixMin: a line a target text, a column a domain's model with its log-probability in nats.

    The column `length`, if there is one, is the text's tokens; `field` says which field it is of (default: "target").
    Returns the table, `length` among its columns, and the field of each text.
    """
    table, _ = _read(Path(path), texts=("field",), needs_run=False)
    (header, *rows), _ = _lines(Path(path))
    if "field" not in header:
        return table, ("target",) * len(rows)
    return table, tuple(row[header.index("field")] for row in rows)


def _read(path: Path, texts: Sequence[str] = (), needs_run: bool = True) -> tuple[Table, list[int]]:
    """The table, and the line that each run ends on."""
    (header, *rows), lines = _lines(path)
    twice = {column for column in header if column and header.count(column) > 1}
    if twice:
        raise TableError(f"{path}, line 1: the column {min(twice)!r} stands there twice; rename one")
    run_column = next((column for column in RUN_COLUMNS if column in header), "")
    if not run_column and needs_run:
        raise TableError(
            f"{path}, line 1: no column names the runs; expected {', '.join(RUN_COLUMNS)}; found {', '.join(header)}"
        )
    kept = [
        c for c, column in enumerate(header)
        if column and column not in _NOT_NUMBERS and column not in texts and not column.startswith("Unnamed")
    ]  # fmt: skip
    if not kept or not rows:
        raise TableError(
            f"{path} has {len(kept)} columns of numbers and {len(rows)} runs; expected one of each at least"
        )
    seen: dict[str, int] = {}
    for row, line in zip(rows, lines, strict=True):
        run = row[header.index(run_column)] if run_column else str(line)
        if run in seen:
            raise TableError(f"{path}, line {line}, column {run_column!r}: run {run!r} stood in line {seen[run]} too")
        seen[run] = line
    values = [[_number(path, line, header[c], row[c]) for c in kept] for row, line in zip(rows, lines, strict=True)]
    return Table(path, run_column, tuple(seen), tuple(header[c] for c in kept), np.array(values)), lines


def _lines(path: Path) -> tuple[list[list[str]], list[int]]:
    """Header and rows, all as wide as the header, and the line number of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read {path}: {error}") from error
    reader = csv.reader(io.StringIO(text))
    found: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if row:
                found.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num}: {error}") from error
    if not found:
        raise TableError(f"{path} is empty; expected a line of column names")
    for row, line in zip(found, lines, strict=True):
        if len(row) != len(found[0]):
            raise TableError(f"{path}, line {line}: {len(row)} cells under {len(found[0])} columns")
    return found, lines[1:]


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise TableError(
            f"{path}, line {line}, column {column!r}: {text!r} is no finite number; correct it or leave the run out"
        )
    return number


def _write(path: Path, text: str) -> None:
    try:
        replace(path, text)
    except OSError as error:
        raise TableError(f"cannot write {path}: {error}") from error
