"""Training with Lightning: killed and resumed, it is the run that was not; what cannot work is said before it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import VOCAB_SIZE, tiny_data

pytest.importorskip("lightning", reason="lightning is not installed (pip install 'mixloader[lightning]')")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mixloader import MixLoader, read_record
from mixloader.errors import ConfigError
from mixloader.integrations.lightning import MixCallback, MixDataModule

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*:Warning:lightning", "ignore::Warning")

EXAMPLE = """
import hashlib, os, signal, sys
import with_lightning
from mixloader.integrations.lightning import MixCallback

data, out, steps, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
real = MixCallback.on_train_batch_end

def watched(self, trainer, module, outputs, batch, batch_idx):
    digest = hashlib.sha256(batch["input_ids"].numpy().tobytes() + batch["targets"].numpy().tobytes()).hexdigest()
    with open(out + ".batches", "a") as file:
        print(batch["step"], batch["micro_step"], digest, file=file, flush=True)
    if batch["step"] == die_at and batch["micro_step"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, trainer, module, outputs, batch, batch_idx)

MixCallback.on_train_batch_end = watched
with_lightning.main(data, out, steps)
"""


def run_example(data: Path, out: Path, die_at: int = -1) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples"), *sys.path])}
    command = [sys.executable, "-c", EXAMPLE, str(data), str(out), "10", str(die_at)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if die_at < 0 else -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def batches(out: Path) -> dict[tuple[str, str], str]:
    """Digests by plan step and micro-batch; of those that were drawn again, the later ones."""
    return {tuple(line.split()[:2]): line.split()[2] for line in Path(f"{out}.batches").read_text().splitlines()}


def test_the_example_killed_and_resumed_is_the_whole_run(tmp_path):
    data = tiny_data(tmp_path / "data")
    whole, died = tmp_path / "whole", tmp_path / "died"
    run_example(data, whole)
    run_example(data, died, die_at=7)
    drawn = len(Path(f"{died}.batches").read_text().splitlines())
    run_example(data, died)
    assert len(Path(f"{died}.batches").read_text().splitlines()) == drawn + 2 * (10 - 7)  # from the last checkpoint on
    assert batches(died) == batches(whole)
    mine, theirs = (torch.load(out / "last.ckpt", weights_only=False) for out in (died, whole))
    assert mine["global_step"] == 10
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(mine[part], theirs[part], rtol=0, atol=0)
    mine, theirs = read_record(died / "record.jsonl"), read_record(whole / "record.jsonl")
    assert mine.decisions == theirs.decisions
    assert mine.attempts == 2
    assert len({tuple(decision["weights"]) for decision in theirs.decisions}) > 3


def test_two_ranks_decide_as_one_and_go_on_from_a_checkpoint(tmp_path):
    data, out = tiny_data(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def run(*checkpoint):
        command = [sys.executable, str(ROOT / "tests" / "lightning_ddp.py"), str(data), str(out), *map(str, checkpoint)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out / "parameters.pt"), read_record(out / "record.jsonl")

    whole, record = run()
    assert record.header["global_batch"] == 8
    assert [sum(decision["counts"]) for decision in record.decisions] == [8, 8, 8, 8]
    assert {event["event"] for event in record.events} == {"feedback", "end"}
    resumed, again = run(out / "step=2.ckpt")
    assert again.decisions == record.decisions
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


class Bigram(LightningModule):
    """Its data module is told what it draws; forward as HeldOutFeedback wants it."""

    def __init__(self, data: MixDataModule):
        super().__init__()
        self.data, self.seen = data, []
        self.logits = torch.nn.Linear(VOCAB_SIZE, VOCAB_SIZE)

    def forward(self, input_ids):
        return self.logits(torch.nn.functional.one_hot(input_ids, VOCAB_SIZE).float())

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["step"], batch["micro_step"], batch["input_ids"].clone(), self.data.loader.weights))
        return self.data.loss(self(batch["input_ids"]), batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def fit(manifest, out, callbacks=(), steps=6, ckpt_path=None, policy="agent", trainer=None, **options):
    data = MixDataModule(manifest, 4, 16, policy=policy, **options)
    model = Bigram(data)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=out, callbacks=[MixCallback(), *callbacks], **quiet | {"max_steps": steps} | (trainer or {})
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, data, trainer


def test_nothing_is_read_ahead_and_losses_decide_as_in_ones_own_loop(manifest, tmp_path):
    """The losses of step s change the mixture of step s + 2 (lag 1): Lightning adds nothing to it."""
    model, data, _ = fit(manifest, tmp_path, mixer={"record": tmp_path / "record.jsonl"}, seed=3)
    assert [(step, micro) for step, micro, _, _ in model.seen] == [(step, 0) for step in range(6)]
    record = read_record(tmp_path / "record.jsonl")
    assert [(d["step"], d["effect"]) for d in record.decisions] == [(s, s + 2) for s in range(6)]
    assert data.mixer is None  # closed, and the record ended
    assert [event["event"] for event in record.events][-1] == "end"


@pytest.mark.parametrize("influence", [None, {"stride": 1, "probe_every": 1}])
def test_a_resume_restores_loader_mixer_and_influence(manifest, tmp_path, influence):
    options = {"influence": influence, "policy": "influence" if influence else "agent"}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    torch.manual_seed(0)
    whole, _, _ = fit(manifest, tmp_path, [saving], steps=6, **options)
    torch.manual_seed(1)
    rest, _, _ = fit(manifest, tmp_path, steps=6, ckpt_path=tmp_path / "step=2.ckpt", **options)
    assert [seen[0] for seen in rest.seen] == [2, 3, 4, 5]
    for mine, theirs in zip(rest.seen, whole.seen[2:], strict=True):
        assert torch.equal(mine[2], theirs[2])
        assert (mine[3] == theirs[3]).all()
    assert torch.equal(rest.logits.weight, whole.logits.weight)
    with pytest.raises(ConfigError, match="the checkpoint is of a run with a policy, and this one is not"):
        fit(manifest, tmp_path, steps=6, ckpt_path=tmp_path / "step=2.ckpt", policy=None)


def test_without_a_policy_it_is_the_loader(manifest, tmp_path):
    model, _, _ = fit(
        manifest, tmp_path, policy=None, steps=3, trainer={"accumulate_grad_batches": 2}, weights=[1, 1, 2]
    )
    with MixLoader(manifest, 4, 16, grad_accumulation_steps=2, weights=[1, 1, 2], max_steps=3) as loader:
        for (step, micro, ids, _), batch in zip(model.seen, loader, strict=True):
            assert (step, micro) == (batch["step"], batch["micro_step"])
            assert torch.equal(ids, batch["input_ids"])


def test_decisions_and_held_out_losses_are_told(manifest, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    callbacks = [MixCallback(feedback_every=2)]
    data = MixDataModule(manifest, 4, 16, mixer={"record": tmp_path / "record.jsonl"})
    trainer = Trainer(max_steps=4, logger=logger, callbacks=callbacks, enable_progress_bar=False, accelerator="cpu",
                      enable_checkpointing=False, log_every_n_steps=1, enable_model_summary=False)  # fmt: skip
    model = Bigram(data)
    trainer.fit(model, datamodule=data)
    logger.save()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"mix/weight/prose", "mix/tokens/maths", "mix/feedback/target", "mix/policy_ms"} <= set(header)
    feedback = [e for e in read_record(tmp_path / "record.jsonl").events if e["event"] == "feedback"]
    assert [event["step"] for event in feedback] == [1, 3]
    assert set(feedback[0]["losses"]) == {"prose", "code", "maths", "source", "target"}


def test_what_is_missing_is_said_before_the_run(manifest, tmp_path):
    data = MixDataModule(manifest, 4, 16)
    with pytest.raises(ConfigError, match=r"no MixCallback ends the steps of the mixer; add one"):
        Trainer(max_steps=2, logger=False, accelerator="cpu").fit(Bigram(data), datamodule=data)
    with pytest.raises(ConfigError, match=r"the length of the run is not known; give Trainer\(max_steps=...\)"):
        fit(manifest, tmp_path, steps=-1, trainer={"max_epochs": 1})
    model, _, trainer = fit(manifest, tmp_path, steps=-1, trainer={"max_epochs": 1}, max_steps=3)
    assert trainer.global_step == len(model.seen) == 3
