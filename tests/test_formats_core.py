"""The C++ core over every format: the rows that numpy cuts from the known tokens, and their documents."""

from pathlib import Path

import foreign
import numpy as np
import pytest
from corpora import write_llmc, write_raw

from mixloader import Manifest, MixLoader, _core
from mixloader.mixture import WEIGHT_ONE

LENGTHS = (40, 1, 300, 77, 1000, 2, 150, 33, 400)
TOKENS = np.arange(1, sum(LENGTHS) + 1)  # each says where it stands
DOCUMENTS = np.split(TOKENS, np.cumsum(LENGTHS)[:-1])
PARTS = (DOCUMENTS[:4], DOCUMENTS[4:])
SEQ_LEN = 16


def _write(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    format, _, dtype = name.partition(" ")
    kind = np.dtype(dtype or "uint16").newbyteorder("<")
    whole = [np.concatenate(part).astype(kind) for part in PARTS]
    for i, (documents, tokens) in enumerate(zip(PARTS, whole, strict=True)):
        if format == "nanogpt":
            write_raw(folder / f"{i}.bin", tokens)
        elif format == "llmc":
            write_llmc(folder / f"{i}.bin", tokens.astype("<u4"))
        elif format == "npy":
            np.save(folder / f"{i}.npy", tokens)
        elif format == "olmo":
            write_raw(folder / f"{i}.npy", tokens)
        elif format == "datatrove":
            foreign.write_datatrove(folder / f"{i}.ds", documents, dtype)
        elif format == "megatron":
            foreign.write_megatron(folder / f"{i}", documents, dtype)
    if format == "mds":
        samples = [[{"tokens": d.astype(kind)} for d in part] for part in PARTS]
        foreign.write_mds(folder, samples, {"tokens": f"ndarray:{dtype}"})
    elif format == "mds-chunks":
        chunks = [[{"tokens": c} for c in part[: len(part) // 50 * 50].reshape(-1, 50)] for part in whole]
        foreign.write_mds(folder, chunks, {"tokens": "bytes"})
    elif format == "litdata":
        foreign.write_litdata(folder, PARTS, dtype)
    return folder


WITH_DOCUMENTS = [
    "datatrove uint16", "datatrove uint32", "megatron uint16", "megatron int32", "mds uint16", "mds int64",
    "litdata int32",
]  # fmt: skip
WITHOUT = ["nanogpt uint16", "llmc", "npy int64", "npy uint8", "olmo uint16", "mds-chunks uint16", "mds-chunks int64"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("through_manifest", [False, True])
@pytest.mark.parametrize("name", [*WITH_DOCUMENTS, *WITHOUT])
def test_an_epoch_gives_each_window_once(tmp_path, name, through_manifest):
    dtype = name.partition(" ")[2]
    options = {"dtype": dtype} if name.startswith(("nano", "olmo", "mds-")) else {}
    manifest = Manifest.open({"a": {"path": _write(tmp_path / "data", name), **options}})
    if through_manifest:
        manifest.save(tmp_path / "manifest.json")
        manifest = Manifest.open(tmp_path / "manifest.json")
    expected = []
    for part, shard in zip(PARTS, manifest.domain("a").shards, strict=True):
        tokens = np.concatenate(part) % (256 if dtype == "uint8" else 1 << 32)
        windows = np.lib.stride_tricks.sliding_window_view(tokens[: shard.tokens], SEQ_LEN + 1)[::SEQ_LEN]
        expected += windows.tolist()
    with MixLoader(manifest, 1, SEQ_LEN, max_steps=len(expected), vocab_size=len(TOKENS) + 1) as loader:
        rows = [torch_row for b in loader for torch_row in np.hstack((b["input_ids"], b["targets"][:, -1:])).tolist()]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("through_manifest", [False, True])
@pytest.mark.parametrize("name", [*WITH_DOCUMENTS, "megatron in sequences"])
def test_documents_begin_where_the_format_says(tmp_path, name, through_manifest):
    starts = np.cumsum([0, *map(len, DOCUMENTS[:-1])])
    if name == "megatron in sequences":
        (tmp_path / "data").mkdir()
        foreign.write_megatron(tmp_path / "data" / "a", DOCUMENTS, indices=[0, 2, 3, 7, len(DOCUMENTS)])
        starts = starts[[0, 2, 3, 7]]
    else:
        _write(tmp_path / "data", name)
    manifest = Manifest.open({"a": tmp_path / "data"})
    if through_manifest:
        manifest.save(tmp_path / "manifest.json")
        manifest = Manifest.open(tmp_path / "manifest.json")
    shards = [{**shard.for_core(), "windows": (shard.tokens - 1) // SEQ_LEN} for shard in manifest.domain("a").shards]
    rows = sum(shard["windows"] for shard in shards)
    streamer = _core.Streamer(
        domains=[(1, shards)], seq_len=SEQ_LEN, vocab_size=0, seed=0, batch_size=rows, micro_batches=1, world_size=1,
        rank=0, units=np.array([WEIGHT_ONE]), threads=0, boundaries=_core.Boundaries.INDEX, mask_targets=True,
    )  # fmt: skip
    inputs, targets, positions = (np.zeros((rows, SEQ_LEN), dtype=np.int64) for _ in range(3))
    documents, domains = np.zeros((rows, SEQ_LEN), dtype=np.int32), np.zeros(rows, dtype=np.int64)
    streamer.submit(inputs, targets, domains, positions, documents)
    streamer.next()
    for row in range(rows):
        places = inputs[row] - 1  # of the tokens, in all of them
        begins = [i for i in range(1, SEQ_LEN) if places[i] in starts]
        assert documents[row].tolist() == [sum(b <= i for b in begins) for i in range(SEQ_LEN)]
        assert positions[row].tolist() == [i - max([0, *(b for b in begins if b <= i)]) for i in range(SEQ_LEN)]
        assert (targets[row] == -100).tolist() == [place + 1 in starts for place in places]
    streamer.close()
