"""The tables of RESULTS.md, from what bench.loader wrote.

python -m bench.loader_markdown bench/results/loader.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TIMES, TO = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def measured(spread: dict[str, float] | None, digits: int) -> str:
    """Median and range."""
    if spread is None:
        return ""
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}{TO}{high})"


def throughput(rows: list[Row]) -> None:
    def name(row: Row) -> str:
        helpers = [f"{row[kind]} {kind}" for kind in ("threads", "workers") if row[kind] is not None]
        return ", ".join([row["loader"], *([row["io"]] if row["io"] else []), *helpers])

    table(
        ("loader", "output", "million tokens/s", f"{TIMES} bare C++", f"{TIMES} best numpy", f"{TIMES} nanoGPT"),
        [
            (
                name(row), row["output"], measured(row["mtok_per_s"], 0), measured(row.get("times_bare"), 2),
                measured(row["times_numpy"], 2), measured(row["times_nanogpt"], 1),
            )
            for row in rows
        ],
    )  # fmt: skip


def cold(rows: list[Row]) -> None:
    table(
        ("loader", "threads", "million tokens/s", f"{TIMES} bare mmap with MADV_RANDOM"),
        [
            (row["loader"], row["threads"], measured(row["mtok_per_s"], 1), measured(row["times_mmap_random"], 2))
            for row in rows
        ],
    )


def latency(rows: list[Row]) -> None:
    table(
        ("machine", "step", "call", "p50 µs", "p99 µs", "max µs"),
        [
            (
                f"{row['burners']} busy processes" if row["burners"] else "idle", row["step"], f"`{row['call']}`",
                *(f"{row[key]:.0f}" for key in ("p50_us", "p99_us", "max_us")),
            )
            for row in rows
        ],
    )  # fmt: skip


def scale(rows: list[Row]) -> None:
    start, resume = rows[0], rows[1]
    table(
        ("start-up", "median (range)"),
        [(key, measured(value, 3)) for key, value in start.items() if isinstance(value, dict)],
    )
    print(f"State of step {resume['step']}: {resume['state_bytes']} bytes; s to the first batch from it:")
    print(f"{measured(resume['resume_s'], 4)}.\n\nMicroseconds of one plan step:\n")
    for curve in dict.fromkeys(row["curve"] for row in rows[2:]):
        points = [row for row in rows[2:] if row["curve"] == curve]
        table(
            (curve, *(str(point["size"]) for point in points)),
            [("µs", *(f"{point['us_per_step']['median']:.1f}" for point in points))],
        )


def company(rows: list[Row]) -> None:
    meeting = [row for row in rows if row["what"] == "meeting"]
    table(
        ("seed of the weights", "least weight", "steps, quota", "steps, multinomial"),
        [
            (row["seed"], f"{row['least_weight']:.1e}", *(row[key] or "not met" for key in ("quota", "multinomial")))
            for row in meeting
        ],
    )
    table(
        ("sampling", "steps", "least quota minus count", "greatest"),
        [
            (row["sampling"], row["steps"], f"{row['least']:.2f}", f"{row['greatest']:.2f}")
            for row in rows
            if row["what"] == "drift"
        ],
    )


SECTIONS: dict[str, Callable[[list[Row]], None]] = {
    "throughput": throughput,
    "cold": cold,
    "latency": latency,
    "scale": scale,
    "company": company,
}


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    for section, show in SECTIONS.items():
        if own := [row for row in rows if row["section"] == section]:
            print(f"### {section}\n")
            show(own)


if __name__ == "__main__":
    main()
