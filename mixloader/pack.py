"""From documents to shards: tokenize, hold some documents out, write shards and a manifest.

Shards are llm.c files, which say their own dtype and length. Every document is followed by the
end-of-text token. The manifest is written last, so a packing that is killed leaves no manifest, or
the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixloader.errors import ManifestError, TokenError
from mixloader.files import replace
from mixloader.formats import LLMC_HEADER, LLMC_MAGIC, Shard, open_shard
from mixloader.manifest import Domain, Manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_BATCH = 256  # documents tokenized at a time


def write_shard(path: str | Path, tokens: np.ndarray, *, vocab_size: int) -> Shard:
    """Write integer tokens [N] as an llm.c shard, atomically: uint16 up to 65,536 ids, else uint32.

    Raises TokenError, and writes nothing, for an id that is negative or not below vocab_size.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise TokenError(f"shard {path} needs a row of integer tokens; got {tokens.dtype} of shape {tokens.shape}")
    if len(tokens) >= 1 << 31:
        raise TokenError(
            f"shard {path} would hold {len(tokens)} tokens; an llm.c header counts below 2^31, write several"
        )
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(bad):
        raise TokenError(
            f"token {bad[0]} of shard {path} has id {tokens[bad[0]]}, but the vocabulary has {vocab_size} ids; "
            "check the tokenizer"
        )
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    magic, version = next((m, v) for m, (v, d) in LLMC_MAGIC.items() if d == dtype)
    header = np.zeros(LLMC_HEADER // 4, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    content = header.tobytes() + tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    replace(path, content)
    shard = open_shard(path)
    return dataclasses.replace(shard, digest=f"sha256:{hashlib.sha256(content).hexdigest()}")


def pack(
    documents: Mapping[str, Iterable[str]],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    fields: Mapping[str, str | None] | None = None,
    groups: Mapping[str, str | None] | None = None,
    validation_fraction: float = 0.05,
    shard_tokens: int = 1 << 26,
) -> Manifest:
    """Pack texts into `out`: one folder of shards a domain, tokenizer.json and manifest.json.

    documents: texts by domain. tokenizer: a tokenizers.Tokenizer that has the token "<|endoftext|>".
    fields, groups: by domain. validation_fraction: of each domain's documents, evenly spread, held out.
    shard_tokens: a shard is ended with the document that reaches it.
    Raises ManifestError for a domain without text.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    eot = tokenizer.token_to_id(END_OF_TEXT)
    if eot is None:
        raise ManifestError(f"the tokenizer has no token {END_OF_TEXT!r}; add it as a special token")
    tokenizer.save(str(out / "tokenizer.json"))
    fingerprint = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    vocab_size = tokenizer.get_vocab_size()
    every = max(2, round(1 / validation_fraction)) if validation_fraction > 0 else 0
    domains = []
    for name, texts in documents.items():
        writers = {kind: _ShardWriter(out / name, kind, vocab_size, shard_tokens) for kind in ("train", "val")}
        text_bytes = 0
        for i, (text, ids) in enumerate(_tokenize(tokenizer, texts)):
            kind = "val" if every and i % every == every - 1 else "train"
            writers[kind].add(np.array([*ids, eot], dtype=np.uint32))
            text_bytes += len(text.encode("utf-8", "surrogatepass"))
        train, validation = (writers[kind].finish() for kind in ("train", "val"))
        tokens = sum(shard.tokens for shard in (*train, *validation))
        if not train:
            raise ManifestError(f"domain {name!r} has no documents to train on")
        domains.append(
            Domain(
                name=name,
                shards=train,
                validation=validation,
                field=(fields or {}).get(name),
                group=(groups or {}).get(name),
                bytes_per_token=round(text_bytes / tokens, 4),
            )
        )
    manifest = Manifest(tuple(domains), vocab_size, eot, {"fingerprint": fingerprint, "path": "tokenizer.json"})
    manifest.save(out / "manifest.json")
    return manifest


def _tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        yield from zip(batch, (e.ids for e in tokenizer.encode_batch(batch, add_special_tokens=False)), strict=True)


class _ShardWriter:
    """Collects the documents of one domain and split, and writes a shard whenever one is full."""

    def __init__(self, folder: Path, kind: str, vocab_size: int, shard_tokens: int):
        self.folder, self.kind, self.vocab_size, self.shard_tokens = folder, kind, vocab_size, shard_tokens
        self.documents: list[np.ndarray] = []
        self.tokens = 0
        self.shards: list[Shard] = []

    def add(self, document: np.ndarray) -> None:
        self.documents.append(document)
        self.tokens += len(document)
        if self.tokens >= self.shard_tokens:
            self._write()

    def finish(self) -> tuple[Shard, ...]:
        if self.documents:
            self._write()
        return tuple(self.shards)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.kind}_{len(self.shards):03d}.bin"
        self.shards.append(write_shard(path, np.concatenate(self.documents), vocab_size=self.vocab_size))
        self.documents, self.tokens = [], 0
