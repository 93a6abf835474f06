"""From a path to shards: the formats that are known, and which of them a file is of."""

from __future__ import annotations

import os
from pathlib import Path

from mixloader import remote
from mixloader.errors import ManifestError, ShardError
from mixloader.formats.base import WIDTHS, Choice, Format, Shard
from mixloader.formats.datatrove import DATATROVE
from mixloader.formats.listing import NAME as INDEX
from mixloader.formats.litdata import LITDATA
from mixloader.formats.llmc import LLMC, refuse_damaged_header
from mixloader.formats.mds import MDS
from mixloader.formats.megatron import MEGATRON
from mixloader.formats.nanogpt import NANOGPT
from mixloader.formats.npy import NPY
from mixloader.formats.source import COMPRESSIONS, Source, is_url
from mixloader.formats.tables import TABLES

FORMATS = {format.name: format for format in (MDS, LITDATA, MEGATRON, DATATROVE, NPY, LLMC, NANOGPT)}
"""Tried in this order: a .bin that nothing else claims is nanoGPT's."""

SUFFIXES = (".bin", ".ds", ".npy")
"""Of files that hold tokens and stand for themselves."""


def open_shards(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: str | None = None,
    column: str | None = None,
    documents: str | None = None,
) -> tuple[Shard, ...]:
    """Describe the shards at `path`, a file, a folder or a URL of either (of a folder: ending in /).

    What they say of themselves is checked.
    A folder with an index.json holds what that lists, any other its .bin, .ds and .npy files by name, .zst and
    .gz included. format: a name in FORMATS; by default it is told by name and content.
    dtype: a key of WIDTHS, for files that do not say it; default uint16 (MDS bytes: int64).
    column: of MDS samples with several that may hold tokens. documents: "samples": each MDS sample is one, also
    where all have one size.
    Raises ShardError for a file that is missing, empty, truncated or not of its format.
    """
    if format is not None and format not in FORMATS:
        raise ManifestError(f"unknown shard format {format!r}; known formats are {', '.join(FORMATS)}")
    if dtype is not None and dtype not in WIDTHS:
        raise ManifestError(f"unknown token dtype {dtype!r}; known dtypes are {', '.join(WIDTHS)}")
    if documents not in (None, "samples"):
        raise ManifestError(f"the documents of shards are {documents!r}; expected 'samples' or none")
    choice = Choice(dtype, column, documents)
    if not is_url(path) and os.path.isdir(path):
        if os.path.exists(os.path.join(path, INDEX)):
            return _open(Source(os.path.join(path, INDEX)), format, choice)
        files = token_files(path)
        if not files and (lost := _mds_files(path)):
            raise ShardError(f"folder {path} holds {lost[0].name}, but no {INDEX} that lists it; put that beside it")
        return tuple(shard for file in files for shard in _open(Source(file), format, choice))
    if is_url(path) and str(path).endswith("/"):
        if remote.exists(f"{path}{INDEX}"):
            return _open(Source(f"{path}{INDEX}"), format, choice)
        urls = [url for url in remote.list_files(str(path)) if _bare(url).endswith(SUFFIXES)]
        return tuple(shard for url in urls for shard in _open(Source(url), format, choice))
    if not is_url(path) and not os.path.exists(path) and os.path.exists(f"{path}.idx"):
        return _open(Source(f"{path}.idx"), format, choice)  # as Megatron names a data set
    return _open(Source(os.fspath(path)), format, choice)


def open_shard(path: str | Path, *, format: str | None = None, dtype: str | None = None) -> Shard:
    """The one shard of a file; see open_shards."""
    if not is_url(path) and os.path.isdir(path):
        raise ShardError(f"shard {path} is not a regular file")
    shards = open_shards(path, format=format, dtype=dtype)
    if len(shards) != 1:
        raise ShardError(f"{path} stands for {len(shards)} shards; expected one")
    return shards[0]


def token_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files in a folder that hold tokens and stand for themselves, by name."""
    return [path for path in _files(folder) if holds_tokens(path.name)]


def holds_tokens(name: str) -> bool:
    """Whether a file of this name holds tokens and stands for itself."""
    return _bare(name).endswith(SUFFIXES) and not TABLES.search(name)


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one that open_shards finds something in."""
    return (folder / INDEX).is_file() or bool(token_files(folder) or _mds_files(folder))


def _mds_files(folder: str | os.PathLike[str]) -> list[Path]:
    return [path for path in _files(folder) if _bare(path.name).endswith(".mds")]


def _files(folder: str | os.PathLike[str]) -> list[Path]:
    try:
        return sorted(path for path in Path(folder).iterdir() if not path.is_dir())
    except OSError as error:
        raise ShardError(f"cannot list the folder {folder}: {error}") from error


def _bare(name: str) -> str:
    """A name without the suffix of its compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSIONS else name


def _open(source: Source, name: str | None, choice: Choice) -> tuple[Shard, ...]:
    format = FORMATS[name] if name is not None else _format_of(source)
    if choice.column is not None and format is not MDS:
        raise ManifestError(f"{source.path} is of format {format.name}, which has no columns; leave column= out")
    if choice.documents is not None and format is not MDS:
        raise ManifestError(f"{source.path} is of format {format.name}, which has no samples; leave documents= out")
    return format.open(source, choice)


def _format_of(source: Source) -> Format:
    for format in FORMATS.values():
        if format.matches(source):
            if format is NANOGPT:
                refuse_damaged_header(source)
            return format
    if source.name == INDEX:
        raise ShardError(f"{source.path} has neither 'shards' (MDS) nor 'chunks' (litData); it is no index of tokens")
    raise ShardError(
        f"the name of {source.path} does not say that it holds tokens; expected one that ends in "
        f"{', '.join(SUFFIXES)}: give format= (one of {', '.join(FORMATS)}) if it does"
    )
