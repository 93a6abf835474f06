"""Two ranks of Lightning's DDP on CPUs: `python lightning_ddp.py DATA OUT [CHECKPOINT]`; writes parameters.pt."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mixloader.config import ModelConfig
from mixloader.integrations.lightning import MixCallback, MixDataModule
from mixloader.train.model import build_model


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model(ModelConfig(vocab_size=50, seq_len=16, n_layer=1, n_head=2, n_embd=16))

    def forward(self, input_ids):
        return self.model(input_ids)

    def training_step(self, batch, batch_idx):
        return self.trainer.datamodule.loss(self(batch["input_ids"]), batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(data: str, out: str, checkpoint: str | None = None) -> None:
    torch.manual_seed(0)
    saving = ModelCheckpoint(out, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    ranks = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    trainer = Trainer(max_steps=4, callbacks=[MixCallback(feedback_every=2), saving], **ranks | quiet)
    model = Model()
    datamodule = MixDataModule(data, 4, 16, mixer={"record": Path(out) / "record.jsonl"})
    trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    if trainer.global_rank == 0:
        torch.save(model.state_dict(), Path(out) / "parameters.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
