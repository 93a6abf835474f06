"""`python -m mixloader demo`: continued pre-training on real text, three ways, and how they compare.

Three mixtures read the same number of tokens from the same base model: the target field alone, source and
target half and half, and the agent, which starts from that same half and half. Two runs go at a time, each
in a process of its own with one thread, which is faster than two threads on one run. Whatever is finished
when the demo is killed is not done again by the next call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixloader import report
from mixloader.config import TrainConfig
from mixloader.demo.base import PARAMETERS, SEQ_LEN, base_model, digest, load_tokenizer
from mixloader.demo.corpus import build_corpus, pack_corpus
from mixloader.errors import ConfigError, MixLoaderError, StateError
from mixloader.files import replace, sole_user
from mixloader.manifest import Manifest
from mixloader.policies import make_policy
from mixloader.train.trainer import train
from mixloader.workers import die_with_parent

BATCH_SIZE = 8

WAYS: dict[str, dict[str, Any]] = {
    "target": {"policy": "fields", "policy_options": {"source": 0.0}},
    "half": {"policy": "fields", "policy_options": {"source": 0.5}},
    "agent": {"policy": "agent", "policy_options": {}},
}
"""What differs between the runs; the rest is in `run_config`."""


@dataclass(frozen=True)
class Settings:
    """What the runs depend on, apart from the corpus. steps: of each run. scale: of the corpus."""

    out: Path
    seeds: int
    steps: int
    scale: float

    @property
    def data(self) -> Path:
        return self.out / "data"

    def runs(self) -> list[tuple[str, int]]:
        """(way, seed) of every run: all ways of one seed, then of the next."""
        return [(way, seed) for seed in range(self.seeds) for way in WAYS]

    def folder(self, way: str, seed: int) -> Path:
        return self.out / f"{way}-seed{seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the corpus, train three ways, print the table and draw the picture. Killed, the same command goes on."""
    parser = argparse.ArgumentParser(prog="python -m mixloader demo", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for all it writes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("--steps", type=int, default=128, help="optimizer steps of a run, of 8 x 256 tokens")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the corpus, 1 is 10 MB")
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="runs at a time")
    parser.add_argument("--fresh", action="store_true", help="start over")
    args = parser.parse_args(argv)
    for name in ("seeds", "steps", "jobs", "scale"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}; expected a number above 0")
    settings = Settings(args.out, args.seeds, args.steps, args.scale)
    started = time.monotonic()
    try:
        with sole_user(args.out, "demo"):
            if args.fresh:
                _remove_former(args.out)
            check_settings(settings)
            prepare(settings)
            train_all(settings, args.jobs)
            summarize(settings)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"All done in {time.monotonic() - started:.0f} s.")
    return 0


# The corpus


def check_settings(settings: Settings) -> None:
    """Note in `out` what its runs depend on; raises StateError if it holds runs that depend on something else."""
    given = {"steps": settings.steps, "scale": settings.scale, "base": digest(PARAMETERS)}
    path = settings.out / "demo.json"
    if not path.exists():
        replace(path, json.dumps(given, indent=1) + "\n")
    former = json.loads(path.read_text(encoding="utf-8"))
    for key, value in given.items():
        if former[key] != value:
            raise StateError(
                f"{settings.out} holds runs with {key} = {former[key]}, but now it is {value}; "
                "add --fresh to start over, or choose another --out"
            )


def prepare(settings: Settings) -> None:
    """Build and pack the corpus, unless a former call did, and say what is in it."""
    done = settings.data / "corpus.json"
    if not done.exists():
        started = time.monotonic()
        print("Collecting text from this Python installation ...", flush=True)
        corpus = build_corpus(settings.scale)
        manifest = pack_corpus(corpus, settings.data, load_tokenizer())
        summary = {
            "fields": corpus.fields,
            "bytes": {name: corpus.bytes_of(name) for name in corpus.fields},
            "tokens": {domain.name: domain.tokens for domain in manifest.domains},
            "notes": corpus.notes,
            "seconds": round(time.monotonic() - started, 1),
        }
        replace(done, json.dumps(summary, indent=1) + "\n")
    summary = json.loads(done.read_text(encoding="utf-8"))
    for name, size in summary["bytes"].items():
        print(f"  {name:14} {size / 1e6:5.2f} MB {summary['tokens'][name]:9,} tokens   {summary['fields'][name]}")
    for note in summary["notes"]:
        print(f"  {note}")
    total = sum(summary["bytes"].values()) / 1e6
    print(f"  {len(summary['bytes'])} domains, {total:.1f} MB, collected and packed in {summary['seconds']} s")


# The runs


def run_config(settings: Settings, way: str, seed: int) -> TrainConfig:
    """The TrainConfig of one run."""
    return TrainConfig(
        data=str(settings.data / "manifest.json"),
        out=str(settings.folder(way, seed)),
        seed=seed,
        steps=settings.steps,
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        weights=half_and_half(settings.data) if way == "agent" else None,
        learning_rate=1e-3,
        warmup_steps=max(1, settings.steps // 20),
        eval_windows=min(32, settings.steps),  # a short run is not to spend its time on evaluation
        checkpoint_every=max(1, settings.steps // 4),
        keep_checkpoints=1,
        log_every=max(1, settings.steps // 50),
        init_from=str(PARAMETERS),
        device="cpu",
        threads=1,
        model=base_model(),
        **WAYS[way],
    )


def half_and_half(data: Path) -> dict[str, float]:
    """The mixture of the way of that name, by domain: where the agent starts."""
    domains = Manifest.open(data / "manifest.json").table()
    weights = make_policy("fields", source=0.5).reset(domains)
    assert weights is not None
    return dict(zip(domains.names, map(float, weights), strict=True))


def train_all(settings: Settings, jobs: int) -> None:
    """Train what is not finished, `jobs` runs at a time. Raises MixLoaderError if one fails."""
    left = [run for run in settings.runs() if not (settings.folder(*run) / "result.json").exists()]
    tokens = settings.steps * BATCH_SIZE * SEQ_LEN
    print(f"Training {len(left)} of {len(settings.runs())} runs, each {tokens:,} tokens from the same base model")
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    turn = context.Value("q", 0)
    workers = [
        context.Process(target=_work, args=(settings, left, turn), daemon=True) for _ in range(min(jobs, len(left)))
    ]
    for worker in workers:
        worker.start()
    _watch(settings, left, workers)
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise MixLoaderError(
                f"a training process ended with exit code {worker.exitcode}; its message is above. "
                "Run the same command again to go on with what is left"
            )


def _work(settings: Settings, runs: list[tuple[str, int]], turn: Any) -> None:
    """One training process: takes runs in turn until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=die_with_parent, daemon=True).start()
    while True:
        with turn.get_lock():
            index = turn.value
            turn.value += 1
        if index >= len(runs):
            return
        try:
            train(run_config(settings, *runs[index]), progress=False)
        except MixLoaderError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error


def _watch(settings: Settings, runs: list[tuple[str, int]], workers: list[Any]) -> None:
    """A progress bar over all `runs`, and a line for each that ends, until the workers have ended."""
    budget = settings.steps * BATCH_SIZE * SEQ_LEN
    reported: set[tuple[str, int]] = set()
    read = {run: _tokens_read(settings.folder(*run)) for run in runs}
    interval = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=budget * len(runs), initial=sum(read.values()), unit="tok", unit_scale=True, mininterval=interval)
    with bar:
        while len(reported) < len(runs):
            alive = [worker.sentinel for worker in workers if worker.is_alive()]
            wait(alive, timeout=0.5)
            for run in sorted(set(runs) - reported, key=runs.index):
                tokens = _tokens_read(settings.folder(*run))
                bar.update(tokens - read[run])
                read[run] = tokens
                if (settings.folder(*run) / "result.json").exists():
                    reported.add(run)
                    tqdm.write(f"  {_ending(settings, *run)}")
            under_way = [f"{way} seed {seed}" for way, seed in runs if read[way, seed] and (way, seed) not in reported]
            bar.set_postfix_str(", ".join(under_way), refresh=False)
            if not alive:
                return


def _tokens_read(folder: Path) -> int:
    """Tokens that a run has trained on by the last whole line of its metrics."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return 0
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["tokens"]) if whole else 0


def _ending(settings: Settings, way: str, seed: int) -> str:
    run = report.load_run(settings.folder(way, seed))
    after = report.means(run.after, run.fields)
    losses = ", ".join(f"{field} {loss:.3f}" for field, loss in after.items())
    return f"{run.label}, seed {seed}: held-out loss {losses}"


# The end


def summarize(settings: Settings) -> None:
    """Print the table, draw the picture, and say where things are."""
    runs = [report.load_run(settings.folder(*run)) for run in settings.runs()]
    # The picture shows the first seed of the agent in full.
    runs.sort(key=lambda run: (run.label == "agent", -run.seed))
    text = report.table(sorted(runs, key=lambda run: run.seed))
    (settings.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    print(f"table    {settings.out / 'table.txt'}")
    try:
        print(f"picture  {report.draw(runs, settings.out / 'report.png')}")
    except MixLoaderError as error:
        print(f"picture  not drawn: {error}")
    print(f"records  {settings.out}/*/record.jsonl")


def _remove_former(out: Path) -> None:
    """Remove what a demo writes, and nothing else that may be in `out`."""
    for folder in (out / "data", *(path for way in WAYS for path in out.glob(f"{way}-seed*"))):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("demo.json", "table.txt", "report.png"):
        (out / name).unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
