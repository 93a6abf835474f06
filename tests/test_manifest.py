"""Manifests, folders and shards: what opens, and what is refused with which words."""

import gzip
import hashlib
import json
from pathlib import Path

import foreign
import numpy as np
import pytest
from corpora import tagged, write_llmc, write_raw
from hypothesis import given
from hypothesis import strategies as st

from mixloader import Manifest, MixLoader
from mixloader.errors import ManifestError, MixLoaderError, ShardError
from mixloader.formats import open_shard, read_tokens
from mixloader.formats.tables import read_table


def test_formats_are_told_apart(tmp_path):
    raw = open_shard(write_raw(tmp_path / "raw.bin", np.arange(50, dtype="<u2")))
    assert (raw.format, raw.dtype, raw.offset, raw.tokens) == ("nanogpt", "uint16", 0, 50)
    wide = open_shard(write_raw(tmp_path / "wide.bin", np.arange(50, dtype="<u4")), dtype="uint32")
    assert (wide.format, wide.dtype, wide.tokens) == ("nanogpt", "uint32", 50)
    narrow = write_llmc(tmp_path / "gpt2.bin", np.arange(50, dtype="<u2"), magic=20240520, version=1)
    assert (open_shard(narrow).format, open_shard(narrow).dtype, open_shard(narrow).tokens) == ("llmc", "uint16", 50)
    llama = open_shard(write_llmc(tmp_path / "llama.bin", tagged(3, 50)))
    assert (llama.dtype, llama.offset, llama.tokens) == ("uint32", 1024, 50)
    for shard in (raw, wide, llama):
        assert (np.diff(read_tokens(shard, 10, 30).astype(np.int64)) == 1).all()


@pytest.mark.parametrize("kept", [0, 1, 3, 100, 1023, 1025, 1024 + 199])
def test_a_truncated_shard_is_refused_at_open(tmp_path, kept):
    path = write_llmc(tmp_path / "a.bin", tagged(0, 50))
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    with pytest.raises(ShardError, match=f"shard {path} .*(is empty|truncated)"):
        open_shard(path, format="llmc")
    with (
        pytest.raises(ShardError, match=f"shard {path} is empty" if kept == 0 else ".+")
        if kept < 4
        else pytest.raises(ShardError)
    ):
        open_shard(path, dtype="uint32")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([7, 1, 50], "begins with 7, not with an llm.c magic number"),
        ([20240520, 2, 50], "version 2; expected 1"),
        ([20240520, 1, -5], "announces -5 uint16 tokens"),
        ([20240520, 1, 2**31 - 1], "announces 2147483647 uint16 tokens"),
        ([20240520, 1, 0], "it is empty"),
        ([20240520, 1, 49], "announces 49 uint16 tokens"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, message):
    content = np.zeros(256, dtype="<i4")
    content[:3] = header
    path = tmp_path / "a.bin"
    path.write_bytes(content.tobytes() + bytes(100))
    with pytest.raises(ShardError, match=message):
        open_shard(path, format="llmc")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"does not exist"):
        open_shard(tmp_path / "none.bin")
    with pytest.raises(ShardError, match="not a regular file"):
        open_shard(tmp_path)
    import os

    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(ShardError, match="not a regular file"):
        open_shard(tmp_path / "pipe.bin")
    with pytest.raises(ManifestError, match="unknown shard format 'parquet'"):
        open_shard(tmp_path / "x.bin", format="parquet")


def test_a_folder_of_folders_is_a_data_set(tmp_path):
    for name in ("web", "code"):
        write_llmc(tmp_path / name / "train_000.bin", tagged(0, 50))
        write_llmc(tmp_path / name / "train_001.bin", tagged(1, 60))
        write_llmc(tmp_path / name / "val_000.bin", tagged(2, 40))
    manifest = Manifest.open(tmp_path)
    assert manifest.names == ("code", "web")
    assert [d.tokens for d in manifest.domains] == [110, 110]
    assert [Path(s.path).name for s in manifest.domain("web").validation] == ["val_000.bin"]


def test_a_nanogpt_folder_is_one_domain_and_loose_shards_one_each(tmp_path):
    write_raw(tmp_path / "owt" / "train.bin", np.arange(50, dtype="<u2"))
    write_raw(tmp_path / "owt" / "val.bin", np.arange(20, dtype="<u2"))
    manifest = Manifest.open(tmp_path / "owt")
    assert manifest.names == ("owt",)
    assert len(manifest.domains[0].validation) == 1
    write_raw(tmp_path / "loose" / "web.bin", np.arange(50, dtype="<u2"))
    write_raw(tmp_path / "loose" / "math.bin", np.arange(50, dtype="<u2"))
    assert Manifest.open(tmp_path / "loose").names == ("math", "web")


def test_a_mapping_names_fields_and_dtypes(tmp_path):
    web = write_raw(tmp_path / "web.bin", np.arange(50, dtype="<u4"))
    math = write_llmc(tmp_path / "math" / "a.bin", tagged(0, 50))
    data = {"web": {"path": web, "dtype": "uint32", "field": "source"}, "math": [math]}
    manifest = Manifest.open(data)
    assert manifest.table().fields == ("source", None)
    assert manifest.domain("web").shards[0].dtype == "uint32"
    with pytest.raises(ManifestError, match="'web' has an unknown key 'feild'"):
        Manifest.open({"web": {"path": web, "feild": "source"}})
    with pytest.raises(ManifestError, match="field 'goal'; expected 'source', 'target' or none"):
        Manifest.open({"web": {"path": web, "dtype": "uint32", "field": "goal"}})


@pytest.mark.parametrize("what", ["none", "empty"])
def test_a_missing_or_empty_folder_says_what_was_expected(tmp_path, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"does not exist; expected|holds neither a manifest.json nor"):
        MixLoader(tmp_path / what, 4, 8)
    with pytest.raises(MixLoaderError, match=r"does not exist|holds no token shards"):
        MixLoader({"a": tmp_path / what}, 4, 8)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "data"
    for i, name in enumerate(("web", "math")):
        write_llmc(folder / name / "train_000.bin", tagged(i, 100))
        write_llmc(folder / name / "val_000.bin", tagged(i, 100))
    found = Manifest.open(folder)
    Manifest(found.domains, vocab_size=1 << 21, eot=0).save(folder / "manifest.json")
    return folder


def test_a_manifest_round_trips_and_may_move_with_its_folder(saved, tmp_path):
    manifest = Manifest.open(saved)
    assert manifest.vocab_size == 1 << 21
    assert Manifest.open(saved / "manifest.json") == manifest
    moved = tmp_path / "elsewhere"
    saved.rename(moved)
    assert Manifest.open(moved).fingerprint == manifest.fingerprint
    assert Manifest.open(moved) != manifest


def test_the_fingerprint_changes_with_the_data(saved):
    before = Manifest.open(saved).fingerprint
    write_llmc(saved / "web" / "train_000.bin", tagged(0, 101))
    with pytest.raises(ShardError, match=r"has 1428 bytes, but manifest .* says 1424; .*truncated or replaced"):
        Manifest.open(saved)
    (saved / "manifest.json").unlink()
    assert Manifest.open(saved).fingerprint != before


def test_a_manifest_of_version_1_opens_by_the_headers_of_its_shards(saved):
    path = saved / "manifest.json"
    now = Manifest.open(saved)
    content = json.loads(path.read_text())
    content["version"] = 1
    for domain in content["domains"]:
        for entry in (*domain["shards"], *domain["validation"]):
            entry["sha256"] = "ab" * 32
            del entry["offset"], entry["digest"]
    path.write_text(json.dumps(content))
    old = Manifest.open(saved)
    assert old.domains[0].shards[0].offset == 1024
    assert old.domains[0].shards[0].digest == "sha256:" + "ab" * 32
    assert old != now
    # As mixloader 0.1 computed it, so that states saved with it load.
    shards = [[["train_000.bin", "llmc", "uint32", 100, 1424, "ab" * 32]]] * 2
    data = [["math", shards[0]], ["web", shards[1]]]
    assert old.fingerprint == hashlib.sha256(json.dumps([1, 1 << 21, data]).encode()).hexdigest()[:32]


def test_domains_are_appended_and_the_old_ones_keep_their_fingerprint(saved, tmp_path):
    before = Manifest.open(saved)
    extra = write_raw(tmp_path / "data" / "extra.bin", np.arange(50, dtype="<u2"))
    after = before.with_domain("extra", {"path": extra, "field": "target"})
    assert after.names == ("math", "web", "extra")
    assert after.prefix_fingerprint(2) == before.fingerprint != after.fingerprint
    assert after.prefix_fingerprint(1) != before.fingerprint
    after.save(saved / "manifest.json")
    assert Manifest.open(saved) == after
    with pytest.raises(ManifestError, match="two domains have the name 'web'"):
        before.with_domain("web", extra)


def test_a_domain_is_split_by_shards(tmp_path):
    for i in range(3):
        write_llmc(tmp_path / "web" / f"train_{i}.bin", tagged(i, 50 + i))
    whole = Manifest.open({"web": {"path": tmp_path / "web", "field": "source", "group": "g"}})
    split = whole.split("web", {"even": [0, 2], "odd": [1]})
    assert split.names == ("web", "even", "odd")
    assert split.prefix_fingerprint(1) == whole.fingerprint
    assert [s.tokens for s in split.domain("even").shards] == [50, 52]
    assert (split.domain("odd").field, split.domain("odd").group, split.domain("odd").tokens) == ("source", "g", 51)
    for parts in ({"a": [0], "b": [1]}, {"a": [0, 1], "b": [1, 2]}, {"a": [0, 1, 2, 3]}):
        with pytest.raises(ManifestError, match="expected each of 0 to 2 in one part"):
            whole.split("web", parts)
    with pytest.raises(ManifestError, match="'b' has no training shards"):
        whole.split("web", {"a": [0, 1, 2], "b": []})


def test_tables_of_a_manifest_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    documents = [np.arange(n, dtype="<u2") for n in (5, 30, 8)]
    foreign.write_mds(tmp_path / "d" / "mds", [[{"t": x} for x in documents]], {"t": "ndarray:uint16"})
    foreign.write_megatron(tmp_path / "d" / "meg" / "a", documents, indices=[0, 2, 3])
    manifest = Manifest.open(tmp_path / "d")
    manifest.save(tmp_path / "d" / "manifest.json")
    (tables,) = (tmp_path / "d").glob("*.npy")
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "d").rename(tmp_path / "e")
    loaded = Manifest.open(tmp_path / "e")
    assert loaded.fingerprint == manifest.fingerprint
    assert loaded.domain("mds").shards[0].extents == manifest.domain("mds").shards[0].extents
    loaded.save(tmp_path / "e" / "again.json")  # from the table of the first
    table = Manifest.open(tmp_path / "e" / "again.json").domain("meg").shards[0].documents
    assert read_table(table, Path(table.path).read_bytes()[table.offset :]).tolist() == [0, 35]
    path = tmp_path / "e" / tables.name
    content = path.read_bytes()
    for damaged, message in (
        (content[:-8], "cannot read"),
        (b"", "cannot read"),
        (content.replace(b"<u8", b"<i8"), "manifest .* says .* uint64"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ManifestError, match=message):
            Manifest.open(tmp_path / "e")


def test_opening_a_manifest_reads_no_shard(saved, monkeypatch):
    expected = Manifest.open(saved)

    def refuse(*arguments, **options):
        raise AssertionError("a shard was read")

    monkeypatch.setattr("mixloader.formats.source.Source.read", refuse)
    monkeypatch.setattr("mixloader.formats.source.Source.__init__", refuse)
    assert Manifest.open(saved) == expected


BAD_DETAILS = [
    ({"offset": -1}, "from byte -1 on"),
    ({"offset": 1026}, "100 uint32 tokens from byte 1026 on, but 1424 bytes; the manifest is damaged"),
    ({"offset": "0"}, "offset in manifest .* is '0'; expected an integer"),
    ({"tokens": 0}, "has 0 uint32 tokens"),
    ({"tokens": 1 << 62}, "the manifest is damaged"),
    ({"format": "parquet"}, "unknown shard format 'parquet'"),
    ({"compression": "lz4", "stored_bytes": 5}, "compression in manifest .* is 'lz4'; expected zstd or gzip"),
    ({"compression": "gzip"}, "stored_bytes in manifest .* is None"),
    ({"compression": "gzip", "stored_bytes": 5}, "has 1424 bytes, but manifest .* says 5"),
    ({"extents": {"tokens": 0, "stride": 8}}, "extents in manifest .* are empty"),
    ({"extents": {"tokens": 5}}, "stride in manifest .* is None"),
    ({"extents": {"first": 0, "count": 5}}, "refers to a table that is not there"),
    ({"documents": {"first": 0, "count": 5}}, "refers to a table that is not there"),
    ({"documents": {"path": "x"}}, "offset in manifest .* is None"),
    ({"documents": {"path": "../x", "offset": 0, "count": 1, "width": 8, "bias": 0, "unit": 1}}, "lies outside"),
    ({"documents": {"path": "x", "offset": 0, "count": 1, "width": 8, "bias": 0, "unit": 1}}, "x does not exist"),
    ({"documents": {"path": "web/val_000.bin", "offset": 0, "count": 200, "width": 8, "bias": 0, "unit": 1}}, "1424 b"),
    ({"documents": {"path": "x", "offset": 0, "count": 1, "width": 3, "bias": 0, "unit": 1}}, "it is damaged"),
    ({"checksums": "/etc/passwd"}, "lies outside"),
    ({"checksums": 5}, "checksums in manifest .* is 5; expected a string"),
    ({"path": "s3://bucket/x"}, "'s3://bucket/x', which lies outside the manifest's folder"),
    ({"path": "file:///etc/passwd"}, "lies outside the manifest's folder"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_DETAILS)
def test_a_bad_detail_is_named(saved, changes, message):
    path = saved / "manifest.json"
    content = json.loads(path.read_text())
    content["domains"][0]["shards"][0].update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(MixLoaderError, match=message):
        Manifest.open(saved)


def test_a_folder_that_is_a_link_out_needs_an_allowed_root(saved, tmp_path):
    (saved / "math").rename(tmp_path / "elsewhere")
    (saved / "math").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="outside the manifest's folder"):
        Manifest.open(saved)
    assert Manifest.open(saved, roots=[tmp_path / "elsewhere"]).names == ("math", "web")


BAD_VALUES = [
    (("version",), 3, "version 3; this mixloader reads versions 1 to 2"),
    (("version",), None, "version in manifest .* is None; expected an integer"),
    (("vocab_size",), "many", "vocab_size in manifest .* is 'many'; expected an integer"),
    (("domains",), {}, "expected a list"),
    (("domains",), [], "at least one domain"),
    (("domains", 0), 5, r"domains\[0\] of manifest .* is no JSON object"),
    (("domains", 0, "name"), 5, r"domains\[0\].name in manifest .* is 5; expected a string"),
    (("domains", 1, "name"), "math", "two domains have the name 'math'"),
    (("domains", 0, "shards"), [], "'math' has no training shards"),
    (("domains", 0, "shards", 0, "path"), "../../etc/passwd", "lies outside the manifest's folder"),
    (("domains", 0, "shards", 0, "path"), "/etc/passwd", "lies outside the manifest's folder"),
    (("domains", 0, "shards", 0, "path"), "a\0b", "NUL byte"),
    (("domains", 0, "shards", 0, "path"), "math/none.bin", "does not exist"),
    (("domains", 0, "shards", 0, "tokens"), True, "expected an integer"),
    (("domains", 0, "shards", 0, "dtype"), "float16", "unknown token dtype 'float16'"),
    (("domains", 0, "field"), "goal", "field 'goal'"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_named(saved, place, value, message):
    path = saved / "manifest.json"
    content = json.loads(path.read_text())
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(MixLoaderError, match=message):
        Manifest.open(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": NaN}', "\x00"])
def test_what_is_no_manifest_is_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match="manifest"):
        Manifest.open(saved)


def test_a_link_out_of_the_folder_needs_an_allowed_root(saved, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    target = saved / "math" / "train_000.bin"
    target.rename(outside / "train_000.bin")
    target.symlink_to(outside / "train_000.bin")
    with pytest.raises(ManifestError, match="outside the manifest's folder"):
        Manifest.open(saved)
    assert Manifest.open(saved, roots=[outside]).names == ("math", "web")


@given(content=st.binary(max_size=1100))
def test_any_bytes_open_or_are_refused_with_a_shard_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(content)
    try:
        shard = open_shard(path)
    except ShardError:
        return
    assert shard.offset + shard.tokens * shard.width == len(content)


RAW = np.arange(1, 101, dtype="<u2")


@pytest.mark.parametrize("name", ["x_val.bin.zst", "x-val.npy.gz", "x_val.ds.gz", "x_validation.bin", "x.val.bin"])
def test_held_out_shards_are_known_by_name_whatever_their_suffixes(tmp_path, name):
    write_raw(tmp_path / "train.bin", RAW)
    write_raw(tmp_path / "raw", RAW)
    compressed = (tmp_path / "raw").read_bytes()
    if name.endswith(".gz"):
        compressed = gzip.compress(compressed)
    elif name.endswith(".zst"):
        compressed = pytest.importorskip("zstandard").ZstdCompressor().compress(compressed)
    (tmp_path / name).write_bytes(compressed)
    for data in (tmp_path, {"a": tmp_path}):
        (domain,) = Manifest.open(data).domains
        assert [Path(s.path).name for s in domain.shards] == ["train.bin"]
        assert [Path(s.path).name for s in domain.validation] == [name]


def test_a_folder_of_train_and_validation_is_one_domain(tmp_path):
    for name in ("train", "validation", "test"):
        write_raw(tmp_path / "c4" / name / "00.bin", RAW)
    (domain,) = Manifest.open(tmp_path / "c4").domains
    assert (domain.name, domain.tokens, len(domain.validation)) == ("c4", 100, 2)
    write_raw(tmp_path / "c4" / "wiki" / "00.bin", RAW)
    with pytest.raises(ManifestError, match="holds test beside train, wiki; expected train alone: pass a mapping"):
        Manifest.open(tmp_path / "c4")


def test_shards_beside_folders_of_shards_are_not_ignored(tmp_path):
    write_raw(tmp_path / "books" / "00.bin", RAW)
    write_raw(tmp_path / "train.bin", RAW)
    with pytest.raises(ManifestError, match=r"both files of tokens \(train\.bin\) and folders of them \(books\)"):
        Manifest.open(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a.bin"], r"the data are \['a.bin'\]; expected a manifest, its path, a folder, or a mapping"),
        ({"a": None}, "path of domain 'a' is None; expected a path or a list of paths"),
        ({"a": 3}, "path of domain 'a' is 3; expected"),
        ({"a": [3]}, "path of domain 'a' has 3 among its paths"),
        ({"a": {"path": "a.bin", "validation": None}}, "validation of domain 'a' is None; expected a path"),
        ({"a": {"path": "a.bin", "format": ["npy"]}}, r"format of domain 'a' is \['npy'\]; expected a string or none"),
        ({"a": "values.bin"}, 'the name of .*values.bin has "val" in it, which holds a shard out; rename'),
        ("a.bin", r'a\.bin holds tokens and is no manifest; name its domain: {"name": .a\.bin.}'),
        ("s3://bucket/manifest.json", r"s3://bucket/manifest.json is a URL; a manifest is a file on this machine"),
    ],
)
def test_what_is_no_data_is_refused_with_a_sentence(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    write_raw(tmp_path / "a.bin", RAW)
    write_raw(tmp_path / "values.bin", RAW)
    with pytest.raises(ManifestError, match=message):
        Manifest.open(data)


def test_mds_shards_without_their_index_say_what_is_missing(tmp_path):
    write_raw(tmp_path / "mds" / "shard.00000.mds", RAW)
    for data in (tmp_path, {"a": tmp_path / "mds"}):
        with pytest.raises(ShardError, match=r"holds shard\.00000\.mds, but no index\.json that lists it"):
            Manifest.open(data)
