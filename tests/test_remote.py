"""Files elsewhere: whole, checked and decompressed whatever the server does, or a ShardError that names the URL."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from s3 import fresh, s3_server

from mixloader import remote
from mixloader.errors import ShardError

CONTENT = np.random.default_rng(0).integers(0, 50_000, 60_000, dtype="<u2").tobytes()
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    return fresh(server, monkeypatch, part=16_384)  # several requests a file


def fetched(url: str, **options) -> bytes:
    file = io.BytesIO()
    assert remote.fetch(url, file, **options) == len(file.getvalue())
    return file.getvalue()


def zstd(*frames: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed (pip install 'mixloader[remote]')")
    return b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames)


# A sound server


def test_size_ranges_and_listing_of_an_object(s3):
    url = s3.put("sound/train_000.bin", CONTENT)
    s3.put("sound/deeper/train_001.bin", b"x")
    assert remote.exists(url)
    assert not remote.exists(s3.url("sound/none.bin"))
    assert remote.size(url) == len(CONTENT)
    assert remote.read_range(url, 1000, 70_000) == CONTENT[1000:71_000]
    with pytest.raises(ShardError, match="got 1 of the 2 bytes"):
        remote.read_range(url, len(CONTENT) - 1, 2)
    assert remote.list_files(s3.url("sound")) == [url]


def test_a_fetched_object_is_whole_and_checked(s3):
    url = s3.put("whole.bin", CONTENT)
    assert fetched(url, digest=SHA256, bytes=len(CONTENT)) == CONTENT
    assert fetched(url) == CONTENT
    assert fetched(s3.put("empty.bin", b"")) == b""


def test_an_object_read_as_a_stream(s3):
    url = s3.put("stream.bin", CONTENT)
    with remote.open(url) as file:
        assert [file.read(5), file.read(70_000), file.read(), file.read()] == [
            CONTENT[:5], CONTENT[5:70_005], CONTENT[70_005:], b"",
        ]  # fmt: skip
    with remote.open(url) as file:
        file.read(1)  # and given up


@pytest.mark.parametrize("algorithm", ["sha1", "md5", "xxh64", "xxh3_64", "xxh128"])
def test_every_digest_that_an_index_may_hold(tmp_path, algorithm):
    if algorithm.startswith("xxh"):
        xxhash = pytest.importorskip("xxhash", reason="xxhash is not installed (pip install 'mixloader[remote]')")
        expected = getattr(xxhash, algorithm)(CONTENT).hexdigest()
    else:
        expected = hashlib.new(algorithm, CONTENT).hexdigest()
    path = tmp_path / "shard.bin"
    path.write_bytes(CONTENT)
    assert fetched(str(path), digest=f"{algorithm}:{expected}") == CONTENT
    with pytest.raises(ShardError, match=rf"shard\.bin has {algorithm} {expected}, but 00 was expected"):
        fetched(str(path), digest=f"{algorithm}:00")


@pytest.mark.parametrize("digest", ["sha256", "sha256:", "crc7:00", "shake_128:00", "xxh5:00", "xxhash:00"])
def test_an_unknown_digest_is_refused(tmp_path, digest):
    if digest.startswith("xx"):
        pytest.importorskip("xxhash", reason="xxhash is not installed (pip install 'mixloader[remote]')")
    (tmp_path / "shard.bin").write_bytes(CONTENT)
    with pytest.raises(ShardError, match=r"expected 'algorithm:hex'"):
        fetched(str(tmp_path / "shard.bin"), digest=digest)


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_the_other_protocols_give_the_same(tmp_path, scheme):
    import fsspec

    url = f"{scheme}{tmp_path}/shard.bin"
    with fsspec.open(url, "wb", auto_mkdir=True) as file:
        file.write(CONTENT)
    assert remote.size(url) == len(CONTENT)
    assert remote.read_range(url, 7, 2) == CONTENT[7:9]
    assert fetched(url, digest=SHA256) == CONTENT


class _NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_a_web_server_that_ignores_ranges(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (pip install 'mixloader[remote]')")
    monkeypatch.setattr(remote, "PART", 16_384)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "shard.bin").write_bytes(CONTENT)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_NoRanges, directory=tmp_path))
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{web.server_port}/shard.bin"
        assert fetched(url, digest=SHA256) == CONTENT
        assert remote.read_range(url, 0, 10) == CONTENT[:10]
        assert remote.read_range(url, 500, 10) == CONTENT[500:510]
        with pytest.raises(ShardError, match=r"none\.bin does not exist"):
            fetched(f"http://127.0.0.1:{web.server_port}/none.bin")
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


# Compression


def gzipped(*members: bytes) -> bytes:
    return b"".join(map(gzip.compress, members))


COMPRESSIONS = [("zstd", zstd), ("gzip", gzipped)]


@pytest.mark.parametrize(("compression", "compress"), COMPRESSIONS)
def test_compressed_files_of_one_or_several_frames(s3, compression, compress):
    for name, stored in {
        "one": compress(CONTENT),
        "three": compress(CONTENT[:50_000], b"", CONTENT[50_000:]),
        "padded": compress(CONTENT) + bytes(9000),
    }.items():
        url = s3.put(f"{compression}/{name}", stored)
        digest = "sha256:" + hashlib.sha256(stored).hexdigest()  # of the file as it is stored
        known = {"digest": digest, "bytes": len(CONTENT), "stored_bytes": len(stored)}
        assert fetched(url, compression=compression, **known) == CONTENT
        assert fetched(url, compression=compression) == CONTENT


@pytest.mark.parametrize(("compression", "compress"), COMPRESSIONS)
def test_damaged_compressed_files_are_refused(tmp_path, compression, compress):
    stored = compress(CONTENT)
    path = tmp_path / "shard"
    for content in (stored[:-1], stored[: len(stored) // 2], b"", b"\0" * 100, stored + b"more", CONTENT):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=rf"{path} .*(damaged|truncated): restore it"):
            fetched(str(path), compression=compression)


@pytest.mark.parametrize(("compression", "compress"), COMPRESSIONS)
def test_a_file_that_decompresses_to_too_much_is_stopped(tmp_path, compression, compress):
    path = tmp_path / "bomb"
    path.write_bytes(compress(bytes(200 << 20)))
    file = io.BytesIO()
    with pytest.raises(ShardError, match="gave more than the 1000 bytes that were expected"):
        remote.fetch(str(path), file, compression=compression, bytes=1000)
    assert len(file.getvalue()) <= 1000


def test_an_unknown_compression_is_refused(tmp_path):
    (tmp_path / "shard").write_bytes(CONTENT)
    with pytest.raises(ShardError, match="unknown compression 'lzma'; known are zstd, gzip"):
        fetched(str(tmp_path / "shard"), compression="lzma")


# A server with faults


@pytest.mark.parametrize("fault", ["error", "busy", "truncate", "cut", "delay"])
def test_a_fault_that_passes_is_not_noticed(s3, fault):
    url = s3.put(f"{fault}.bin", CONTENT)
    s3.faults[:] = [fault, "none", fault, fault]
    assert fetched(url, digest=SHA256) == CONTENT
    assert not s3.faults


def test_a_request_that_stalls_is_made_again(s3, monkeypatch):
    monkeypatch.setattr(remote, "STALL_S", 0.5)
    url = s3.put("stall.bin", CONTENT)
    s3.faults[:] = ["none", "stall"]
    started = time.monotonic()
    assert fetched(url, digest=SHA256) == CONTENT
    assert time.monotonic() - started < 2.5


def test_bits_flipped_on_the_way_are_fetched_anew(s3):
    url = s3.put("flip.bin", CONTENT)
    s3.faults[:] = ["flip"]
    assert fetched(url, digest=SHA256) == CONTENT


def test_an_object_that_is_not_the_expected_one_is_refused(s3):
    url = s3.put("other.bin", CONTENT[::-1])
    with pytest.raises(ShardError, match=rf"{url} has sha256 .*, but {SHA256[7:]} was expected; .*restore it"):
        fetched(url, digest=SHA256)
    with pytest.raises(ShardError, match=rf"{url} has {len(CONTENT)} bytes, but 99 were expected"):
        fetched(url, bytes=99)


def test_a_server_that_stays_broken_is_named(s3, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    url = s3.put("broken.bin", CONTENT)
    s3.faults[:] = ["truncate"] * 100
    with pytest.raises(ShardError, match=rf"cannot read {url}: got .* bytes from byte 0 on, 2 times in a row"):
        fetched(url)
    s3.faults[:] = ["error"] * 100
    with pytest.raises(ShardError, match=rf"cannot read {url}: .*, 2 times in a row; check the network"):
        fetched(url)


def test_a_refused_connection_is_said(monkeypatch):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (pip install 'mixloader[remote]')")
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    with pytest.raises(
        ShardError, match=r"cannot read http://127\.0\.0\.1:1/x\.bin: .*[Cc]onnect.*; check the network"
    ):
        remote.size("http://127.0.0.1:1/x.bin")


def test_what_is_not_there_is_said_at_once(s3):
    with pytest.raises(ShardError, match=r"s3://data/none\.bin does not exist"):
        fetched(s3.url("none.bin"))
    with pytest.raises(ShardError, match=r"s3://data/none\.bin does not exist"):
        remote.size(s3.url("none.bin"))
    assert len(s3.reads()) == 0


def test_a_protocol_without_its_package_names_the_remedy():
    with pytest.raises(ShardError, match=r"cannot open nothing://x: .*pip install 'mixloader\[remote\]'"):
        remote.size("nothing://x")


def test_a_fetch_is_given_up_when_it_is_not_wanted_any_more(s3):
    url = s3.put("slow.bin", CONTENT)
    s3.faults[:] = ["stall"]
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(remote.Cancelled):
        fetched(url, cancel=cancel)
    assert time.monotonic() - started < 2


def test_a_program_that_reads_from_s3_ends_in_silence(s3):
    url = s3.put("ends.bin", CONTENT)
    program = f"from mixloader import remote; print(len(remote.read_range({url!r}, 0, 50_000)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("50000\n", "", 0)
