"""Shards of documents to pack, and the sidecars of packed rows, read as csrc/packing.h describes them."""

from itertools import pairwise

import numpy as np
from corpora import write_raw
from hypothesis import strategies as st

from mixloader import _core
from mixloader.formats import Documents, Shard, open_shard

AFTER, AT, INDEX = _core.Boundaries.AFTER_EOT, _core.Boundaries.AT_EOT, _core.Boundaries.INDEX
EOT = 7
HEADER = 10  # words of a sidecar

corpora = st.integers(1, 12).flatmap(
    lambda seq_len: st.tuples(st.just(seq_len), st.lists(st.integers(1, 3 * seq_len + 2), min_size=1, max_size=60))
)


def write_documents(path, lengths, boundaries=AFTER, dtype="<u2"):
    """A shard of documents of these lengths whose other tokens count up from 100; gives the shard."""
    tokens = (100 + np.arange(sum(lengths)) % 60_000).astype(dtype)
    ends = np.cumsum(lengths)
    if boundaries == AFTER:
        tokens[ends - 1] = EOT
    elif boundaries == AT:
        tokens[ends - lengths] = EOT
    shard = open_shard(write_raw(path, tokens), dtype=np.dtype(dtype).name)
    if boundaries != INDEX:
        return shard
    table = path.with_suffix(".starts")
    np.concatenate([[99], 5 + 3 * (ends - lengths)]).astype("<u8").tofile(table)
    documents = Documents(path=str(table), offset=8, count=len(lengths), bias=5, unit=3)
    return Shard(**(vars(shard) | {"documents": documents}))


def rows_of(sidecar):
    """The pieces of each row, read as the header of csrc/packing.h describes the file."""
    words = np.fromfile(sidecar, dtype="<u8")
    assert words[0].tobytes() == b"mixpacks"
    rows, pieces = (int(word) for word in words[4:6])
    assert len(words) == HEADER + 2 * pieces + 2 * (rows + 1)
    listed = [tuple(piece) for piece in words[HEADER : HEADER + 2 * pieces].reshape(-1, 2).tolist()]
    ends = words[HEADER + 2 * pieces :: 2].tolist()
    return [listed[begin:end] for begin, end in pairwise(ends)]
