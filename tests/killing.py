"""A script run in a process of its own, that dies of SIGKILL in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_DIES = """
import os, runpy, signal, sys
from mixloader import Mixer
step, script, at = Mixer.step, sys.argv[1], int(sys.argv[2])

def dies(mixer):
    step(mixer)
    if mixer.loader.step >= at:
        os.kill(os.getpid(), signal.SIGKILL)

Mixer.step = dies
sys.argv = sys.argv[1:2] + sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def kill_at_step(step: int, script: str | Path, *arguments: object, cwd: Path | None = None) -> None:
    """Run `script` until Mixer.step() has ended plan step `step` - 1, and kill it there."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", _DIES, str(script), str(step), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stdout[-2000:] + result.stderr[-4000:]
