"""The demo's tokenizer and base model: both are shipped, and `python -m mixloader.demo.base` makes them.

The tokenizer is a byte-level BPE over all domains, digits one by one. The base model is a small GPT that
was trained with this package's own trainer on the source domains alone, on documents that the demo does
not hold out. It is stored in float16, with its shape and the tokenizer's fingerprint in the header. The
shipped files were made with Python 3.11 and the versions in constraints.txt; the texts of other versions
give other files.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixloader import documents
from mixloader.config import ModelConfig, TrainConfig
from mixloader.demo.corpus import build_corpus, pack_corpus
from mixloader.errors import StateError
from mixloader.manifest import Manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = Path(__file__).with_name("tokenizer.json")
PARAMETERS = Path(__file__).with_name("base.safetensors")
VOCAB_SIZE = 2048
SEQ_LEN = 256


def load_tokenizer() -> Tokenizer:
    """The shipped tokenizer; raises ConfigError where the tokenizers package is missing."""
    return documents.load_tokenizer(TOKENIZER)


def base_model() -> ModelConfig:
    """The shape of the shipped base model.

    Raises StateError if it was trained with another tokenizer than the one shipped beside it.
    """
    from safetensors import safe_open

    with safe_open(PARAMETERS, framework="pt") as file:
        header = file.metadata()
    if header["tokenizer"] != digest(TOKENIZER):
        raise StateError(
            f"{PARAMETERS} was trained with another tokenizer than {TOKENIZER.name} beside it; "
            "restore both files from one version of mixloader, or make both with python -m mixloader.demo.base"
        )
    return ModelConfig(**json.loads(header["model"]))


def source_only(manifest: Manifest) -> Manifest:
    """The part of `manifest` that the base model may read."""
    return dataclasses.replace(manifest, domains=tuple(d for d in manifest.domains if d.field == "source"))


def main(argv: Sequence[str] | None = None) -> int:
    """Make tokenizer.json and base.safetensors anew; killed, the same command goes on."""
    parser = argparse.ArgumentParser(prog="python -m mixloader.demo.base", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-base"), help="folder of the training run")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of 16 x 256 tokens")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)

    from mixloader.train.trainer import train

    data = args.out / "data"
    if not (data / "source.json").exists():
        # More of every domain than the demo reads; what the demo holds out stays held out at any scale.
        corpus = build_corpus(scale=3.0)
        texts = (text for texts in corpus.train.values() for text in texts)
        manifest = pack_corpus(corpus, data, documents.train_tokenizer(texts, VOCAB_SIZE))
        source_only(manifest).save(data / "source.json")
    config = TrainConfig(
        data=str(data / "source.json"),
        out=str(args.out / "run"),
        steps=args.steps,
        batch_size=16,
        seq_len=SEQ_LEN,
        policy="natural",
        decide_every=100,
        learning_rate=3e-3,
        min_lr=3e-4,
        warmup_steps=args.steps // 40,
        checkpoint_every=100,
        eval_every=500,
        eval_windows=32,
        device="cpu",
        threads=args.threads,
        model=ModelConfig(n_layer=3, n_head=4, n_embd=96),
    )
    result = train(config)
    for name, loss in result.losses_after.items():
        print(f"{name:15} {result.losses_before[name]:.3f} -> {loss:.3f} nats a token")
    _ship(result.checkpoint, data / "tokenizer.json")
    return 0


def _ship(checkpoint: Path, tokenizer: Path) -> None:
    from safetensors.torch import load_file, save_file

    from mixloader.train.checkpoint import read_state

    TOKENIZER.write_bytes(tokenizer.read_bytes())
    header = {
        "model": json.dumps(read_state(checkpoint)["config"]["model"]),
        "tokenizer": digest(TOKENIZER),
        "made_by": "python -m mixloader.demo.base",
    }
    parameters = {name: p.half() for name, p in load_file(checkpoint / "model.safetensors").items()}
    save_file(parameters, PARAMETERS, metadata=header)
    PARAMETERS.chmod(0o644)  # safetensors writes for the owner alone
    print(f"wrote {TOKENIZER} and {PARAMETERS} ({PARAMETERS.stat().st_size / 1e6:.1f} MB)")


def digest(path: Path) -> str:
    """sha256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
