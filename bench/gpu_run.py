"""A GPT in training on generated tokens, with mixing and without, as the parts of `python -m bench.gpu` need it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu_parts import Settings
from mixloader import MixLoader
from mixloader.config import ModelConfig, TrainConfig
from mixloader.device import DevicePrefetcher
from mixloader.loss import domain_cross_entropy
from mixloader.mixer import Mixer
from mixloader.stats import DomainStats
from mixloader.train.model import LanguageModel, build_model
from mixloader.train.optimizer import build_optimizer

DOMAINS = 16


class Sizes:
    """GPT-2 124M on 12 x 1,024 tokens; or something tiny."""

    def __init__(self, settings: Settings) -> None:
        tiny = settings.tiny
        self.rows, self.seq_len = (2, 32) if tiny else (12, 1024)
        self.vocab_size, self.ids = (256, 250) if tiny else (50304, 50257)
        layers, width = (2, 32) if tiny else (12, 768)
        self.model = ModelConfig(
            vocab_size=self.vocab_size, seq_len=self.seq_len, n_layer=layers, n_head=width // (16 if tiny else 64),
            n_embd=width,
        )  # fmt: skip
        self.shard_tokens = 4_000 if tiny else 2_000_000
        self.large_step = 4 if tiny else math.ceil(500_000 / (self.rows * self.seq_len))
        """Micro-batches in a step of half a million tokens."""


@contextmanager
def domains(sizes: Sizes) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """A folder of its own, and shards of random tokens in it, as data of a MixLoader."""
    with TemporaryDirectory() as name:
        data = {}
        for d in range(DOMAINS):
            path = Path(name) / f"{d}.bin"
            tokens = np.random.default_rng(d).integers(0, sizes.ids, sizes.shard_tokens)
            tokens.astype(np.uint16).tofile(path)
            data[f"domain-{d:02d}"] = {"path": path, "field": ("source", "target")[d % 2], "dtype": "uint16"}
        yield Path(name), data


def open_loader(data: dict[str, Any], sizes: Sizes, device: str, **options: Any) -> MixLoader:
    return MixLoader(data, sizes.rows, sizes.seq_len, pin_memory=device == "cuda", **options)


def open_mixer(loader: MixLoader, folder: Path, device: str) -> Mixer:
    """The agent, deciding at every step, with a record."""
    return Mixer(loader, "agent", token_budget=10**9, device=device, record=folder / "record.jsonl")


class Training:
    """A model and its optimizer."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model: LanguageModel = build_model(sizes.model).to(device)
        self.optimizer = build_optimizer(self.model, TrainConfig("none", "none", learning_rate=1e-4))

    def autocast(self, **options: Any) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16, **options) if self.device == "cuda" else nullcontext()

    def backward(self, batch: dict[str, Any], stats: DomainStats | None) -> Tensor:
        """One micro-batch; returns its loss, on the device."""
        with self.autocast():
            logits = self.model(batch["input_ids"])
        ids = None if stats is None else batch["domain_ids"]
        loss = domain_cross_entropy(logits, batch["targets"], ids, stats=stats)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Side:
    """One way to train: a loader, copied ahead to the device, and a mixer or None."""

    def __init__(self, training: Training, loader: MixLoader, mixer: Mixer | None) -> None:
        self.training, self.mixer = training, mixer
        self.batches = DevicePrefetcher(loader, training.device)
        self.waits: list[float] = []
        """Seconds of the host in each next()."""

    def step(self) -> None:
        begin = time.perf_counter()
        batch = next(self.batches)
        self.waits.append(time.perf_counter() - begin)
        self.training.backward(batch, None if self.mixer is None else self.mixer.stats)
        self.training.update()
        if self.mixer is not None:
            self.mixer.step()


def mark(device: str) -> Any:
    """A moment in the device's work; see `seconds_between`."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Waits for the later one."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
