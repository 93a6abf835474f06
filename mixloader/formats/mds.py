"""MosaicML's MDS, version 2: samples of columns, of which one holds tokens (mosaicml/streaming, base/format/mds).

A shard: u32 samples N, u32 offsets [N + 1] in bytes from the file's beginning, a configuration in JSON,
then the samples. A sample: the u32 size of each column that has no fixed one, then the columns. An ndarray
without a fixed dtype begins with a byte that says it; without a fixed shape, with a byte (dimensions << 2 |
log2 of the bytes of a size) and the sizes. index.json beside the shards lists them. Nothing is unpickled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Choice, Extents, Format, Shard, shard_of
from mixloader.formats.listing import NAME, Listing, lists
from mixloader.formats.source import Source, is_url

_DTYPES = {8: "uint8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
_COMPRESSIONS = {"zstd": "zstd", "gz": "gzip"}
_DIGESTS = ("sha256", "sha512", "sha1", "md5", "xxh128", "xxh3_128", "xxh64", "xxh3_64")  # in order of preference
_BLOCK = 1 << 22  # bytes read at a time when something in each sample is looked at


@dataclass(frozen=True)
class _Column:
    """Where the tokens are in a sample. fixed: bytes of each column or None; which: the column with the tokens.

    dtype: None where each sample says it. shaped: whether its shape is fixed.
    """

    fixed: list[int | None]
    which: int
    dtype: str | None
    shaped: bool


def _matches(source: Source) -> bool:
    return lists(source, "shards") or source.name.endswith(".mds")


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    index = source if source.name == NAME else source.find(NAME)
    if index is None:
        raise ShardError(f"{source.path} has no {NAME} beside it, which says what an MDS shard holds")
    shards = []
    for entry in Listing.read(index).each("shards"):
        raw = entry.inner("raw_data")
        assert raw is not None
        if source is index or raw.take("basename", str) == source.name:
            shards.append(_shard(index, entry, raw, choice))
    if not shards:
        raise ShardError(f"{index.path} lists no shard {'at all' if source is index else source.name}")
    return tuple(shards)


def _shard(index: Source, entry: Listing, raw: Listing, choice: Choice) -> Shard:
    for key, expected in (("format", "mds"), ("version", 2)):
        if entry.take(key, (str, int)) != expected:
            raise ShardError(f"{entry.where} of {index.path} has {key} {entry.value[key]!r}; expected {expected!r}")
    column = _column(entry, choice)
    source, stored = _source(index, entry, raw)
    offsets = _offsets(source, entry.take("samples", int))
    begins, sizes = _payloads(source, offsets, column)
    dtype, skipped = _headers(source, begins, sizes, column)
    if dtype is None:
        dtype = choice.dtype or "int64"
    elif choice.dtype not in (None, dtype):
        raise ShardError(f"shard {source.path} holds {dtype} tokens by its index, but {choice.dtype} was asked for")
    begins, sizes = begins + skipped, sizes - skipped
    if (sizes < 0).any() or (sizes % WIDTHS[dtype]).any():
        raise ShardError(
            f"shard {source.path} has samples whose bytes are no whole number of {dtype} tokens; "
            "their dtype is another (give dtype=), or it is damaged"
        )
    counts = sizes // WIDTHS[dtype]
    if not counts.any():
        raise ShardError(f"shard {source.path} holds no tokens; write it again or take it out of its domain")
    shard = _with_extents(source, dtype, begins, counts, _digest(stored), choice.documents == "samples")
    if column.dtype is None and choice.dtype is None and column.shaped:
        _refuse_another_dtype(source, begins[counts > 0], counts[counts > 0])
    return shard


def _column(entry: Listing, choice: Choice) -> _Column:
    names, encodings, fixed = (entry.take(f"column_{key}", list) for key in ("names", "encodings", "sizes"))
    if not len(names) == len(encodings) == len(fixed) or not all(
        isinstance(name, str) and isinstance(encoding, str) and (size is None or (type(size) is int and size >= 0))
        for name, encoding, size in zip(names, encodings, fixed, strict=False)
    ):
        raise ShardError(f"{entry.where} of {entry.path} does not say of each column its name, encoding and size")
    like_tokens = [i for i, encoding in enumerate(encodings) if _encoding(encoding) is not None]
    if choice.column is not None:
        if choice.column not in names:
            raise ShardError(f"{entry.path} has no column {choice.column!r}; its columns are {', '.join(names)}")
        which = names.index(choice.column)
        if which not in like_tokens:
            raise ShardError(
                f"column {choice.column!r} of {entry.path} is of encoding {encodings[which]!r}; expected bytes or "
                "an ndarray of integers" + (" (what is pickled is never read)" if encodings[which] == "pkl" else "")
            )
    elif len(like_tokens) == 1:
        which = like_tokens[0]
    else:
        candidates = ", ".join(names[i] for i in like_tokens) if like_tokens else "none"
        raise ShardError(
            f"{entry.path} has columns {', '.join(map(':'.join, zip(names, encodings, strict=True)))}; of those that "
            f"may hold tokens ({candidates}) exactly one is expected: name it with column="
        )
    dtype, shaped = _encoding(encodings[which])  # type: ignore[misc]
    return _Column(fixed, which, dtype, shaped)


def _encoding(text: str) -> tuple[str | None, bool] | None:
    """(dtype if fixed, whether no shape stands before the values) of an encoding that may hold tokens."""
    kind, _, rest = text.partition(":")
    dtype, _, shape = rest.partition(":")
    if kind == "bytes":
        return None, True
    if kind != "ndarray" or (dtype and dtype not in WIDTHS):
        return None
    return dtype or None, bool(shape)


def _source(index: Source, entry: Listing, raw: Listing) -> tuple[Source, Listing]:
    """The file of a shard as it lies there, and what index.json says of that file."""
    zipped = entry.inner("zip_data", optional=True)
    raw_path = index.beside(raw.take("basename", str))
    if zipped is None or (not is_url(raw_path) and os.path.exists(raw_path)):
        source, stored = Source(raw_path, None), raw
    else:
        compression = entry.take("compression", str).partition(":")[0]
        if compression not in _COMPRESSIONS:
            raise ShardError(f"{entry.path} has compression {compression}; expected {' or '.join(_COMPRESSIONS)}")
        path = index.beside(zipped.take("basename", str))
        source, stored = Source(path, _COMPRESSIONS[compression], raw.take("bytes", int)), zipped
    expected = stored.take("bytes", int)
    if source.stored_bytes != expected:
        raise ShardError(
            f"shard {source.path} has {source.stored_bytes} bytes, but {index.path} says {expected}; "
            "it was truncated or replaced: restore it"
        )
    return source, stored


def _digest(stored: Listing) -> str | None:
    hashes = stored.take("hashes", dict, optional=True) or {}
    return next((f"{name}:{hashes[name]}" for name in _DIGESTS if isinstance(hashes.get(name), str)), None)


def _offsets(source: Source, samples: int) -> np.ndarray:
    """int64 [N + 1]: where samples begin and the last ends."""
    header = 4 * (samples + 2)
    if samples == 0 or header > source.size:
        raise ShardError(f"shard {source.path} of {source.size} bytes cannot hold the {samples} samples of its index")
    numbers = np.frombuffer(source.read(0, header), dtype="<u4").astype(np.int64)
    if len(numbers) != samples + 2 or numbers[0] != samples:
        raise ShardError(f"shard {source.path} does not begin with its number of samples, {samples}; it is damaged")
    offsets = numbers[1:]
    if offsets[0] < header or offsets[-1] != source.size or (offsets[1:] < offsets[:-1]).any():
        raise ShardError(
            f"shard {source.path} has sample offsets that decrease, or do not end with its {source.size} bytes; "
            "it was truncated or is damaged"
        )
    return offsets


def _payloads(source: Source, offsets: np.ndarray, column: _Column) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], int64 [N]: where the column begins in the file, and its bytes, of each sample."""
    varied = [i for i, size in enumerate(column.fixed) if size is None]
    begins, ends = offsets[:-1], offsets[1:]
    if ((ends - begins) < 4 * len(varied)).any():
        raise ShardError(f"shard {source.path} has samples shorter than their own header; it is damaged")
    known = sum(size for size in column.fixed if size is not None)

    def size_of(i: int) -> np.ndarray | int:
        size = column.fixed[i]
        if size is not None:
            return size
        if len(varied) == 1:  # what is left of a sample
            return ends - begins - 4 - known
        return _gather(source, begins + 4 * varied.index(i), 4)

    starts = begins + 4 * len(varied)
    for i in range(column.which):
        starts = starts + size_of(i)
    sizes = np.broadcast_to(size_of(column.which), starts.shape)
    if (sizes < 0).any() or (starts + sizes > ends).any():
        raise ShardError(f"shard {source.path} has columns that reach beyond their sample; it is damaged")
    return starts, sizes


def _headers(
    source: Source, begins: np.ndarray, sizes: np.ndarray, column: _Column
) -> tuple[str | None, np.ndarray | int]:
    """The dtype, as far as the column says it, and the bytes before the values of each sample."""
    skipped: np.ndarray | int = 0
    dtype = column.dtype
    if column.shaped:
        return dtype, skipped
    if (sizes < 2 + (dtype is None)).any():
        raise ShardError(f"shard {source.path} has arrays shorter than their own header; it is damaged")
    if dtype is None:
        codes = np.unique(_gather(source, begins, 1))
        if len(codes) > 1 or int(codes[0]) not in _DTYPES:
            raise ShardError(
                f"shard {source.path} holds arrays of types {codes.tolist()} as MDS numbers them; expected one of "
                f"{', '.join(_DTYPES.values())} throughout"
            )
        dtype, skipped = _DTYPES[int(codes[0])], 1
    shapes = _gather(source, begins + skipped, 1)
    if ((shapes >> 2) != 1).any():
        raise ShardError(f"shard {source.path} holds arrays of other than one dimension; expected rows of tokens")
    return dtype, skipped + 1 + (1 << (shapes & 3))


def _with_extents(
    source: Source, dtype: str, begins: np.ndarray, counts: np.ndarray, digest: str | None, are_documents: bool
) -> Shard:
    tokens, width = int(counts.sum()), WIDTHS[dtype]
    alike = len(counts) > 1 and bool((counts == counts[0]).all())
    if not are_documents and (begins[1:] == begins[:-1] + counts[:-1] * width).all():
        extents = None
    elif alike and (np.diff(begins) == begins[1] - begins[0]).all():
        extents = Extents(tokens=int(counts[0]), stride=int(begins[1] - begins[0]))
    else:
        begins, counts = begins[counts > 0], counts[counts > 0]
        extents = Extents(ends=np.cumsum(counts).astype(np.uint64), bytes=begins.astype(np.uint64))
    shard = shard_of(source, "mds", dtype, int(begins[0]), tokens, digest=digest, extents=extents)
    # Unless a user says otherwise, chunks of one size are cut from running text: they are no documents.
    if not are_documents and (alike or extents is None):
        return shard
    return replace(shard, document_count=len(counts), extents_are_documents=True)


def _refuse_another_dtype(source: Source, begins: np.ndarray, counts: np.ndarray) -> None:
    """Bytes do not say what they are; read as int64, narrower tokens give absurd ids, unless they are zeros."""
    picked = np.unique(np.linspace(0, len(begins) - 1, 16).astype(np.int64))
    read = (source.read(int(begins[i]), 8 * min(int(counts[i]), 4096)) for i in picked)
    tokens = np.frombuffer(b"".join(read), dtype="<i8")
    absurd = tokens[(tokens < 0) | (tokens >= 1 << 31)]
    if len(absurd) or not tokens.any():
        found = f"one of its tokens would be {absurd[0]}" if len(absurd) else "the tokens looked at would all be 0"
        raise ShardError(f"shard {source.path} holds bytes, which are int64 by default, but {found}; give their dtype=")


def _gather(source: Source, positions: np.ndarray, width: int) -> np.ndarray:
    """int64 [N]: the little-endian numbers of `width` bytes at ascending positions."""
    numbers = np.empty(len(positions), dtype=np.int64)
    i = 0
    while i < len(positions):
        first = int(positions[i])
        stop = int(np.searchsorted(positions, first + _BLOCK - width, side="right"))
        last = int(positions[stop - 1]) + width
        block = np.frombuffer(source.read(first, last - first), dtype=np.uint8)
        if len(block) < last - first:
            raise ShardError(f"shard {source.path} ends at byte {first + len(block)}; it was truncated")
        at = positions[i:stop] - first
        numbers[i:stop] = sum(block[at + byte].astype(np.int64) << (8 * byte) for byte in range(width))
        i = stop
    return numbers


MDS = Format("mds", _matches, _open)
