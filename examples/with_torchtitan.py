"""torchtitan on mixloader: `python examples/with_torchtitan.py DATA [FOLDER] [STEPS]`, or under torchrun on many GPUs.

DATA is a manifest.json whose domains have a field ("source" to keep, "target" to learn). Checkpoints and the record go
to FOLDER; the same command again goes on from its last checkpoint. A config of this kind also runs by torchtitan's own
command line, from a module of yours that holds a function returning it. Needs torchtitan 0.3.
"""

import os
import sys
from pathlib import Path

import torch
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

from mixloader.integrations.torchtitan import NoTokenizer, with_mixture

# torchrun sets these; alone, this is the one process.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def main(data: str, folder: str = "runs/torchtitan", steps: int = 100) -> None:
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    config = Trainer.Config(
        model_spec=model_registry("debugmodel"),
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=4, global_batch_size=8, seq_len=64, steps=steps),
        checkpoint=CheckpointManager.Config(enable=True, interval=max(1, steps // 10), last_save_model_only=False),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=True),
        debug=DebugConfig(seed=1337),
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    trainer = with_mixture(config, data, mixer={"record": Path(folder) / "record.jsonl"}, seed=1337).build()
    try:
        trainer.train()
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:2], *map(int, arguments[2:3]))
