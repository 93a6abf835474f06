"""locate: a row's place on disk, for steps to come and, with a record, for steps that are over."""

import numpy as np
import pytest
from corpora import tagged_domains, write_raw

from mixloader import Manifest, Mixer, MixLoader
from mixloader.cli import main
from mixloader.errors import RecordError, StateError, WeightsError
from mixloader.formats import read_tokens
from mixloader.replay import locate


@pytest.fixture
def data(tmp_path):
    return Manifest.open(tagged_domains(tmp_path, {"web": [700, 300], "code": [400], "math": [90]}))


def first_tokens(manifest, place, count):
    shards = {shard.path: shard for domain in manifest.domains for shard in domain.shards}
    return read_tokens(shards[place.shard], place.token, count).tolist()


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"sampling": "multinomial", "shuffle_shards": 1},
        {"sampling": "exact", "shuffle": False},
        {"max_epochs": 3},
        {"weights": lambda step: [1, step, 2]},
    ],
)
def test_every_row_is_where_it_was_said_to_be(data, rules):
    with MixLoader(data, 4, 8, grad_accumulation_steps=2, **rules) as loader:
        said = {}
        for _ in range(3):
            next(loader)
        if "weights" not in rules:
            loader.set_weights([1, 5, 2], step=4)
        for step in (loader.step - 1, loader.step, 5, 9):
            said |= {(step, row): loader.locate(step, row) for row in range(8)}
        for batch in loader:
            for i, row in enumerate(batch["input_ids"].tolist()):
                place = said.get((batch["step"], 4 * batch["micro_step"] + i))
                if place is not None:
                    assert first_tokens(data, place, 8) == row
                    assert place.domain == loader.names[batch["domain_ids"][i]]
            if batch["step"] == 10:
                break
        with pytest.raises(WeightsError, match="record"):
            loader.locate(3, 0)
        with pytest.raises(ValueError, match="row is 8"):
            loader.locate(20, 8)


def test_the_end_of_a_stream_is_told(data):
    with MixLoader(data, 4, 8, exhausted="stop") as loader, pytest.raises(StateError, match="ends before step 900"):
        loader.locate(900, 0)


def test_documents_and_packed_rows_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.append(rng.integers(1, 99, n), 0) for n in rng.integers(2, 30, 200)]).astype("<u2")
    data = Manifest.open({"a": write_raw(tmp_path / "a.bin", tokens)})
    with MixLoader(data, 2, 16, documents="eot", eot=0, packing="best_fit", max_steps=20) as loader:
        places = {(s, r): loader.locate(s, r) for s in range(20) for r in range(2)}
        for batch in loader:
            for r, row in enumerate(batch["input_ids"].tolist()):
                place = places[batch["step"], r]
                there = [int(token) for begin, count in place.pieces for token in tokens[begin : begin + count - 1]]
                assert there == row[: len(there)]


def test_a_record_says_where_the_rows_of_past_steps_stood(data, tmp_path):
    with MixLoader(data, 4, 8) as loader, Mixer(loader, "uniform", record=tmp_path / "r.jsonl") as mixer:
        rows = []
        for step in range(12):
            if step == 6:
                loader.set_weights([0, 0, 1])
            rows.append(next(loader)["input_ids"].tolist())
            mixer.step()
    for step in (0, 5, 6, 11):
        places = locate(tmp_path / "r.jsonl", data, step, range(4))
        assert [first_tokens(data, place, 8) for place in places] == rows[step]
    with pytest.raises(RecordError, match="steps 0 to 11"):
        locate(tmp_path / "r.jsonl", data, 12, [0])


def test_the_verb_prints_places(data, tmp_path, capsys):
    data.save(tmp_path / "manifest.json")
    with MixLoader(data, 4, 8) as loader, Mixer(loader, "uniform", record=tmp_path / "r.jsonl") as mixer:
        for _ in range(3):
            next(loader)
            mixer.step()
    assert main(["locate", str(tmp_path / "r.jsonl"), str(tmp_path), "--step", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("train_" in line and "token" in line for line in lines)
    assert main(["locate", str(tmp_path / "r.jsonl"), str(tmp_path), "--step", "2", "--row", "4"]) == 2
