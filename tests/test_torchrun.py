"""The examples and the reference trainer, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from tiny_run import tiny_config, tiny_data

from mixloader.record import read_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
]
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_the_ddp_example_runs(data, tmp_path):
    done = torchrun(tmp_path, EXAMPLES / "ddp.py", data, 11)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 10: loss on rank 0") == 1
    assert [d["step"] for d in read_record(tmp_path / "record.jsonl").decisions] == list(range(11))


def test_the_fsdp2_example_goes_on_from_its_checkpoint(data, tmp_path):
    for steps in (3, 11):
        done = torchrun(tmp_path, EXAMPLES / "fsdp2.py", data, steps, "saved")
        assert done.returncode == 0, done.stderr[-3000:]
    assert "step 10: loss on rank 0" in done.stdout
    assert "step 0:" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["step-000003", "step-000011"]


def test_the_trainer_runs_under_torchrun(data, tmp_path):
    config = tiny_config(data, tmp_path / "out", policy="agent", steps=4).to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = torchrun(tmp_path, "-m", "mixloader", "train", "config.yaml", "--no-progress")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 steps, 512 tokens") == 1
    assert read_record(tmp_path / "out" / "record.jsonl").header["global_batch"] == 8
