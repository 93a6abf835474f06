"""What bench.influence trains on: packed domains, some of which are probed and evaluated, and a base model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixloader import MixLoader
from mixloader.config import ModelConfig
from mixloader.demo import base
from mixloader.demo.corpus import build_corpus
from mixloader.documents import train_tokenizer
from mixloader.loss import domain_cross_entropy
from mixloader.manifest import Manifest
from mixloader.pack import pack
from mixloader.train.checkpoint import load_parameters
from mixloader.train.model import LanguageModel, build_model

GENERAL = ("dictionary", "perl_docs", "essays", "legal", "literature")
SPECIAL = ("coq", "metamath", "word_problems", "c")


@dataclass(frozen=True)
class Task:
    """Domains to mix, and what is asked of the model.

    train: all domains, those of `fields` with a field and with held-out rows for probes. test: the domains of `fields`,
    whose validation shards are other documents than the probes'. careful, known: mixtures, by name.
    """

    train: Manifest
    test: Manifest
    model: ModelConfig
    base: Path
    steps: int
    batch_size: int
    seq_len: int
    careful: dict[str, float]
    known: dict[str, float]

    def fresh_model(self) -> LanguageModel:
        torch.manual_seed(0)
        model = build_model(self.model)
        load_parameters(self.base, model)
        return model


def demo_task(out: Path) -> Task:
    """The demo's eight domains and its base model, which has read five; two of those and one other are probed."""
    fields = {"python_docs": "source", "legal": "source", "math_docs": "target"}
    if not (out / "train" / "manifest.json").exists():
        corpus = build_corpus()
        _pack(out, corpus.train, corpus.held_out, fields, base.load_tokenizer())
    train, test = _open(out)
    special = {"math_docs", "arithmetic", "word_problems"}
    return Task(
        train, test, replace(base.base_model(), dropout=0.0), base.PARAMETERS, 128, 8, base.SEQ_LEN,
        _halves([n for n in train.names if n not in special], sorted(special)),
        _halves(["python_docs", "legal"], ["math_docs"]),
    )  # fmt: skip


def corpora_task(out: Path, corpora: Path, fields: dict[str, str]) -> Task:
    """Nine domains of a folder of NAME.jsonl.gz, and a base model that has read the five general ones."""
    names = (*GENERAL, *SPECIAL)
    if not (out / "train" / "manifest.json").exists():
        texts = {name: list(_texts(corpora / f"{name}.jsonl.gz", 3_000_000)) for name in names}
        tokenizer = train_tokenizer((text for some in texts.values() for text in some[::4]), 1024)
        held_out = {name: some[::10] for name, some in texts.items()}
        train = {name: [t for i, t in enumerate(some) if i % 10] for name, some in texts.items()}
        _pack(out, train, held_out, fields, tokenizer)
    train_manifest, test = _open(out)
    model = ModelConfig(vocab_size=1024, seq_len=128, n_layer=3, n_head=3, n_embd=96)
    path = out / "base.safetensors"
    if not path.exists():
        _pretrain(path, replace(train_manifest, domains=tuple(map(train_manifest.domain, GENERAL))), model)
    sources = [name for name, field in fields.items() if field == "source"]
    targets = [name for name, field in fields.items() if field == "target"]
    return Task(
        train_manifest, test, model, path, 240, 32, 128, _halves(GENERAL, SPECIAL), _halves(sources, targets)
    )  # fmt: skip


def _halves(first, second) -> dict[str, float]:
    """Half to each of two groups, evenly inside."""
    return {name: 0.5 / len(group) for group in (first, second) for name in group}


def _texts(path: Path, most: int) -> Iterator[str]:
    """Texts up to so many bytes, cut into documents of at most 20,000 characters."""
    size = 0
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            for start in range(0, len(text), 20_000):
                yield text[start : start + 20_000]
                size += min(20_000, len(text) - start)
                if size >= most:
                    return


def _pack(out: Path, train, held_out, fields: dict[str, str], tokenizer) -> None:
    probes = {name: held_out[name][::2] for name in fields}
    tests = {name: held_out[name][1::2] for name in fields}
    packed = pack(train, out / "train", tokenizer, fields=fields, validation_fraction=0)
    aside = pack(probes, out / "train" / "probes", tokenizer, validation_fraction=0)
    domains = tuple(
        replace(d, validation=aside.domain(d.name).shards if d.name in fields else ()) for d in packed.domains
    )
    test = pack(tests, out / "test", tokenizer, fields=fields, validation_fraction=0)
    replace(test, domains=tuple(replace(d, validation=d.shards) for d in test.domains)).save(
        out / "test" / "manifest.json"
    )
    replace(packed, domains=domains).save(out / "train" / "manifest.json")


def _open(out: Path) -> tuple[Manifest, Manifest]:
    return Manifest.open(out / "train"), Manifest.open(out / "test")


def _pretrain(path: Path, manifest: Manifest, config: ModelConfig, steps: int = 300) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = build_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    with MixLoader(manifest, 32, config.seq_len, seed=1, max_steps=steps, num_workers=0) as loader:
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (batch["step"] + 1) / 30, (steps - batch["step"]) / (0.6 * steps))
            domain_cross_entropy(model(batch["input_ids"]), batch["targets"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    save_file({name: p.detach() for name, p in model.named_parameters()}, path)
