"""`index` writes a manifest over shards that stay where they are; `verify` checks all that a manifest says of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from mixloader import _core, remote
from mixloader.domains import Domain, domain_from_value
from mixloader.errors import ManifestError, MixLoaderError, TokenError
from mixloader.formats import Documents, Extents, Shard, token_blocks
from mixloader.formats.opening import SUFFIXES
from mixloader.formats.source import COMPRESSIONS, Source, is_url
from mixloader.formats.tables import TABLES, is_kept, read_table
from mixloader.manifest import Manifest, check_ids
from mixloader.manifest_file import Bad, read_manifest

_THREADS = 8  # hashing and reading release the GIL
_CHECKSUMS = ".checksums"  # of the folder beside a manifest with its sidecars

T = TypeVar("T")
R = TypeVar("R")


def write_index(
    path: str | Path,
    domains: Mapping[str, Any],
    *,
    checksums: bool = False,
    blocks: bool = False,
    validation_tokens: int = 0,
    eot: int | None = None,
    vocab_size: int | None = None,
    progress: bool | None = False,
) -> Manifest:
    """Write a manifest over shards that stay where they are, and return it.

    path: of the manifest, in a folder or as a .json file. domains: as for Manifest.open.
    checksums: the SHA-256 of each file, unless its format lists a digest. blocks: a sidecar of checksums of the
    blocks of each file at hand, so that damaged bytes are found when they are read.
    validation_tokens: held out from the end of the last shard of each domain that holds out nothing; whole
    extents where a shard has them. eot: documents of shards without an index are counted by it.
    vocab_size: every token is checked to be below it. progress: a bar; None shows one on a terminal.
    Raises ManifestError, ShardError and TokenError, and then writes no manifest.
    """
    path = Path(path).absolute()
    path = path if path.suffix == ".json" else path / "manifest.json"
    check_ids(vocab_size, eot)
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise ManifestError(
                f"{folder} is no folder, so {path} cannot be written; give a folder or a .json file first"
            )
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = _each(pool, lambda item: domain_from_value(*item), domains.items(), "open", progress)
        if validation_tokens:
            opened = [hold_out(domain, validation_tokens) for domain in opened]
        files = {shard.path: shard for domain in opened for shard in (*domain.shards, *domain.validation)}
        digests: dict[str, str | None] = {}
        if checksums:
            wanted = [file for file in files.values() if file.digest is None]
            paths = [file.path for file in wanted]
            digests = dict(zip(paths, _each(pool, _sha256, paths, "checksums", progress), strict=True))
        tables = {s.documents.path for d in opened for s in (*d.shards, *d.validation) if s.documents is not None}
        own = [table for table in sorted(tables) if table not in files and not is_kept(table)]
        tabled = dict(zip(own, _each(pool, _sha256, own, "tables", progress), strict=True))
        sidecars: dict[str, str] = {}
        if blocks:
            folder = path.parent / f"{path.stem}{_CHECKSUMS}"
            _make(folder)
            jobs = [
                (file.path, str(folder / f"{number:05d}-{os.path.basename(file.path)}.sums"))
                for number, file in enumerate(files.values())
                if file.is_ready
            ]
            _each(pool, lambda job: _core.write_checksums(*job), jobs, "block checksums", progress)
            sidecars = dict(jobs)

        def known(shard: Shard) -> Shard:
            count = shard.document_count
            if (eot is not None and count is None) or vocab_size is not None:
                found = _scan(shard, eot, vocab_size)
                count = found if count is None and eot is not None else count
            documents = shard.documents
            if documents is not None:
                documents = replace(documents, digest=tabled.get(documents.path))
            return replace(
                shard,
                documents=documents,
                digest=digests.get(shard.path, shard.digest),
                checksums=sidecars.get(shard.path),
                document_count=count,
            )

        every = [shard for domain in opened for shard in (*domain.shards, *domain.validation)]
        described = iter(_each(pool, known, every, "count", progress))
    manifest = Manifest(
        tuple(
            replace(
                domain,
                shards=tuple(next(described) for _ in domain.shards),
                validation=tuple(next(described) for _ in domain.validation),
            )
            for domain in opened
        ),
        vocab_size,
        eot,
    )
    _make(path.parent)
    manifest.save(path)
    return manifest


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ManifestError(f"cannot make the folder {folder}: {error}; give another place for the manifest") from error


def hold_out(domain: Domain, tokens: int) -> Domain:
    """A domain that holds out the last `tokens` of its last shard, or more to keep extents whole."""
    if domain.validation:
        return domain
    last = domain.shards[-1]
    at = last.tokens - tokens
    if last.extents is not None and at > 0:
        ends = last.extents.ends
        at = at // last.extents.tokens * last.extents.tokens if ends is None else _at_most(ends, at)
    if at <= 0:
        raise ManifestError(
            f"domain {domain.name!r} has {last.tokens} tokens in its last shard, {last.path}; "
            f"{tokens} cannot be held out of it: hold out fewer, or give it a validation path"
        )
    head, tail = cut(last, at)
    return replace(domain, shards=(*domain.shards[:-1], head), validation=(tail,))


def _at_most(ends: np.ndarray, at: int) -> int:
    i = int(np.searchsorted(ends, at, side="right"))
    return int(ends[i - 1]) if i else 0


def cut(shard: Shard, at: int) -> tuple[Shard, Shard]:
    """The parts of a shard before token `at`, the end of an extent if it has extents, and from it on."""
    head, tail = replace(shard, tokens=at, document_count=None), replace(shard, tokens=shard.tokens - at)
    tail = replace(tail, offset=shard.offset + at * shard.width, document_count=None)
    extents = shard.extents
    if extents is not None and extents.ends is None:
        tail = replace(tail, offset=shard.offset + at // extents.tokens * extents.stride)
    elif extents is not None and extents.ends is not None and extents.bytes is not None:
        i = int(np.searchsorted(extents.ends, at)) + 1
        head = replace(head, extents=Extents(ends=extents.ends[:i], bytes=extents.bytes[:i]))
        rest = Extents(ends=extents.ends[i:] - np.uint64(at), bytes=extents.bytes[i:])
        tail = replace(tail, extents=rest, offset=int(extents.bytes[i]))
        if shard.extents_are_documents:
            count = len(extents.ends)
            head, tail = replace(head, document_count=i), replace(tail, document_count=count - i)
    if shard.documents is not None:
        (before, first), (after, second) = _cut_table(shard.documents, at)
        head = replace(head, documents=before, document_count=first)
        tail = replace(tail, documents=after, document_count=second)
    return head, tail


def _cut_table(table: Documents, at: int) -> tuple[tuple[Documents, int], tuple[Documents, int]]:
    """The tables of the documents before token `at` and from it on, and how many each part has."""
    content = Source(table.path, None).read(table.offset, table.count * table.width)
    starts = read_table(table, content).astype(np.int64)
    i = int(np.searchsorted(starts, at))
    head = replace(table, count=i)
    tail = replace(
        table, offset=table.offset + i * table.width, count=table.count - i, bias=table.bias + at * table.unit
    )
    begun = len(np.unique(np.append(starts[:i], 0)))
    return (head, begun), (tail, len(np.unique(np.append(starts[i:] - at, 0))))


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    for block in Source(path).blocks(stored=True):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _scan(shard: Shard, eot: int | None, vocab_size: int | None) -> int:
    """End-of-text tokens in a shard. Raises TokenError for an id that is negative or not below vocab_size."""
    found = position = 0
    for tokens in token_blocks(shard):
        if vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
            raise TokenError(
                f"token {position + bad} of shard {shard.path} has id {tokens[bad]}, but the vocabulary has "
                f"{vocab_size} ids; check vocab_size, and the dtype ({shard.dtype}) of files that do not say it"
            )
        found += int(np.count_nonzero(tokens == eot)) if eot is not None else 0
        position += len(tokens)
    return found


def verify(
    path: str | Path, *, roots: Iterable[str | Path] = (), progress: bool | None = False
) -> tuple[list[str], list[str]]:
    """What is wrong with the files of a manifest, a sentence each, and files beside it that it does not name.

    Sizes, digests and block checksums are compared with the files' content, and tables with the shards that
    they are of. Raises ManifestError for a manifest that cannot be read at all.
    """
    path = Path(path).absolute()
    path = path / "manifest.json" if path.is_dir() else path
    bad: Bad = []
    content = read_manifest(path, roots, bad)
    Manifest(**content)
    every = [s for domain in content["domains"] for s in (*domain.shards, *domain.validation)]
    files = {s.path: s for s in every}
    known = {file for file, _ in bad}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = _each(pool, _damage, [file for file in files.values() if file.path not in known], "verify", progress)
        tabled = [s for s in every if s.documents is None or s.documents.path not in known]
        found += _each(pool, _table_damage, tabled, "tables", progress)
    damaged = [message for _, message in bad] + list(dict.fromkeys(m for m in found if m is not None))
    return damaged, _orphans(path, content, files)


def _damage(shard: Shard) -> str | None:
    """What is wrong with the content of a shard's file."""
    try:
        source = Source(shard.path, shard.compression)
        expected = shard.bytes if shard.stored_bytes is None else shard.stored_bytes
        if source.stored_bytes != expected:
            return f"shard {shard.path} has {source.stored_bytes} bytes, but its manifest says {expected}"
        if shard.digest is not None:
            digest = remote.new_hash(shard.digest, shard.path)
            for block in source.blocks(stored=True):
                digest.update(block)
            algorithm, _, known = shard.digest.partition(":")
            if digest.hexdigest() != known.lower():
                return (
                    f"shard {shard.path} has {algorithm} {digest.hexdigest()}, but its manifest says {known}; "
                    "it was damaged or replaced"
                )
        if shard.checksums is not None:
            _core.verify(shard.path, shard.checksums)
    except MixLoaderError as error:
        return str(error)
    return None


def _table_damage(shard: Shard) -> str | None:
    """What is wrong with the tables of a shard: where its documents begin, and where its extents lie."""
    documents, extents = shard.documents, shard.extents
    if extents is not None and extents.ends is not None and extents.bytes is not None:
        sizes = np.diff(extents.ends.astype(np.int64), prepend=0)
        reach = extents.bytes.astype(np.int64) + sizes * shard.width
        sound = len(sizes) > 0 and (sizes > 0).all() and int(extents.ends[-1]) == shard.tokens
        if not sound or (extents.bytes >= shard.bytes).any() or (reach > shard.bytes).any():
            return f"the table of extents of shard {shard.path} does not fit its {shard.tokens} tokens; it is damaged"
    try:
        if documents is None or (documents.path == shard.path and not shard.is_ready):
            return None
        if documents.digest is not None and (found := _sha256(documents.path)) != documents.digest:
            return f"{documents.path} has {found}, but its manifest says {documents.digest}; it was damaged or replaced"
        content = Source(documents.path, None).read(documents.offset, documents.count * documents.width)
        numbers = np.frombuffer(content, dtype=f"<u{documents.width}")
        if _is_damaged(documents, numbers, shard.tokens):
            return (
                f"the table of documents in {documents.path} decreases or leads to no token of the {shard.tokens} of "
                f"shard {shard.path}; it is damaged"
            )
    except MixLoaderError as error:
        return str(error)
    return None


def _is_damaged(table: Documents, numbers: np.ndarray, tokens: int) -> bool:
    """Whether a table is cut short, decreases, or has what is neither one of its shard's tokens nor their end."""
    if len(numbers) == 0 or len(numbers) != table.count:
        return len(numbers) != table.count
    if (numbers[1:] < numbers[:-1]).any() or int(numbers[0]) < table.bias:
        return True
    places = numbers.astype(np.uint64) - np.uint64(table.bias)
    return bool((places % np.uint64(table.unit)).any()) or int(places[-1]) > tokens * table.unit


def _orphans(manifest: Path, content: dict[str, Any], files: Mapping[str, Shard]) -> list[str]:
    """Files of tokens, sidecars and half-written files in a manifest's folder that it does not name."""
    named = {os.path.realpath(path) for path in files if not is_url(path)}
    for shard in (s for domain in content["domains"] for s in (*domain.shards, *domain.validation)):
        named |= {os.path.realpath(p) for p in (shard.checksums, shard.documents and shard.documents.path) if p}
        ends = shard.extents and shard.extents.ends
        if isinstance(ends, np.memmap):
            named.add(os.path.realpath(str(ends.filename)))
    suffixes = (*SUFFIXES, *(a + b for a in SUFFIXES for b in COMPRESSIONS), ".mds", ".sums", ".tmp")
    orphans = []
    for folder, _, names in os.walk(manifest.parent):
        for name in names:
            path = os.path.join(folder, name)
            if (name.endswith(suffixes) or TABLES.search(name)) and os.path.realpath(path) not in named:
                orphans.append(path)
    return sorted(orphans)


def _each(
    pool: ThreadPoolExecutor, do: Callable[[T], R], items: Iterable[T], what: str, progress: bool | None
) -> list[R]:
    """do(item) of each, in order, in threads."""
    waiting = [pool.submit(do, item) for item in items]
    hidden = None if progress is None else not progress  # None: tqdm looks for a terminal
    try:
        return [job.result() for job in tqdm(waiting, desc=what, disable=hidden, leave=False)]
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
