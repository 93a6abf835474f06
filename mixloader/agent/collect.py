"""`python -m mixloader collect`: run the episodes that the agent is trained on, and pack them as trajectories."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixloader.agent import behaviours  # noqa: F401  (registers its policies, also in workers)
from mixloader.agent.collection import Collection
from mixloader.agent.corpora import FoldData, open_fold
from mixloader.agent.episode import Episode, base_cell, draw_episode, episode_cell
from mixloader.agent.split import SHIPPED, Split
from mixloader.compare.cell import Cell, is_startable, run_cell
from mixloader.errors import ConfigError
from mixloader.files import replace, sole_user
from mixloader.workers import Engine, Workers, make_workers

COST = "cost.json"
"""In the folder of an episode: the seconds that its run took in the end, after a last resume."""


def run_job(cell: Cell) -> float:
    """Run a cell in a worker; returns the seconds it took."""
    started, busy = time.perf_counter(), time.process_time()
    run_cell(cell)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    replace(cell.out / COST, json.dumps({"seconds": round(seconds, 3), "cpu_seconds": round(busy, 3)}) + "\n")
    return seconds


def collect(
    split: Split,
    corpora: Path,
    out: Path,
    numbers: Sequence[int],
    *,
    workers: int = 1,
    engine: Engine = "local",
    show: bool = True,
) -> list[str]:
    """Run the episodes `numbers` that `out` has not, and what they start from. Returns what failed, a sentence each.

    Killed at any moment, the same call goes on; episodes under way go on from their last checkpoint. Raises a
    MixLoaderError if the corpora are not there or `out` is of another split. show: a line an episode.
    """
    collection = Collection(split, out)
    collection.begin()
    missing = [draw_episode(split, number) for number in numbers if not collection.is_done(number)]
    bases = Bases(split, missing, corpora, out, show)
    with make_workers(run_job, workers, engine) as pool:
        failed = bases.train(pool)
        cells = [
            episode_cell(split, episode, bases.data_of(episode), bases.of(episode), collection.folder(episode.number))
            for episode in missing
            if is_startable(bases.of(episode))
        ]
        failed += Progress("episodes", show, len(numbers) - len(missing)).watch(cells, pool.run(cells))
    return failed


class Bases:
    """What episodes start from: the text of their folds, packed into `out` unless it is there, and the base models.

    Raises ConfigError for a corpus that is needed and that `corpora` does not hold. show: as for collect.
    """

    def __init__(self, split: Split, episodes: Sequence[Episode], corpora: Path, out: Path, show: bool) -> None:
        self.split, self.show = split, show
        self._data: dict[tuple[str, int], FoldData] = {}
        for fold, vocab in sorted({self._text(episode) for episode in episodes}):
            if show:
                print(f"text of fold {fold}, vocabulary {vocab}", flush=True)
            self._data[fold, vocab] = open_fold(split, fold, vocab, corpora, out / "data")
        self._cells = {_base(e): base_cell(split, *_base(e), self.data_of(e), out) for e in episodes}

    def train(self, pool: Workers[Cell]) -> list[str]:
        """Train those that are not there. Returns what failed, a sentence each."""
        needed = [cell for cell in self._cells.values() if not is_startable(cell)]
        return list(Progress("base models", self.show).watch(needed, pool.run(needed)))

    def data_of(self, episode: Episode) -> FoldData:
        return self._data[self._text(episode)]

    def of(self, episode: Episode) -> Cell:
        """The cell whose last parameters the episode starts from."""
        return self._cells[_base(episode)]

    def _text(self, episode: Episode) -> tuple[str, int]:
        return episode.fold, int(self.split.architectures[episode.architecture]["vocab"])


def _base(episode: Episode) -> tuple[str, str, str]:
    return episode.fold, episode.architecture, episode.base


class Progress:
    """A line for each run that ends, with the time that is left. before: runs that were there already."""

    def __init__(self, what: str, show: bool, before: int = 0) -> None:
        self.what, self.show, self.before = what, show, before

    def watch(self, cells: Sequence[Cell], outcomes: Iterator) -> Iterator[str]:
        """Yields a sentence for each run that failed."""
        started, tokens, left = time.monotonic(), 0, sum(cell.tokens for cell in cells)
        total = len(cells) + self.before
        for count, outcome in enumerate(outcomes, 1):
            cell = cells[outcome.index]
            tokens += cell.tokens
            left -= cell.tokens
            took = "failed" if outcome.error is not None else f"{outcome.value:.1f} s"
            hours, seconds = divmod(round((time.monotonic() - started) * left / tokens), 3600)
            if self.show:
                print(
                    f"{self.what}: {count + self.before} of {total}, {cell.title} {took}, "
                    f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} left",
                    flush=True,
                )
            if outcome.error is not None:
                print(f"failed: {cell.title}: {outcome.error}", file=sys.stderr, flush=True)
                yield f"{cell.title}: {outcome.error}"
            elif not cell.keep:
                _tidy(cell.out)


def _tidy(folder: Path) -> None:
    """Leave the record, what was drawn, and the result."""
    for name in ("training.json", "scored.json", "metrics.jsonl", ".lock"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the episodes that the agent is trained on. Stopped, the same command goes on with what is missing."""
    parser = argparse.ArgumentParser(prog="python -m mixloader collect", description=main.__doc__)
    parser.add_argument("split", nargs="?", type=Path, default=SHIPPED, help="a YAML file; by default the shipped one")
    parser.add_argument("--corpora", type=Path, help="folder of NAME.jsonl or NAME.jsonl.gz, for the split's corpora")
    parser.add_argument("--out", type=Path, default=Path("runs/collect"), help="folder for all it writes")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"runs at a time, one core each (default {cores})")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="processes here, or Ray")
    parser.add_argument("--episodes", metavar="A:B", help="from A to before B; by default all of the split")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="then write all finished episodes to FILE, and DATA.md"
    )
    args = parser.parse_args(argv)
    split = Split.load(args.split)
    failed: list[str] = []
    if args.corpora is not None:
        numbers = _numbers(args.episodes, split.episodes)
        with sole_user(args.out, "collection"):
            failed = collect(split, args.corpora, args.out, numbers, workers=args.workers, engine=args.engine)
    elif args.pack is None:
        raise ConfigError("expected --corpora DIR to run episodes, or --pack FILE to pack finished ones")
    if args.pack is not None:
        # While a collection runs, too: what is finished stays as it is.
        from mixloader.agent.data_card import pack_collection

        card = pack_collection(Collection(split, args.out), args.pack)
        print(f"trajectories {args.pack} ({args.pack.stat().st_size / 1e6:.1f} MB)\ncard {card}")
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _numbers(text: str | None, episodes: int) -> range:
    if text is None:
        return range(episodes)
    try:
        first, last = (int(part) for part in text.split(":"))
        if not 0 <= first < last <= episodes:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--episodes is {text!r}; expected A:B with 0 <= A < B <= {episodes}") from None
    return range(first, last)
