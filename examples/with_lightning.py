"""Lightning on mixloader: `python examples/with_lightning.py DATA [FOLDER] [STEPS]`.

DATA is a manifest.json whose domains have a field ("source" to keep, "target" to learn). Checkpoints and the record go
to FOLDER; the same command again goes on from its last checkpoint. Needs `pip install 'mixloader[lightning]'`.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from mixloader import Manifest
from mixloader.config import ModelConfig
from mixloader.integrations.lightning import MixCallback, MixDataModule
from mixloader.train.model import build_model


class Model(LightningModule):
    def __init__(self, config: ModelConfig, data: MixDataModule):
        super().__init__()
        self.model, self.data = build_model(config), data

    def forward(self, input_ids):
        return self.model(input_ids)

    def training_step(self, batch, batch_idx):
        loss = self.data.loss(
            self(batch["input_ids"]), batch
        )  # next tokens are under batch["targets"], already shifted
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def main(path: str, folder: str = "runs/lightning", steps: int = 1000) -> None:
    seed_everything(1337)
    out, manifest = Path(folder), Manifest.open(path)
    data = MixDataModule(manifest, batch_size=12, seq_len=64, seed=1337, mixer={"record": out / "record.jsonl"})
    out.mkdir(parents=True, exist_ok=True)
    model = Model(ModelConfig(vocab_size=manifest.vocab_size or 50304, seq_len=64, n_layer=4, n_embd=128), data)
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=[MixCallback(), ModelCheckpoint(out, save_last=True, every_n_train_steps=max(1, steps // 10))],
        default_root_dir=out,
        log_every_n_steps=1,
    )
    last = out / "last.ckpt"
    trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:2], *map(int, arguments[2:3]))
