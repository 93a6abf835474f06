"""The text of a fold, packed once: shards small enough that a domain of any size is a choice among them.

A topic's documents are trained on, or held out for feedback, or for the score. What is held out lies in shards of a few
windows, so that evaluations of any size are a choice among them, too, and an episode writes no text of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixloader.agent.split import Split
from mixloader.agent.topics import cut_into_topics
from mixloader.documents import Documents, train_tokenizer
from mixloader.domains import Domain
from mixloader.errors import ConfigError, ManifestError
from mixloader.formats import Shard
from mixloader.manifest import Manifest
from mixloader.pack import END_OF_TEXT, pack, write_shard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN_SHARD = 8192
"""Tokens of a training shard, at least: the smallest domain."""

WINDOWS = 4
"""Windows of a shard of held-out text."""

_HELD_OUT_SHARDS = 8  # of a topic, for feedback and for the score each
_DOCUMENT = 12_000  # characters; longer ones are cut
_EXCERPT = 1_500  # characters that a held-out document gives in one turn


@dataclass(frozen=True)
class FoldData:
    """Topics as domains, by name. training: with their feedback text; scored: the same with their score text."""

    training: Manifest
    scored: Manifest
    seq_len: int

    @property
    def tokenizer(self) -> dict[str, str] | None:
        return self.training.tokenizer

    def domain(
        self, name: str, topics: Sequence[str], field: str | None, share: float, *, feedback: int, score: int
    ) -> tuple[Domain, Domain]:
        """A domain made of topics, as it is trained with and as it is scored.

        share: of each topic's training shards, at least one. feedback, score: windows of held-out text, rounded up to
        whole shards; 0 for none.
        """
        parts = [self.training.domain(topic) for topic in topics]
        shards = _in_turn([part.shards[: max(1, round(share * len(part.shards)))] for part in parts])
        told = _in_turn([part.validation for part in parts])[: math.ceil(feedback / WINDOWS)]
        kept = _in_turn([self.scored.domain(topic).validation for topic in topics])[: math.ceil(score / WINDOWS)]
        domain = Domain(name, shards, told, field, bytes_per_token=parts[0].bytes_per_token)
        return domain, replace(domain, validation=kept)


def open_fold(split: Split, fold: str, vocab: int, corpora: Path, out: Path) -> FoldData:
    """The data of a fold with a vocabulary of so many ids, packed into `out` unless they are there.

    Raises ConfigError for a corpus that `corpora` does not hold.
    """
    folder = out / f"{fold}-{vocab}"
    if not (folder / "scored.json").exists():
        _pack_fold(split, fold, vocab, corpora, folder)
    return FoldData(Manifest.open(folder / "manifest.json"), Manifest.open(folder / "scored.json"), split.seq_len)


def _pack_fold(split: Split, fold: str, vocab: int, corpora: Path, folder: Path) -> None:
    topics: dict[str, list[str]] = {}
    for corpus in split.folds[fold].corpora:
        names = split.topics_of(corpus)
        topics |= zip(
            names, cut_into_topics(_read(corpora, corpus, split.text_bytes), len(names), split.seed), strict=True
        )
    every = max(2, round(1 / split.held_out))
    train = {name: [d for i, d in enumerate(texts) if i % every] for name, texts in topics.items()}
    tokenizer = train_tokenizer((text for texts in train.values() for text in texts[::3]), vocab)
    packed = pack(train, folder, tokenizer, validation_fraction=0, shard_tokens=TRAIN_SHARD)
    told, scored = [], []
    for domain in packed.domains:
        aside = topics[domain.name][::every]
        told.append(
            replace(domain, validation=_held_out(aside[::2], tokenizer, folder / domain.name, "feedback", split))
        )
        scored.append(
            replace(domain, validation=_held_out(aside[1::2], tokenizer, folder / domain.name, "score", split))
        )
    replace(packed, domains=tuple(told)).save(folder / "manifest.json")
    replace(packed, domains=tuple(scored)).save(folder / "scored.json")  # last: it says that all is there


def _read(corpora: Path, name: str, most: int) -> list[str]:
    """Documents of a corpus up to `most` bytes, those that are long in parts."""
    for suffix in (".jsonl.gz", ".jsonl"):
        if (corpora / f"{name}{suffix}").exists():
            return list(_up_to(Documents(corpora / f"{name}{suffix}"), most))
    raise ConfigError(f"{corpora} holds no {name}.jsonl or {name}.jsonl.gz, which the split names; add it, or take "
                      "another split")  # fmt: skip


def _up_to(documents: Documents, most: int) -> Iterator[str]:
    size = 0
    for document in documents:
        for start in range(0, len(document), _DOCUMENT):
            part = document[start : start + _DOCUMENT]
            size += len(part.encode())
            yield part
        if size >= most:
            return


def _held_out(
    documents: Sequence[str], tokenizer: Tokenizer, folder: Path, kind: str, split: Split
) -> tuple[Shard, ...]:
    """Shards of WINDOWS windows each, of excerpts of all the documents in turn."""
    excerpts = _in_turn([[d[i : i + _EXCERPT] for i in range(0, len(d), _EXCERPT)] for d in documents])
    size = WINDOWS * split.seq_len + 1
    tokens = np.zeros(0, dtype=np.int64)
    for excerpt in excerpts:
        ids = tokenizer.encode(excerpt, add_special_tokens=False).ids
        tokens = np.append(tokens, np.array([*ids, tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int64))
        if len(tokens) >= _HELD_OUT_SHARDS * size:
            break
    if len(tokens) < size:
        raise ManifestError(
            f"topic {folder.name!r} has {len(tokens)} tokens for its {kind}; expected {size}: give its corpus more "
            "text, or cut it into fewer topics"
        )
    parts = range(min(_HELD_OUT_SHARDS, len(tokens) // size))
    vocab = tokenizer.get_vocab_size()
    return tuple(
        write_shard(folder / f"{kind}_{k:03d}.bin", tokens[k * size : (k + 1) * size], vocab_size=vocab) for k in parts
    )


def _in_turn(lists: Sequence[Sequence]) -> tuple:
    """The first of each list, then the second of each, and so on."""
    blank = object()
    return tuple(item for item in chain.from_iterable(zip_longest(*lists, fillvalue=blank)) if item is not blank)
