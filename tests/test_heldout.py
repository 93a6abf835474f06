"""Held-out windows are checked as training's are, and fetched or decompressed once."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from mixloader import MixLoader, remote
from mixloader.errors import ShardError, TokenError
from mixloader.index import write_index

TOKENS = np.arange(1003, dtype="<i4")


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    TOKENS.tofile(folder / "train.bin")
    TOKENS.tofile(folder / "val.bin")
    return folder


def domain(folder: Path) -> dict[str, object]:
    return {"a": {"path": str(folder), "dtype": "int32"}}


def targets(loader: MixLoader) -> list[int]:
    found = np.concatenate([batch["targets"].numpy().ravel() for batch in loader.held_out()])
    return found[found != -100].tolist()


@pytest.mark.parametrize(
    ("token", "expected"), [(-7, "of at least 0"), (-100, "of at least 0"), (5000, "below .* 2000")]
)
def test_tokens_outside_the_vocabulary_are_refused(data, token, expected):
    tokens = TOKENS.copy()
    tokens[25] = token
    tokens.tofile(data / "val.bin")
    message = rf"'a' hold token {token}, at 25 of .*val\.bin; expected ids {expected}"
    with MixLoader(domain(data), 4, 16, vocab_size=2000) as loader, pytest.raises(TokenError, match=message):
        targets(loader)


def test_a_damaged_shard_with_block_checksums_is_refused(data):
    write_index(data, domain(data), blocks=True)
    with MixLoader(data, 4, 16) as loader:
        assert targets(loader) == TOKENS[1:].tolist()
        content = bytearray((data / "val.bin").read_bytes())
        content[100] ^= 1
        (data / "val.bin").write_bytes(content)
        with pytest.raises(ShardError, match=r"val\.bin"):
            targets(loader)


def test_a_shard_elsewhere_or_compressed_comes_once_and_is_let_go(data, tmp_path, monkeypatch):
    (data / "val.bin.gz").write_bytes(gzip.compress((data / "val.bin").read_bytes()))
    (data / "val.bin").unlink()
    copies = []
    fetch = remote.fetch
    monkeypatch.setattr(remote, "fetch", lambda url, *a, **k: copies.append(url) or fetch(url, *a, **k))
    with MixLoader(domain(data), 4, 16, cache_dir=tmp_path / "cache") as loader:
        monkeypatch.setattr("mixloader.formats.source.Source._read_compressed", None)
        assert targets(loader) == TOKENS[1:].tolist()
        batches = iter(loader.held_out())
        next(batches)
        batches.close()
        open_files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        assert not [path for path in open_files if path.startswith(str(tmp_path / "cache"))]
    assert copies == [str(data / "val.bin.gz")]


def test_sizes_of_batches_are_checked(data):
    with MixLoader(domain(data), 4, 16) as loader:
        for options in ({"batch_size": 0}, {"windows_per_domain": -3}):
            with pytest.raises(ValueError, match=r"is (0|-3); expected an integer of at least"):
                loader.held_out(**options)
