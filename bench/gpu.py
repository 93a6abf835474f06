"""Everything that only a GPU can tell: `python -m bench.gpu`, in under 9 minutes on one device.

Each part runs in a process of its own with a time limit, so that one that fails costs no other; what was found is
written to --json after each part. A table of all budgets comes last. Needs no network: tokens are generated.

`--cpu` goes through all parts in tiny sizes without a GPU and says what it leaves out; its figures mean nothing.
`--tune` also looks for the fastest block sizes and warps of the loss kernel (minutes more).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import gpu_influence, gpu_kernel, gpu_tests, gpu_training, loss
from bench.budgets import Budget, table
from bench.common import environment
from bench.gpu_parts import Report, Settings
from mixloader.files import replace

GRACE = 12  # seconds for a part to begin, and to end by itself


def measure_losses(settings: Settings, report: Report) -> None:
    """`python -m bench.loss`, the budgets' vocabularies first."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "loss.json"
        arguments = ["--json", str(path), "--seconds", str(settings.left() - 20), "--device", settings.device]
        if settings.tiny:
            arguments += ["--tokens", "32", "--classes", "64", "--rounds", "2", "--no-compile", "--threads", "1"]
        else:
            arguments += ["--classes", "50304", "128256", "50257", "8192"]
        loss.main(arguments)
        found = json.loads(path.read_text())
    report.add(
        rows=[*found["rows"], *found["heads"]],
        skipped=found["missing"],
        budgets=[Budget.from_json(row) for row in found["budgets"]],
    )


@dataclass(frozen=True)
class Part:
    run: Callable[[Settings, Report], None]
    seconds: float


PARTS = {
    "kernel": Part(gpu_kernel.check_float64, 75),
    "loss": Part(measure_losses, 130),
    "training": Part(gpu_training.check_training, 50),
    "ab": Part(gpu_training.compare, 165),
    "influence": Part(gpu_influence.measure_influence, 50),
    "tests": Part(gpu_tests.run_tests, 120),
    "tune": Part(gpu_kernel.tune, 240),
}
"""The seconds are most of what a part may take; together with the others it also ends where --minutes are over."""


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if not args.cpu and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device, and torch sees none here; --cpu rehearses its parts in tiny sizes.")
        return 2
    if args.part is not None:
        if args.cpu:
            torch.set_num_threads(1)  # with tiny sizes threads wait for each other most of the time
        run_part(args.part, "cpu" if args.cpu else "cuda", args.seconds, args.json)
        return 0
    names = args.only or [name for name in PARTS if name != "tune" or args.tune]
    end = time.monotonic() + 60 * args.minutes
    found: dict[str, dict[str, Any]] = {}
    before = environment()
    for name in names:
        limit = min(PARTS[name].seconds, end - time.monotonic() - GRACE)
        print(f"\n== {name} ==", flush=True)
        found[name] = in_process(name, args.cpu, limit)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            replace(
                args.json, json.dumps({"environment": before, "rehearsal": args.cpu, "parts": found}, indent=1) + "\n"
            )
    budgets = budgets_of(found)
    print("\n" + summary(found, budgets))
    if args.cpu:
        print("a rehearsal: none of these figures means anything")
    if args.json is not None:
        print(f"all of it is in {args.json}")
    failed = any(part["status"] != "ok" for part in found.values())
    return int(failed or (not args.cpu and any(budget.met is False for budget in budgets)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="rehearse all parts in tiny sizes without a GPU")
    parser.add_argument("--tune", action="store_true", help="look for the best block sizes and warps, too")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="take these parts only")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing new is begun (default 9)")
    parser.add_argument("--json", type=Path, help="default bench/results/gpu.json; none in a rehearsal")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.json is None and not args.cpu:
        args.json = Path(__file__).parent / "results" / "gpu.json"
    return args


def run_part(name: str, device: str, seconds: float, path: Path | None) -> Report:
    report = Report(path)
    PARTS[name].run(Settings(device, time.monotonic() + seconds), report)
    return report


def in_process(name: str, cpu: bool, seconds: float) -> dict[str, Any]:
    """What a part found, and how it ended."""
    if seconds < GRACE:
        return {"status": "no time was left", **Report().to_json()}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "bench.gpu", "--part", name, "--seconds", str(seconds - GRACE)]
        command += ["--json", str(path), *(["--cpu"] if cpu else [])]
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
        found = json.loads(path.read_text()) if path.exists() else Report().to_json()
        return {"status": status, "seconds": round(time.monotonic() - begin, 1), **found}


def budgets_of(parts: dict[str, dict[str, Any]]) -> list[Budget]:
    """Those of all parts, and of a part that did not end well that its own may not be all."""
    found = []
    for name, part in parts.items():
        found += [Budget.from_json(row) for row in part["budgets"]]
        if part["status"] != "ok":
            found.append(Budget(f"the rest of part {name}", None, 0.0, "", note=part["status"]))
    return found


def summary(parts: dict[str, dict[str, Any]], budgets: list[Budget]) -> str:
    lines = []
    for name, part in parts.items():
        for key, value in part["figures"].items():
            lines.append(f"{name}: {key}: {json.dumps(value)}")
        for key, reason in part["skipped"].items():
            lines.append(f"{name}: not measured: {key}: {reason}")
    lines += ["", *(f"{name}: {part['status']}, {part.get('seconds', 0)} s" for name, part in parts.items()), ""]
    return "\n".join([*lines, table(budgets)])


if __name__ == "__main__":
    sys.exit(main())
