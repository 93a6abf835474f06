"""Training with torchtitan: killed and resumed, it is the run that was not."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_data

pytest.importorskip("torchtitan", reason="torchtitan is not installed (pip install torchtitan==0.3.0)")

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mixloader import MixLoader, read_record
from mixloader.errors import ConfigError, StateError

with warnings.catch_warnings():  # torchtitan compiles functions when it is imported, which warns
    warnings.simplefilter("ignore")
    from torchtitan.components.loss import CrossEntropyLoss

    from mixloader.integrations import torchtitan as integration
    from mixloader.integrations.torchtitan import MixDataLoader, MixLoss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ROOT = Path(__file__).parents[1]


def run_example(data: Path, out: Path, die_at: int = -1) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    script = ROOT / "tests" / "torchtitan_run.py"
    command = [sys.executable, str(script), str(data), str(out), "10", str(die_at)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if die_at < 0 else -signal.SIGKILL), done.stderr[-3000:]
    return done.stderr


def batches(out: Path) -> list[list[str]]:
    """Step and digest of each micro-batch that was trained on, in order."""
    return [line.split() for line in Path(f"{out}.batches").read_text().splitlines()]


def checkpoint(out: Path, step: int) -> dict:
    path = out / f"{step}.pt"
    dcp_to_torch_save(out / "checkpoint" / f"step-{step}", path)
    return torch.load(path, weights_only=False)


def test_the_example_killed_and_resumed_is_the_whole_run(tmp_path):
    data = tiny_data(tmp_path / "data")
    whole, died = tmp_path / "whole", tmp_path / "died"
    run_example(data, whole)
    run_example(data, died, die_at=7)
    run_example(data, died)
    # Two micro-batches a step; the step that was under way is trained again, from its beginning.
    expected = batches(whole)
    assert [step for step, _ in expected] == [str(step) for step in range(1, 11) for _ in range(2)]
    assert batches(died) == [*expected[:13], *expected[12:]]
    mine, theirs = checkpoint(died, 10), checkpoint(whole, 10)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine[name], value), name
    state = json.loads(theirs["dataloader"]["mixloader"])
    assert json.loads(mine["dataloader"]["mixloader"]) == state
    assert state["loader"]["step"] == state["mixer"]["step"] == 10
    mine, theirs = read_record(died / "record.jsonl"), read_record(whole / "record.jsonl")
    assert mine.decisions == theirs.decisions
    assert mine.attempts == 2
    assert [(d["step"], d["effect"]) for d in theirs.decisions] == [(s, s + 2) for s in range(10)]
    assert len({tuple(decision["weights"]) for decision in theirs.decisions}) > 3
    assert [event["event"] for event in theirs.events][-1] == "end"
    # What torch.distributed.checkpoint keeps of it is one entry, the same whatever the number of ranks.
    names = FileSystemReader(whole / "checkpoint" / "step-10").read_metadata().state_dict_metadata
    assert [name for name in names if name.startswith("dataloader")] == ["dataloader.mixloader"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "get_local_device", lambda: torch.device("cpu"))
    return tiny_data(tmp_path / "data")


def open_loader(data, policy="agent", **options) -> MixDataLoader:
    config = MixDataLoader.Config(data=data, policy=policy, global_batch_size=8, steps=4, **options)
    return config.build(dp_world_size=1, dp_rank=0, tokenizer=None, seq_len=16, local_batch_size=4)


def test_batches_and_losses_are_those_that_torchtitan_would_have(data):
    """Rows, positions and labels already shifted; the sum of losses over all tokens, counted by domain."""
    dataloader, loss = open_loader(data), MixLoss.Config().build(compile_config=None)
    loss.mixer = dataloader.mixer
    with MixLoader(data, 4, 16, global_batch=8, weights=dataloader.loader.weights) as loader:
        for (inputs, labels), batch in zip(dataloader, loader, strict=False):
            assert torch.equal(inputs["input"], batch["input_ids"])
            assert torch.equal(inputs["positions"], torch.arange(16).expand(4, 16))
            assert torch.equal(labels, batch["targets"])
            logits = torch.randn(4, 16, 50, requires_grad=True)
            loss.begin(inputs["domain_ids"])
            mine, _ = loss(logits, labels, torch.tensor(128), positions=inputs["positions"])
            theirs, _ = CrossEntropyLoss.Config().build(compile_config=None)(logits, labels, torch.tensor(128))
            gradients = [torch.autograd.grad(value, logits)[0] for value in (mine, theirs)]
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(*gradients)
            counted = dataloader.mixer.stats.snapshot().wait().sums[:3, 0].tolist()
            assert counted == (16 * torch.bincount(inputs["domain_ids"], minlength=3)).tolist()
            with torch.no_grad():
                torch.testing.assert_close(loss(logits, labels)[0], 128 * theirs)
            assert dataloader.mixer.stats.snapshot().wait().sums.sum() == 0  # those of a validation do not count
            if batch["micro_step"] == 1:
                break
    dataloader.close()


def test_what_cannot_go_on_is_said(data):
    with pytest.raises(ConfigError, match=r"the data has ids below 50, but the model a vocabulary of 49"):
        open_loader(data, vocab_size=49)
    dataloader = open_loader(data)
    assert dataloader.state_dict() == {"mixloader": ""}
    with pytest.raises(StateError, match="no state of a MixLoader"):
        dataloader.load_state_dict({"world_size": 1})
    next(iter(dataloader))
    without = open_loader(data, policy=None)
    list(without)
    with pytest.raises(StateError, match="the checkpoint is of a run without a policy, and this one is not"):
        dataloader.load_state_dict(without.state_dict())
    dataloader.close()
    without.close()
