"""Topics: a corpus cut into clusters of its documents by the words in them, of unlike content and similar size."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[A-Za-z]{2,}|[^\sA-Za-z]")
_BUCKETS = 2048
_LOOK = 4000  # characters of a document
_ROUNDS = 20
_ROOM = 1.25  # of a topic, over its even share of the text


def cut_into_topics(documents: Sequence[str], topics: int, seed: int) -> list[list[str]]:
    """Documents by topic, each in the order of `documents`; no topic is larger than 1.25 times its even share, or less
    one document. Deterministic.

    Spherical k-means over hashed bags of words with tf-idf weights; then documents go to the nearest topic that has
    room, those first that are surest of theirs.
    """
    if topics == 1 or len(documents) < 2 * topics:
        return [list(documents[k::topics]) for k in range(topics)]
    vectors = _vectors(documents)
    closeness = vectors @ _centres(vectors, topics, np.random.default_rng(seed)).T
    sizes = np.array([len(text) for text in documents])
    room = np.full(topics, _ROOM * sizes.sum() / topics)
    best = np.sort(closeness, axis=1)
    owner = np.zeros(len(documents), dtype=np.int64)
    for d in np.argsort(best[:, -2] - best[:, -1], kind="stable"):
        ranking = np.argsort(-closeness[d], kind="stable")
        owner[d] = next((k for k in ranking if room[k] >= sizes[d]), int(room.argmax()))
        room[owner[d]] -= sizes[d]
    return [[text for text, k in zip(documents, owner, strict=True) if k == topic] for topic in range(topics)]


def _vectors(documents: Sequence[str]) -> np.ndarray:
    """float32 [N, buckets], of length 1."""
    counts = np.zeros((len(documents), _BUCKETS), dtype=np.float32)
    for row, text in zip(counts, documents, strict=True):
        for word, count in Counter(_WORD.findall(text[:_LOOK].lower())).items():
            row[zlib.crc32(word.encode()) % _BUCKETS] += count
    weighted = np.log1p(counts) * np.log(len(documents) / (1 + (counts > 0).sum(axis=0))).clip(0)
    lengths = np.linalg.norm(weighted, axis=1, keepdims=True)
    return np.asarray(weighted / np.maximum(lengths, 1e-9), dtype=np.float32)


def _centres(vectors: np.ndarray, topics: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [topics, buckets]: k-means++ beginnings, then Lloyd's rounds."""
    chosen = [int(rng.integers(len(vectors)))]
    while len(chosen) < topics:
        far = (1 - (vectors @ vectors[chosen].T).max(axis=1)).clip(0) ** 2
        chosen.append(int(rng.choice(len(vectors), p=far / far.sum())) if far.sum() > 0 else len(chosen))
    centres = vectors[chosen]
    for _ in range(_ROUNDS):
        owner = (vectors @ centres.T).argmax(axis=1)
        sums = np.stack([vectors[owner == k].sum(axis=0) for k in range(topics)])
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-9), centres)
    return centres
