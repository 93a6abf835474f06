"""nanoGPT's own train.py with its own loader and with mixloader, at fixed natural weights: loss curves, step times.

`python -m bench.nanogpt NANOGPT` takes a checkout of karpathy/nanoGPT, of which nothing is part of this repository. The
change to its train.py is the one that docs/nanogpt.md shows. The two runs of a seed take turns of a second, so that
what the machine does besides reaches both; they begin with the same parameters and see as many tokens.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from bench.common import ratios, spread, write_json

KINDS = ("own", "mix")
DOCUMENT = Path(__file__).parents[1] / "docs" / "nanogpt.md"
_LINE = re.compile(r"^iter (\d+): loss ([\d.]+), time ([\d.]+)ms", re.MULTILINE)
_TURN = 1.0  # seconds
_SETTLED = 10  # iterations, after which the times of a run are looked at
_CONFIG = {
    "device": "cpu", "dtype": "float32", "compile": False, "n_layer": 2, "n_head": 2, "n_embd": 64, "batch_size": 12,
    "block_size": 64, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "warmup_iters": 20, "eval_iters": 2,
    "eval_interval": 10**9, "log_interval": 1, "bias": False,
}  # fmt: skip


def changed(source: str, document: str) -> str:
    """train.py with the change that a document shows in its block of ```diff; ValueError where it does not fit."""
    block = re.search(r"```diff\n(.*?)```", document, re.DOTALL)
    hunks = [] if block is None else re.split(r"^@@.*\n", block[1], flags=re.MULTILINE)[1:]
    if not hunks:
        raise ValueError("the document has no block of ```diff with a change in it")
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        if source.count(old) != 1:
            raise ValueError(f"train.py has {source.count(old)} places for\n{old}")
        source = source.replace(old, new)
    return source


def write_data(folder: Path, vocab_size: int) -> None:
    """The same tokens as nanoGPT reads them, own/train.bin, and as two domains, mix/code/ and mix/prose/.

    A token is a pair of bytes; all pairs but the vocab_size - 1 most frequent ones are the last id.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    code = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[: 1 << 21]
    texts = {"code": code, "prose": (library / "pydoc_data" / "topics.py").read_bytes()}
    pairs = {name: np.frombuffer(text[: len(text) // 2 * 2], dtype="<u2") for name, text in texts.items()}
    counts = np.bincount(np.concatenate(list(pairs.values())), minlength=1 << 16)
    ids = np.empty(1 << 16, dtype="<u2")
    ids[np.argsort(-counts, kind="stable")] = np.minimum(np.arange(1 << 16), vocab_size - 1)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for name, found in pairs.items():
        tokens = ids[found]
        cut = len(tokens) * 9 // 10
        (folder / "mix" / name).mkdir(parents=True)
        for split, part in (("train", tokens[:cut]), ("val", tokens[cut:])):
            part.tofile(folder / "mix" / name / f"{split}.bin")
            parts[split].append(part)
    (folder / "own").mkdir()
    for split, several in parts.items():
        np.concatenate(several).tofile(folder / "own" / f"{split}.bin")
    for name in KINDS:  # how nanoGPT is told of a vocabulary
        (folder / name / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def run(folder: Path, seed: int, iterations: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Losses and milliseconds of each iteration, float64 [iterations + 1], of train_own.py and of train_mix.py."""
    path = os.pathsep.join([str(DOCUMENT.parents[1]), os.environ.get("PYTHONPATH", "")])
    processes = {}
    for kind in KINDS:
        place = folder / f"{kind}-{seed}"
        place.mkdir()
        for file in ("model.py", "configurator.py"):
            (place / file).symlink_to(folder / file)
        (place / "data").symlink_to(folder / "data")
        (place / "train.py").write_text((folder / f"train_{kind}.py").read_text().replace("1337", str(seed)))
        config = _CONFIG | {"dataset": kind, "max_iters": iterations, "lr_decay_iters": iterations}
        with (place / "out.txt").open("w") as out:
            processes[kind] = subprocess.Popen(
                [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in config.items())],
                cwd=place,
                env=os.environ | {"PYTHONPATH": path},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
    try:
        take_turns(list(processes.values()))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    results = {}
    for kind, process in processes.items():
        output = (folder / f"{kind}-{seed}" / "out.txt").read_text()
        values = np.array([tuple(map(float, groups)) for groups in _LINE.findall(output)])
        if process.returncode or len(values) != iterations + 1:
            raise RuntimeError(f"{kind}, seed {seed}:\n{output[-4000:]}")
        results[kind] = values[:, 1], values[:, 2]
    return results


def take_turns(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let each process run for a moment while the others are stopped, until all have ended.

    So whatever else slows the machine slows all of them. The iteration that is stopped seems long; a median forgets it.
    """
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    while any(process.returncode is None for process in processes):
        for process in processes:
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_TURN)
                    continue
                process.send_signal(signal.SIGSTOP)


def compare(curves: Mapping[str, np.ndarray], parts: int = 5) -> list[dict[str, float]]:
    """Mean losses in `parts` of the runs, and their difference over the seeds with its standard error.

    curves: float64 [seeds, iterations] each.
    """
    rows = []
    bounds = np.linspace(0, curves["own"].shape[1], parts + 1).astype(int)
    for begin, end in itertools.pairwise(bounds):
        own, mix = (curves[kind][:, begin:end].mean(1) for kind in ("own", "mix"))
        apart = mix - own
        rows.append(
            {
                "from": int(begin),
                "to": int(end),
                "own": float(own.mean()),
                "mixloader": float(mix.mean()),
                "difference": float(apart.mean()),
                "standard_error": _std(apart) / math.sqrt(len(apart)),
                "own_std": _std(own),
            }
        )
    return rows


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nanogpt", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default 5)")
    parser.add_argument("--iterations", type=int, default=300, help="of each run (default 300)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids of the model and the data (default 4096)")
    parser.add_argument("--json", type=Path, help="write the rows, hardware and versions to this file")
    args = parser.parse_args()
    curves: dict[str, list[np.ndarray]] = {"own": [], "mix": []}
    times: dict[str, list[np.ndarray]] = {"own": [], "mix": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("model.py", "configurator.py"):
            (folder / file).write_text((args.checkout / file).read_text())
        own = (args.checkout / "train.py").read_text()
        (folder / "train_own.py").write_text(own)
        mixed = changed(own, DOCUMENT.read_text()).replace(
            "device=device,", "device=device, policy='natural', seed=1337,"
        )
        (folder / "train_mix.py").write_text(mixed)
        write_data(folder / "data", args.vocab_size)
        for seed in range(args.seeds):
            for kind, (losses, milliseconds) in run(folder, seed, args.iterations).items():
                curves[kind].append(losses)
                times[kind].append(milliseconds[_SETTLED:])
                middle = statistics.median(times[kind][-1])
                print(f"seed {seed} {kind}: {middle:.2f} ms a step, last losses {losses[-20:].mean():.4f}", flush=True)
    rows = compare({kind: np.array(several) for kind, several in curves.items()})
    for row in rows:
        print(
            f"iterations {row['from']} to {row['to']}: own {row['own']:.4f}, mixloader {row['mixloader']:.4f}, "
            f"difference {row['difference']:+.4f} +- {row['standard_error']:.4f} "
            f"(own between seeds {row['own_std']:.4f})"
        )
    medians = {kind: [statistics.median(each) for each in several] for kind, several in times.items()}
    ratio = ratios(medians["mix"], medians["own"])
    print(f"step time, mixloader by own: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    steps = {kind: spread(each) for kind, each in medians.items()} | {"ratio": ratio}
    config = _CONFIG | {"vocab_size": args.vocab_size, "seeds": args.seeds, "iterations": args.iterations}
    write_json(args.json, rows, milliseconds=steps, config=config)


if __name__ == "__main__":
    main()
