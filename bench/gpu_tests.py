"""The tests that need a GPU, and those of the kernels that run on one where there is one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.budgets import Budget
from bench.gpu_parts import Report, Settings

ROOT = Path(__file__).resolve().parent.parent
ON_THE_DEVICE = ("test_kernel.py", "test_loss.py", "test_loss_features.py", "test_linear_loss.py")


def run_tests(settings: Settings, report: Report) -> None:
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    if settings.tiny:
        report.add(skipped={"tests of the kernels": "without a GPU they belong to the ordinary test run"})
        _pytest("tests marked gpu", ["-m", "gpu", str(ROOT / "tests" / "test_stats.py")], settings.left(), report)
        return
    _pytest("tests marked gpu", ["-m", "gpu", *map(str, marked)], settings.left() / 2, report)
    kernels = [str(ROOT / "tests" / name) for name in ON_THE_DEVICE]
    _pytest("tests of the kernels", ["-m", "not gpu", "-k", "triton or test_kernel", *kernels], settings.left(), report)


def _pytest(name: str, arguments: list[str], seconds: float, report: Report) -> None:
    # What warns in versions that CI does not have is no failure here.
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-W", "default", "-p", "no:cacheprovider", *arguments]
    if torch.cuda.is_available() and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]  # Triton compiles most of the time
    try:
        run = subprocess.run(command, cwd=ROOT, timeout=max(seconds, 1), stdout=subprocess.PIPE, text=True)
        output, code = run.stdout, run.returncode
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        code = -1
    print(output[-6000:], flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output[-2000:])}
    bad = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    stopped = code not in (0, 1)
    note = f"{counts.get('passed', 0)} passed, {counts.get('skipped', 0)} skipped"
    if stopped:
        note += f"; stopped after {seconds:.0f} s" if code == -1 else f"; pytest ended with code {code}"
    report.add(
        rows=[
            {"tests": name, **counts, "code": code, "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)}
        ],
        budgets=[Budget(f"{name}: failures", None if stopped and not bad else float(bad), 0.0, "", note=note)],
    )
