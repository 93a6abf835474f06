"""Influence on two processes, under DDP and FSDP2, is that of one process on all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
HERE = Path(__file__).parent


def train(kind: str, ranks: int, folder: Path) -> dict:
    """What rank 0 of influence_run.train_on_ranks wrote."""
    store, out = folder / f"{kind}.store", folder / f"{kind}.json"
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(HERE / "influence_run.py"), kind, str(store), str(out)]
    started = [
        subprocess.Popen([*program, str(rank), str(ranks)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train("alone", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_measure_what_one_does(kind, alone, tmp_path):
    both = train(kind, 2, tmp_path)
    assert both["total"] == pytest.approx(alone["total"], rel=1e-5), "the same training, too"
    for ours, theirs in zip(both["tables"], alone["tables"], strict=True):
        for key, expected in theirs.items():
            expected = np.array(expected)
            scale = np.nanmax(np.abs(expected)) if np.isfinite(expected).any() else 0.0
            np.testing.assert_allclose(np.array(ours[key]), expected, rtol=1e-3, atol=1e-5 * scale, err_msg=key)
