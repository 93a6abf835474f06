"""`index` and `verify`: what a manifest over foreign shards says, and which damage is found and named."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import foreign
import numpy as np
import pytest
from corpora import tagged, write_llmc, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from mixloader import Manifest, MixLoader
from mixloader.cli import main
from mixloader.errors import ManifestError, ShardError, TokenError
from mixloader.formats import open_shard, open_shards, read_tokens
from mixloader.formats.source import Source
from mixloader.formats.tables import read_table
from mixloader.index import cut, verify, write_index

EOT = 9
DOCUMENTS = [np.r_[np.arange(10, 10 + n), EOT] for n in (7, 30, 1, 200, 80, 45)]
TOKENS = np.concatenate(DOCUMENTS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of one domain a format."""
    folder = tmp_path / "data"
    write_raw(folder / "raw" / "a.bin", TOKENS.astype("<u2"))
    write_llmc(folder / "llmc" / "a.bin", TOKENS.astype("<u4"))
    foreign.write_megatron(folder / "megatron" / "a", DOCUMENTS)
    foreign.write_datatrove(folder / "datatrove" / "a.ds", DOCUMENTS)
    samples = [{"tokens": foreign.little(d, "uint16")} for d in DOCUMENTS]
    foreign.write_mds(folder / "mds", [samples[:3], samples[3:]], {"tokens": "ndarray:uint16"})
    foreign.write_litdata(folder / "litdata", [DOCUMENTS])
    return folder


def domains(data: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(data.iterdir()) if path.is_dir()}


def test_an_index_knows_documents_digests_and_blocks(data):
    manifest = write_index(data, domains(data), checksums=True, blocks=True, eot=EOT, vocab_size=300)
    assert Manifest.open(data) == Manifest.load(data / "manifest.json")
    assert (manifest.eot, manifest.vocab_size) == (EOT, 300)
    for loaded, made in zip(Manifest.open(data).domains, manifest.domains, strict=True):
        assert sum(shard.document_count for shard in loaded.shards) == len(DOCUMENTS)
        assert loaded.tokens == made.tokens == len(TOKENS)
        for shard in loaded.shards:
            assert shard.digest == "sha256:" + hashlib.sha256(Path(shard.path).read_bytes()).hexdigest()
            assert Path(shard.checksums).is_file()
        assert np.concatenate([read_tokens(s) for s in loaded.shards]).tolist() == TOKENS.tolist()
    assert verify(data) == ([], [])


def test_damaged_bytes_are_found_on_the_way_to_a_batch_and_by_verify(data):
    names = domains(data)
    write_index(data, names, checksums=True, blocks=True)
    victim = data / "raw" / "a.bin"
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content)
    weights = {name: float(name == "raw") for name in names}
    with MixLoader(data, 4, 16, weights=weights) as loader, pytest.raises(ShardError, match=r"raw/a\.bin"):
        list(zip(range(30), loader, strict=False))
    (message,), orphans = verify(data)
    assert "raw/a.bin has sha256" in message
    assert not orphans
    for shard in (content := json.loads((data / "manifest.json").read_text()))["domains"][-1]["shards"]:
        shard["digest"] = None
    (data / "manifest.json").write_text(json.dumps(content))
    ((message,), _) = verify(data)
    assert "raw/a.bin" in message
    assert "block" in message


def test_verify_goes_on_after_what_it_finds_and_lists_what_is_not_named(data, capsys):
    write_index(data, domains(data), checksums=True)
    (data / "llmc" / "a.bin").unlink()
    (data / "raw" / "a.bin").write_bytes(b"12")
    (data / "datatrove" / "a.ds").write_bytes(bytes(len(TOKENS) * 2))
    write_raw(data / "raw" / "new.bin", TOKENS.astype("<u2"))
    (data / ".manifest.json.tmp").write_text("{")
    damaged, orphans = verify(data / "manifest.json")
    assert len(damaged) == 3
    for name, word in (
        ("llmc/a.bin", "does not exist"),
        ("raw/a.bin", "has 2 bytes"),
        ("datatrove/a.ds", "has sha256"),
    ):
        assert any(name in message and word in message for message in damaged)
    assert orphans == [str(data / ".manifest.json.tmp"), str(data / "raw" / "new.bin")]
    assert main(["verify", str(data)]) == 1
    printed = capsys.readouterr().out
    assert "3 bad, 2 not in the manifest" in printed
    assert all(message in printed for message in damaged)


def test_the_verbs(data, tmp_path, capsys):
    arguments = [f"{name}={path}" for name, path in domains(data).items()]
    out = tmp_path / "out" / "m.json"
    assert main(["index", str(out), *arguments, "--target", "mds", "--eot", str(EOT), "--validation_tokens", "40"]) == 0
    printed = capsys.readouterr().out
    assert "raw                                329 tokens" in printed
    assert f"roots={sorted(str(path) for path in domains(data).values())!r}" in printed
    assert main(["verify", str(out)]) == 2
    assert "outside the manifest's folder; pass its folder in roots=" in capsys.readouterr().err
    assert main(["verify", str(out), "--root", str(data)]) == 0
    manifest = Manifest.open(out, roots=[data])
    assert manifest.domain("mds").field == "target"
    assert main(["index", str(out), "a=x", "a=y"]) == 2
    assert main(["index", str(out), "a=x", "--target", "b"]) == 2
    assert main(["index", str(out), f"a={tmp_path / 'none'}"]) == 2
    assert main(["index", str(out), *arguments, "--validation_tokens", "-1"]) == 2
    assert "error: --validation_tokens is -1" in capsys.readouterr().err


def test_the_end_of_each_domain_is_held_out(data):
    write_index(data, domains(data), validation_tokens=60, eot=EOT)
    for domain in Manifest.open(data).domains:
        (held_out,) = domain.validation
        assert held_out.tokens == 60 if domain.name != "mds" else held_out.tokens >= 60
        train = np.concatenate([read_tokens(shard) for shard in domain.shards])
        assert [*train.tolist(), *read_tokens(held_out).tolist()] == TOKENS.tolist()
    with pytest.raises(
        ManifestError, match=r"'datatrove' has 369 tokens in its last shard, .*; 369 cannot be held out"
    ):
        write_index(data, domains(data), validation_tokens=len(TOKENS))
    assert len(Manifest.open(data).domains[0].validation) == 1


def test_what_is_held_out_already_stays(tmp_path):
    write_llmc(tmp_path / "a" / "train.bin", tagged(0, 100))
    write_llmc(tmp_path / "a" / "val.bin", tagged(0, 50))
    manifest = write_index(tmp_path, {"a": tmp_path / "a"}, validation_tokens=10)
    assert [s.tokens for s in (*manifest.domains[0].shards, *manifest.domains[0].validation)] == [100, 50]


@settings(max_examples=40)
@given(data=st.data())
def test_the_parts_of_a_shard_hold_its_tokens_and_documents(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=12))
    documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    format = data.draw(st.sampled_from(["megatron", "datatrove", "litdata", "mds"]))
    at = data.draw(st.integers(1, sum(lengths) - 1))
    if format == "mds":
        at = int(data.draw(st.sampled_from(np.cumsum(lengths)[:-1].tolist())))
        foreign.write_mds(folder, [[{"t": foreign.little(d, "uint16")} for d in documents]], {"t": "ndarray:uint16"})
    elif format == "litdata":
        foreign.write_litdata(folder, [documents])
    elif format == "datatrove":
        foreign.write_datatrove(folder / "a.ds", documents)
    else:
        foreign.write_megatron(folder / "a", documents)
    (shard,) = open_shards(folder)
    head, tail = cut(shard, at)
    assert [*read_tokens(head).tolist(), *read_tokens(tail).tolist()] == list(range(sum(lengths)))
    starts = set(np.cumsum([0, *lengths]).tolist())
    for part, first in ((head, 0), (tail, at)):
        expected = {0} | {s - first for s in starts if first <= s < first + part.tokens}
        if part.extents is None and part.documents is not None:
            table = part.documents
            content = Source(table.path, None).read(table.offset, table.count * table.width)
            found = {int(s) for s in read_table(table, content) if s < part.tokens}
            assert found | {0} == expected
        if part.extents_are_documents:
            assert part.document_count == len(expected)
            assert set(part.extents.ends.tolist()) == (expected - {0}) | {part.tokens}


def test_ids_outside_the_vocabulary_are_named(data):
    with pytest.raises(TokenError, match=r"token \d+ of shard .*litdata.* has id 150, but the vocabulary has 150 ids"):
        write_index(data, {"a": data / "litdata"}, vocab_size=150)
    # The commonest mistake: narrow tokens read as wide ones.
    write_raw(data / "raw" / "b.bin", TOKENS[:200].astype("<u2"))
    with pytest.raises(TokenError, match=r"token 0 of shard .* the dtype \(uint32\)"):
        write_index(data, {"a": {"path": data / "raw" / "b.bin", "dtype": "uint32"}}, vocab_size=50_000)
    assert not (data / "manifest.json").exists()


def test_compressed_shards_are_counted_and_verified(tmp_path):
    import gzip

    path = tmp_path / "a.bin.gz"
    path.write_bytes(gzip.compress(TOKENS.astype("<u2").tobytes()))
    manifest = write_index(tmp_path, {"a": path}, checksums=True, blocks=True, eot=EOT, vocab_size=300)
    (shard,) = manifest.domains[0].shards
    assert (shard.document_count, shard.checksums, shard.bytes) == (len(DOCUMENTS), None, 2 * len(TOKENS))
    assert Manifest.open(tmp_path) == manifest
    assert verify(tmp_path) == ([], [])
    path.write_bytes(gzip.compress(TOKENS.astype("<u2").tobytes(), mtime=7))
    (message,), _ = verify(tmp_path)
    assert "has sha256" in message


def test_shards_at_urls_need_an_allowed_root(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/index/a.bin", TOKENS.astype("<u2").tobytes())
    manifest = write_index(tmp_path, {"a": "memory://index/a.bin"}, checksums=True)
    assert manifest.roots_outside(tmp_path / "manifest.json") == ["memory://index"]
    assert Manifest.open(tmp_path, roots=["memory://index"]) == manifest
    for roots in ([], ["memory://ind"], ["memory://index/b"]):
        with pytest.raises(ManifestError, match=r"'memory://index/a\.bin', which lies outside"):
            Manifest.open(tmp_path, roots=roots)
    assert verify(tmp_path, roots=["memory://index/"]) == ([], [])


def test_a_killed_index_leaves_the_old_manifest(data, monkeypatch):
    write_index(data, domains(data))
    before = Manifest.open(data)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mixloader.manifest_file.json.dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        write_index(data, {"a": data / "mds"})
    monkeypatch.undo()
    monkeypatch.setenv("MIXLOADER_CACHE", str(data / "cache"))
    assert Manifest.open(data) == before


def test_one_format_for_all(data, capsys):
    assert main(["index", str(data), f"a={data / 'llmc'}", "--format", "nanogpt", "--dtype", "uint32"]) == 0
    assert Manifest.open(data).domains[0].shards[0] == open_shard(
        data / "llmc" / "a.bin", format="nanogpt", dtype="uint32"
    )
    assert main(["index", str(data), f"a={data / 'llmc'}", "--format", "parquet"]) == 2
    assert "unknown shard format 'parquet'" in capsys.readouterr().err


def test_an_index_made_again_does_not_take_its_own_tables_for_a_shard(tmp_path):
    folder = foreign.write_mds(
        tmp_path / "mds", [[{"tokens": foreign.little(d, "uint16")} for d in DOCUMENTS]], {"tokens": "ndarray:uint16"}
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    write_index(plain, {"a": folder})
    (tables,) = plain.glob("manifest.tables-*.npy")
    write_raw(plain / "a.bin", TOKENS.astype("<u2"))
    manifest = write_index(plain, {"a": plain})
    assert [Path(s.path).name for s in manifest.domains[0].shards] == ["a.bin"]
    (plain / "manifest.json").unlink()
    assert tables.is_file()
    assert Manifest.open(plain).names == ("a",)


def messages(folder: Path) -> list[str]:
    return verify(folder)[0]


@pytest.mark.parametrize("name", ["datatrove/a.ds.index", "megatron/a.idx"])
def test_a_changed_table_of_documents_is_reported(data, name):
    write_index(data, domains(data))
    path = data / name
    content = bytearray(path.read_bytes())
    at = 8 if name.endswith(".index") else 34 + 4 * len(DOCUMENTS) + 8
    content[at] ^= 2  # still ascending
    path.write_bytes(content)
    (message,) = messages(data)
    assert f"{name} has sha256:" in message


def test_tables_that_do_not_fit_their_shard_are_reported(data):
    write_index(data, domains(data))
    (tables,) = data.glob("manifest.tables-*.npy")
    numbers = np.load(tables)
    numbers[-1] ^= 1
    np.save(tables, numbers)
    assert any(f"{tables} has sha256" in message for message in messages(data))
    path = data / "manifest.json"
    content = json.loads(path.read_text())
    content["tables"]["sha256"] = hashlib.sha256(tables.read_bytes()).hexdigest()
    for domain in content["domains"]:
        (domain["shards"][0].get("documents") or {}).pop("digest", None)
    path.write_text(json.dumps(content))
    ends = np.fromfile(data / "datatrove" / "a.ds.index", dtype="<u8")
    ends[[1, 2]] = ends[[2, 1]]
    ends.tofile(data / "datatrove" / "a.ds.index")
    assert any("a.ds.index decreases or leads to no token" in message for message in messages(data))
    numbers[:] = numbers[::-1].copy()
    np.save(tables, numbers)
    assert any("the table of extents of shard" in message for message in messages(data))


def test_verify_looks_at_every_file_that_is_not_reported_yet(tmp_path):
    write_raw(tmp_path / "a" / "x.bin", TOKENS.astype("<u2"))
    write_raw(tmp_path / "a" / "x.bin.zz.bin", TOKENS.astype("<u2"))
    write_index(tmp_path, {"a": tmp_path / "a"}, checksums=True)
    (tmp_path / "a" / "x.bin.zz.bin").unlink()
    (tmp_path / "a" / "x.bin").write_bytes(bytes(len(TOKENS) * 2))
    assert [message.split(" ")[1].rsplit("/", 1)[1] for message in messages(tmp_path)] == ["x.bin.zz.bin", "x.bin"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("domains", 1, "name"), "a", "two domains have the name 'a'"),
        (("domains",), [], "a manifest needs at least one domain"),
        (("vocab_size",), 1 << 63, "vocab_size is 9223372036854775808; expected"),
        (("domains", 0, "shards", 0, "extents"), {"tokens": 5, "stride": 1 << 60}, "the manifest is damaged"),
        (("domains", 0, "shards", 0, "path"), "\ud800.bin", "holds half a surrogate pair"),
        (("domains", 0, "name"), "\ud800", "holds half a surrogate pair"),
    ],
)
def test_verify_refuses_what_open_refuses(tmp_path, place, value, message):
    path = write_raw(tmp_path / "a.bin", TOKENS.astype("<u2"))
    write_index(tmp_path, {"a": path, "b": path})
    content = target = json.loads((tmp_path / "manifest.json").read_text())
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for look in (Manifest.open, verify):
        with pytest.raises(ManifestError, match=message):
            look(tmp_path)


def test_an_index_in_a_folder_that_is_a_link_finds_its_shards(tmp_path):
    path = write_raw(tmp_path / "shards" / "a.bin", TOKENS.astype("<u2"))
    (tmp_path / "deep" / "er" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "deep" / "er" / "out")
    write_index(tmp_path / "out", {"a": path})
    assert Manifest.open(tmp_path / "out", roots=[path.parent]).domains[0].tokens == len(TOKENS)


def test_an_index_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    path = write_raw(tmp_path / "a.bin", TOKENS.astype("<u2"))
    for out, *options in (
        ["/dev/null/x"],
        [str(path)],
        [str(tmp_path), "--eot", "-1"],
        [str(tmp_path), f"--eot={1 << 64}"],
    ):
        assert main(["index", out, f"a={path}", *options]) == 2
        assert "error: " in capsys.readouterr().err
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ManifestError, match=r"cannot write manifest .*x\.json"):
        write_index(tmp_path / "x.json", {"a": path})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "x.json"]


def test_files_without_block_checksums_are_counted(tmp_path, capsys):
    (tmp_path / "a.bin.gz").write_bytes(gzip.compress(TOKENS.astype("<u2").tobytes()))
    assert main(["index", str(tmp_path), f"a={tmp_path}", "--blocks"]) == 0
    assert "no block checksums of 1 files" in capsys.readouterr().out


def test_a_pipe_is_no_manifest_and_no_table(data):
    write_index(data, domains(data))
    (tables,) = data.glob("manifest.tables-*.npy")
    for path in (tables, data / "manifest.json"):
        path.unlink()
        os.mkfifo(path)
        for look in (Manifest.open, verify):
            with pytest.raises(ManifestError, match="is not a regular file"):
                look(data)


def test_tables_of_another_cache_folder_go_beside_the_manifest(tmp_path, monkeypatch):
    path = foreign.write_megatron(tmp_path / "d" / "a", DOCUMENTS, indices=[0, 2, len(DOCUMENTS)])
    manifest = Manifest.open({"a": path})
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "another"))
    manifest.save(tmp_path / "d" / "manifest.json")
    assert ".tables-" in Manifest.open(tmp_path / "d").domains[0].shards[0].documents.path


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    path = foreign.write_megatron(tmp_path / "a", DOCUMENTS, indices=[0, 2, len(DOCUMENTS)])
    monkeypatch.setenv("MIXLOADER_CACHE", "/dev/null/cache")
    with pytest.raises(ShardError, match=r"cannot keep a table of documents in /dev/null/cache.*MIXLOADER_CACHE"):
        open_shards(path)


@pytest.mark.parametrize("changed", [{"unit": 4}, {"bias": 1}, {"offset": 0}, {"count": 3, "bias": 1 << 62}])
def test_an_entry_whose_table_leads_astray_is_reported(data, changed):
    write_index(data, {"a": data / "megatron"})
    assert messages(data) == []
    content = json.loads((data / "manifest.json").read_text())
    content["domains"][0]["shards"][0]["documents"].update(changed)
    (data / "manifest.json").write_text(json.dumps(content))
    (message,) = messages(data)
    assert "a.idx decreases or leads to no token of the 369 of shard" in message
