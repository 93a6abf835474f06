"""The surface that torch's DataLoader has: names, rules, workers, datasets."""

import copy
import json
import pickle

import pytest
import torch
from corpora import tagged_domains
from torch.utils.data import DataLoader

from mixloader import MixLoader
from mixloader.errors import MixLoaderError


@pytest.fixture
def data(tmp_path):
    return tagged_domains(tmp_path, {"web": [700, 300], "code": [400]})


def inputs_of(batches):
    return torch.stack([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize(
    "arguments",
    [
        {"drop_last": True},
        {"drop_last": False},
        {"persistent_workers": True, "num_workers": 2},
        {"in_order": True},
        {"pin_memory_device": ""},
        {"snapshot_every_n_steps": 1},
        {"timeout": 5},
        {"prefetch_factor": 2, "num_workers": 2},
    ],
)
def test_what_holds_anyway_is_taken(data, arguments):
    with MixLoader(data, 4, 8, max_steps=3, **arguments) as loader, MixLoader(data, 4, 8, max_steps=3) as plain:
        assert torch.equal(inputs_of(loader), inputs_of(plain))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sampler": range(3)}, TypeError, "set_weights"),
        ({"collate_fn": list}, TypeError, "after they are drawn"),
        ({"worker_init_fn": print}, TypeError, "threads"),
        ({"in_order": False}, TypeError, "order"),
        ({"batchsize": 3}, TypeError, "no argument"),
        ({"num_workers": 0, "prefetch_factor": 2}, ValueError, "num_workers=0"),
        ({"num_workers": 0, "persistent_workers": True}, ValueError, "num_workers=0"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_reason(data, arguments, error, message):
    with pytest.raises(error, match=message):
        MixLoader(data, 4, 8, **arguments)


def test_a_generator_gives_its_initial_seed(data):
    generator = torch.Generator().manual_seed(1234)
    torch.rand(3, generator=generator)
    with (
        MixLoader(data, 4, 8, max_steps=2, generator=generator) as a,
        MixLoader(data, 4, 8, max_steps=2, seed=1234) as b,
    ):
        assert a.seed == 1234
        assert torch.equal(inputs_of(a), inputs_of(b))


def test_without_shuffling_windows_come_as_on_disk(data):
    with MixLoader({"code": data["code"]}, 1, 8, shuffle=False, max_steps=100) as loader:
        starts = [int(batch["input_ids"][0, 0]) & 0xFFFFF for batch in loader]
    assert starts == [8 * (i % 49) for i in range(100)]


def test_iter_is_lazy_and_repeats_nothing(data):
    with MixLoader(data, 4, 8, max_steps=4) as loader, MixLoader(data, 4, 8, max_steps=4) as other:
        assert iter(loader) is iter(loader)
        first = [next(iter(loader)), next(iter(loader))]
        assert torch.equal(inputs_of([*first, *loader]), inputs_of(other))


def test_what_fixes_the_stream_cannot_be_set_later(data):
    with MixLoader(data, 4, 8) as loader:
        for name in ("batch_size", "seq_len", "seed", "world_size"):
            with pytest.raises(ValueError, match=name):
                setattr(loader, name, 3)


def test_a_loader_is_neither_pickled_nor_copied(data):
    with MixLoader(data, 4, 8) as loader:
        for copying in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="load_state_dict"):
                copying(loader)


def test_trainers_find_the_attributes_that_they_look_for(data):
    with MixLoader(data, 4, 8, pin_memory=True, num_workers=2) as loader:
        assert (loader.batch_size, loader.num_workers, loader.pin_memory, loader.drop_last) == (4, 2, True, True)
        assert loader.sampler is None
        assert loader.batch_sampler is None
        loader.set_epoch(3)
        assert isinstance(loader.dataset, torch.utils.data.IterableDataset)


def test_torchs_dataloader_passes_batches_through(data):
    with MixLoader(data, 4, 8, max_steps=5) as loader, MixLoader(data, 4, 8, max_steps=5) as plain:
        wrapped = DataLoader(loader.as_dataset(), batch_size=None)
        assert len(wrapped) == 5
        assert torch.equal(inputs_of(wrapped), inputs_of(plain))


def test_dataloader_workers_are_refused(data):
    with MixLoader(data, 4, 8, max_steps=5) as loader:
        workers = DataLoader(
            loader.as_dataset(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=30
        )
        with pytest.raises(MixLoaderError, match="num_workers=0"):
            next(iter(workers))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchdata looks at what torch calls deprecated
def test_torchdatas_stateful_dataloader_resumes_it(data):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    with MixLoader(data, 4, 8, max_steps=9) as plain:
        expected = inputs_of(plain)
    with MixLoader(data, 4, 8, max_steps=9) as loader:
        outer = stateful.StatefulDataLoader(loader.as_dataset(), batch_size=None)
        batches = iter(outer)
        head = [next(batches) for _ in range(4)]
        state = json.loads(json.dumps(outer.state_dict()))
    with MixLoader(data, 4, 8, max_steps=9) as loader:
        outer = stateful.StatefulDataLoader(loader.as_dataset(), batch_size=None)
        outer.load_state_dict(state)
        assert torch.equal(inputs_of([*head, *outer]), expected)
