"""Domains that run out, come, go and split; schedules; what is beside the stream; accounts."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from corpora import tagged_domains

from mixloader import Manifest, MixLoader
from mixloader.errors import ConfigError, ManifestError, StateError, WeightsError
from mixloader.mixture import quantize


@pytest.fixture
def data(tmp_path):
    return tagged_domains(tmp_path, {"web": [700, 300], "code": [400], "math": [90]})


def inputs_of(batches):
    return torch.stack([batch["input_ids"] for batch in batches])


def starts_of(batches, domain):
    return [
        int(row[0]) & 0xFFFFF
        for batch in batches
        for row, d in zip(batch["input_ids"], batch["domain_ids"], strict=True)
        if d == domain
    ]


# Domains that run out


def test_stop_ends_on_the_same_step_on_every_rank(data):
    lengths = []
    for rank in range(2):
        with MixLoader(data, 2, 8, world_size=2, rank=rank, weights=[1, 1, 1], exhausted="stop") as loader:
            batches = list(loader)
            assert list(loader) == [], "an end is an end"
            lengths.append(len(batches))
    # math has 11 windows and a third of four rows a step
    assert lengths[0] == lengths[1]
    assert 7 <= lengths[0] <= 9


def test_redistribute_reads_every_window_once_and_then_ends(data):
    with MixLoader(data, 4, 8, exhausted="redistribute") as loader:
        windows = loader.windows
        batches = list(loader)
        for domain, count in enumerate(windows):
            starts = starts_of(batches, domain)
            assert len(starts) == len(set(starts))
            assert count - len(starts) <= 4, "only a step that cannot be filled is left out"
        assert len(batches) == windows.sum() // 4


def test_max_epochs_caps_one_domain(data):
    with MixLoader(data, 4, 8, weights=[1, 1, 2], max_epochs={"math": 2}) as loader:
        batches = list(islice(loader, 200))
        assert len(starts_of(batches, 2)) == 22
        assert loader.weights[2] == 0.5, "what was asked for is kept"
        account = loader.accounts()["math"]
        assert account.epochs == 2
        assert account.unique_left == 0


def test_rules_that_contradict_each_other_are_refused(data):
    for options in (
        {"max_epochs": 2, "exhausted": "repeat"},
        {"max_epochs": {"maths": 2}},
        {"max_epochs": -1},
        {"sampling": "stratified"},
        {"shuffle": False, "shuffle_shards": 3},
        {"mask_boundaries": True},
        {"documents": "eot"},
        {"packing": "best_fit"},
        {"io": "uring"},
    ):
        with pytest.raises(ConfigError):
            MixLoader(data, 4, 8, **options)


# Domains that come and go


def test_a_domain_added_live_is_as_if_it_had_been_there_with_weight_zero(data):
    first = {name: data[name] for name in ("web", "code")}
    with MixLoader(data, 4, 8, weights=[0.7, 0.3, 0]) as whole, MixLoader(first, 4, 8, weights=[0.7, 0.3]) as grown:
        for loader in (whole, grown):
            loader.head = inputs_of(islice(loader, 5))
        assert whole.set_weights([0.35, 0.15, 0.5]) == 5
        assert grown.add_domain("math", data["math"], 0.5) == 5
        assert grown.names == whole.names
        assert torch.equal(whole.head, grown.head)
        assert torch.equal(inputs_of(islice(whole, 9)), inputs_of(islice(grown, 9)))
        assert whole.state_dict()["cursors"] == grown.state_dict()["cursors"]


def test_a_domain_may_be_added_between_micro_batches(data):
    first = {name: data[name] for name in ("web", "code")}
    with MixLoader(first, 4, 8, grad_accumulation_steps=3) as loader:
        whole = [next(loader)]
        assert loader.add_domain("math", data["math"], 0.99) == 1
        whole += [next(loader), next(loader)]
        assert all(int(batch["domain_ids"].max()) < 2 for batch in whole)
        assert 2 in next(loader)["domain_ids"].tolist()


def test_a_state_saved_before_a_domain_was_appended_loads_after(data):
    first = {name: data[name] for name in ("web", "code")}
    with MixLoader(first, 4, 8) as loader:
        list(islice(loader, 3))
        state = json.loads(json.dumps(loader.state_dict()))
        expected = inputs_of(islice(loader, 4))
    with MixLoader(data, 4, 8) as loader:
        loader.load_state_dict(state)
        assert loader.weights[2] == 0
        assert torch.equal(inputs_of(islice(loader, 4)), expected)
        later = loader.state_dict()
    with MixLoader(first, 4, 8) as loader, pytest.raises(StateError, match="domains"):
        loader.load_state_dict(later)


def test_a_removed_domain_keeps_its_number_and_stays_away(data):
    with MixLoader(data, 4, 8) as loader:
        list(islice(loader, 3))
        assert loader.remove_domain("web") == 3
        batches = list(islice(loader, 20))
        assert set(torch.cat([b["domain_ids"] for b in batches]).tolist()) <= {1, 2}
        with pytest.raises(WeightsError, match="removed"):
            loader.set_weights([1, 1, 1])
        loader.remove_domain("code")
        with pytest.raises(WeightsError, match="only one"):
            loader.remove_domain("math")
        state = loader.state_dict()
    with MixLoader(data, 4, 8) as loader:
        loader.load_state_dict(state)
        assert loader.removed == ("web", "code")


def test_a_split_domain_goes_on_in_parts_that_share_its_weight(data):
    with MixLoader(data, 4, 8, weights=[0.8, 0.2, 0]) as loader:
        list(islice(loader, 3))
        loader.split_domain("web", {"old": [0], "new": [1]})
        assert loader.names == ("web", "code", "math", "old", "new")
        assert np.allclose(loader.weights, [0, 0.2, 0, 0.56, 0.24], atol=1e-8)
        batches = list(islice(loader, 40))
        assert max(starts_of(batches, 3)) < 700 <= min(starts_of(batches, 4))
        with pytest.raises(ManifestError):
            loader.split_domain("math", {"a": [0], "b": [7]})


# Schedules


def test_a_function_of_the_step_sets_the_weights_of_every_step(data):
    def schedule(step):
        return {"web": 1} if step % 3 else {"code": 1}

    with MixLoader(data, 4, 8, weights=schedule) as loader:
        batches = list(islice(loader, 4))
        state = json.loads(json.dumps(loader.state_dict()))
        batches += islice(loader, 5)
    for batch in batches:
        assert set(batch["domain_ids"].tolist()) == {0 if batch["step"] % 3 else 1}
    with MixLoader(data, 4, 8, weights=schedule, num_workers=3, prefetch_factor=5) as loader:
        loader.load_state_dict(state)
        assert loader.state_dict() == state, "however far ahead the prefetch has asked the schedule"
        assert torch.equal(inputs_of(islice(loader, 5)), inputs_of(batches[4:]))


def test_weights_by_hand_end_a_schedule(data):
    with MixLoader(data, 4, 8, weights=lambda step: [1, 0, 0] if step < 100 else [0, 1, 0]) as loader:
        next(loader)
        loader.set_weights([0, 0, 1], step=3)
        domains = [set(batch["domain_ids"].tolist()) for batch in islice(loader, 9)]
        assert domains == [{0}, {0}, *[{2}] * 7]


# Beside the stream


def test_probes_and_held_out_batches_leave_the_stream_alone(tmp_path):
    folder = tmp_path / "data"
    tagged_domains(folder, {"web": [700], "code": [400]})
    (folder / "web" / "train_000.bin").rename(folder / "web" / "train_001.bin")
    tagged_domains(folder, {"web": [50]})
    (folder / "web" / "train_000.bin").rename(folder / "web" / "val_000.bin")
    with MixLoader(folder, 4, 8, max_steps=6) as loader:
        expected = inputs_of(loader)
    with MixLoader(folder, 4, 8, max_steps=6) as loader:
        rows = []
        for i, batch in enumerate(loader):
            rows.append(batch)
            probe = next(loader.probe("web", 3, seed=i))
            assert set(probe["domain_ids"].tolist()) == {1}
            assert probe["input_ids"].shape == (3, 8)
            held_out = list(loader.held_out(3))
            assert len(held_out) == len(loader.held_out(3)) == 3
        assert torch.equal(inputs_of(rows), expected)
    inputs = torch.cat([batch["input_ids"] for batch in held_out])
    targets = torch.cat([batch["targets"] for batch in held_out])
    assert [int(row[0]) for row in inputs] == list(range(0, 49, 8))
    assert targets[targets != -100].tolist() == list(range(1, 50)), "every held-out token but the first, once"


def test_a_domain_without_held_out_tokens_is_named(data):
    with MixLoader(data, 4, 8) as loader:
        assert len(loader.held_out()) == 0
        with pytest.raises(ManifestError, match="web"):
            loader.held_out(domains=["web"])


# skip and accounts


def test_skip_leaves_out_steps_and_nothing_else(data):
    with MixLoader(data, 4, 8, max_steps=20) as loader:
        expected = inputs_of(loader)
    with MixLoader(data, 4, 8, max_steps=20) as loader:
        head = list(islice(loader, 5))
        assert loader.skip(7) == 12
        assert torch.equal(inputs_of([*head, *loader]), torch.cat((expected[:5], expected[12:])))


def test_skip_is_refused_inside_a_step(data):
    with MixLoader(data, 4, 8, grad_accumulation_steps=2) as loader:
        next(loader)
        with pytest.raises(StateError, match="skip"):
            loader.skip(1)


def test_accounts_are_exact_over_skips_and_changes_of_length(data):
    rng = np.random.default_rng(0)
    read = np.zeros(3, dtype=np.int64)
    asked = np.zeros(3)

    def count(loader, steps):
        for _ in range(steps):
            weights = rng.dirichlet(np.ones(3))
            loader.set_weights(weights)
            batch = next(loader)
            read[:] += np.bincount(batch["domain_ids"].numpy(), minlength=3) * loader.seq_len
            asked[:] += quantize(weights) / 2**30 * loader.global_batch * loader.seq_len

    with MixLoader(data, 4, 8) as loader:
        count(loader, 30)
        loader.skip(3)
        count(loader, 10)
        state = loader.state_dict()
    with MixLoader(data, 2, 16) as loader:
        loader.load_state_dict(state)
        count(loader, 20)
        accounts = loader.accounts()
    assert [account.tokens for account in accounts.values()] == read.tolist()
    assert np.allclose([a.achieved for a in accounts.values()], read / read.sum())
    for account, wanted in zip(accounts.values(), asked, strict=True):
        # Skipped rows were asked for, too, and a residual carries over a change of length in rows.
        assert abs(account.requested * read.sum() - wanted) < 5 * 16


def test_a_manifest_may_grow_in_place(data, tmp_path):
    small = Manifest.open({"web": data["web"]})
    assert small.with_domain("code", data["code"]).prefix_fingerprint(1) == small.fingerprint
