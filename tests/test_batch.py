"""What a batch is made of: output types, views, documents; and batches on a device."""

import numpy as np
import pytest
import torch
from corpora import tagged_domains, write_raw

from mixloader import MixLoader
from mixloader.device import DevicePrefetcher
from mixloader.errors import ConfigError


@pytest.fixture
def data(tmp_path):
    return tagged_domains(tmp_path, {"web": [700, 300], "code": [400]})


def plain(data, steps=6, **options):
    with MixLoader(data, 4, 8, max_steps=steps, **options) as loader:
        return list(loader)


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({"dtype": torch.int32}, (torch.int32, torch.int64)),
        ({"dtype": torch.int32, "target_dtype": torch.int32}, (torch.int32, torch.int32)),
        ({"contiguous": False}, (torch.int64, torch.int64)),
        ({"contiguous": False, "dtype": torch.int32, "target_dtype": torch.int32}, (torch.int32, torch.int32)),
    ],
)
def test_every_output_type_holds_the_same_tokens(data, options, types):
    for got, expected in zip(plain(data, **options), plain(data), strict=True):
        assert (got["input_ids"].dtype, got["targets"].dtype) == types
        assert got["input_ids"].shape == got["targets"].shape == (4, 8)
        assert torch.equal(got["input_ids"].long(), expected["input_ids"])
        assert torch.equal(got["targets"].long(), expected["targets"])
        shared = got["targets"].data_ptr() - got["input_ids"].data_ptr() == got["targets"].element_size()
        assert shared == (not options.get("contiguous", True))


def test_uint16_is_passed_raw(tmp_path):
    tokens = np.arange(500, dtype="<u2") * 131
    data = {"a": write_raw(tmp_path / "a.bin", tokens)}
    for contiguous in (True, False):
        for got, expected in zip(plain(data, dtype=torch.uint16, contiguous=contiguous), plain(data), strict=True):
            assert got["input_ids"].dtype == got["targets"].dtype == torch.uint16
            assert torch.equal(got["targets"].long(), expected["targets"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"contiguous": False, "dtype": torch.int32}, "both the same"),
        ({"dtype": torch.uint16, "documents": "eot", "mask_boundaries": True, "eot": 0}, "-100"),
        ({"contiguous": False, "documents": "eot", "mask_boundaries": True, "eot": 0}, "contiguous=False"),
    ],
)
def test_formats_that_cannot_be_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        MixLoader(data, 4, 8, **options)


def documents_of(tmp_path, seed=0):
    """A shard of documents of random lengths, each ended by token 0."""
    rng = np.random.default_rng(seed)
    parts = [np.append(rng.integers(1, 50, rng.integers(0, 12)), 0) for _ in range(200)]
    return {"a": write_raw(tmp_path / "a.bin", np.concatenate(parts).astype("<u2"))}


@pytest.mark.parametrize("kind", ["eot", "eot_start"])
def test_documents_of_a_row_follow_from_its_end_of_text_tokens(tmp_path, kind):
    for batch in plain(documents_of(tmp_path), steps=40, documents=kind, eot=0, mask_boundaries=True):
        x, y = batch["input_ids"].numpy(), batch["targets"].numpy()
        lengths = []
        for row in range(4):
            position, document = 0, 0
            for i in range(8):
                begins = i > 0 and (x[row, i - 1] == 0 if kind == "eot" else x[row, i] == 0)
                position, document = (0, document + 1) if begins else (position + (i > 0), document)
                assert batch["position_ids"][row, i] == position
                assert batch["document_ids"][row, i] == document
                lengths += [1] if position == 0 else [lengths.pop() + 1]
                if i < 7:
                    next_begins = x[row, i] == 0 if kind == "eot" else x[row, i + 1] == 0
                    assert y[row, i] == (-100 if next_begins else x[row, i + 1])
        assert batch["cu_seqlens"].dtype == torch.int32
        assert batch["cu_seqlens"].tolist() == [0, *np.cumsum(lengths)]
        assert batch["max_seqlen"] == max(lengths)


def test_documents_change_nothing_else(tmp_path):
    data = documents_of(tmp_path)
    for got, expected in zip(plain(data, documents="eot", eot=0), plain(data), strict=True):
        assert torch.equal(got["input_ids"], expected["input_ids"])
        assert torch.equal(got["targets"], expected["targets"])


def test_the_device_prefetcher_moves_the_same_batches(data):
    with MixLoader(data, 4, 8, max_steps=6, dtype=torch.int32) as loader:
        moved = list(DevicePrefetcher(loader, "cpu"))
    for got, expected in zip(moved, plain(data), strict=True):
        assert got["input_ids"].dtype == torch.int64
        assert torch.equal(got["input_ids"], expected["input_ids"])
        assert torch.equal(got["targets"], expected["targets"])
        assert torch.equal(got["domain_ids"], expected["domain_ids"])
        assert got["step"] == expected["step"]


def test_a_change_of_weights_is_not_late_behind_the_device_prefetcher(data):
    with MixLoader(data, 4, 8, weights=[1, 0]) as loader:
        batches = DevicePrefetcher(loader, "cpu")
        for step in range(30):
            domain = step % 2
            assert loader.set_weights(np.eye(2)[domain]) == step
            state = loader.state_dict()
            assert state["step"] == step, "a batch that is copied ahead is not drawn"
            assert set(next(batches)["domain_ids"].tolist()) == {domain}


@pytest.mark.parametrize("options", [{"eot": 70_000}, {"eot": 50, "vocab_size": 50}])
def test_an_end_of_text_that_cannot_occur_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match="no document would ever end"):
        MixLoader(documents_of(tmp_path), 4, 8, documents="eot", **options)


@pytest.mark.parametrize("options", [{"eot": -1}, {"eot": "x"}, {"eot": 1.5}, {"vocab_size": 2**70}, {"vocab_size": 0}])
def test_ids_that_are_no_ids_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="expected an integer"):
        MixLoader(documents_of(tmp_path), 4, 8, **options)
