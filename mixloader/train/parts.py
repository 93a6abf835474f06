"""The parts of a run that its config may ask for: a reference model, probe files, guards, losses from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixloader.answers import Answers
from mixloader.config import TrainConfig
from mixloader.documents import load_tokenizer
from mixloader.errors import ConfigError
from mixloader.guards import Guards
from mixloader.manifest import Manifest
from mixloader.scorer import Reference, read_losses
from mixloader.train.checkpoint import load_model
from mixloader.train.model import LanguageModel

_LOSS_OPTIONS = ("reference_losses", "target_losses", "initial_losses")


def open_reference(config: TrainConfig, model: LanguageModel, device: torch.device) -> Reference | None:
    """The model of `config.reference`; raises ConfigError if it does not take the tokens of `model`."""
    if config.reference is None:
        return None
    found = load_model(Path(config.reference))
    for name, own in (("vocab_size", model.vocab_size), ("seq_len", config.seq_len)):
        if getattr(found, name) < own:
            raise ConfigError(
                f"the model of reference = {config.reference} has {name} {getattr(found, name)}, less than the {own} "
                "of this run; train one on the same tokens"
            )
    return Reference(found.to(device), dtype=None if config.dtype == "float32" else torch.bfloat16)


def open_answers(config: TrainConfig, model: LanguageModel, manifest: Manifest) -> dict[str, Answers]:
    """The probe files of `config.answers`, read with the tokenizer beside the manifest, if there is one."""
    tokenizer = None
    if config.answers and manifest.tokenizer is not None and isinstance(config.data, str):
        folder = Path(config.data) if Path(config.data).is_dir() else Path(config.data).parent
        path = folder / manifest.tokenizer["path"]
        tokenizer = load_tokenizer(path) if path.exists() else None
    return {
        name: Answers(path, model.seq_len, tokenizer=tokenizer, vocab_size=model.vocab_size, eot=manifest.eot)
        for name, path in config.answers.items()
    }


def open_guards(config: TrainConfig) -> Guards | None:
    """Raises ConfigError for an option that Guards does not have."""
    try:
        return Guards(**config.guards) if config.guards else None
    except TypeError as error:
        raise ConfigError(f"there are no guards with options {config.guards}: {error}") from error


def policy_options(config: TrainConfig) -> dict[str, Any]:
    """`config.policy_options`, with the losses that a file named there holds in its place, so the record has them."""
    return {
        key: read_losses(value) if key in _LOSS_OPTIONS and isinstance(value, str) else value
        for key, value in config.policy_options.items()
    }
