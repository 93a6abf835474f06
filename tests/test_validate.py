"""`python -m mixloader.agent.validate`: policies in episodes after those of the split, compared with the first."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from collecting import Here, tiny_split, write_corpora

from mixloader.agent import collect as collecting
from mixloader.agent import validate as validating
from mixloader.agent.collect import collect
from mixloader.agent.collection import Collection
from mixloader.agent.data_card import pack_collection
from mixloader.agent.episode import draw_episode, draw_played
from mixloader.agent.network import load_parameters, save_parameters
from mixloader.agent.policy import SHIPPED
from mixloader.agent.split import Split
from mixloader.agent.trajectories import read_trajectories
from mixloader.agent.trajectory import Trajectory
from mixloader.agent.validate import (
    Played,
    main,
    read_policies,
    summary,
    table,
    validate,
    validation_numbers,
)
from mixloader.compare.suite import make_entries
from mixloader.errors import ConfigError, StateError
from mixloader.files import sole_user
from mixloader.record import read_record

pytest.importorskip("tokenizers")

HALF = {"policy": "fields", "options": {"source": 0.5}}
FIRST = tiny_split().episodes


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(autouse=True, scope="module")
def in_process():
    threads, usual = torch.get_num_threads(), collecting.make_workers
    collecting.make_workers = validating.make_workers = Here
    yield
    collecting.make_workers = validating.make_workers = usual
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def collection(corpora, tmp_path_factory):
    """The folder of a collection with one episode."""
    out = tmp_path_factory.mktemp("collection")
    assert collect(tiny_split(), corpora, out, range(1), show=False) == []
    return out


def play(corpora, out, policies, episodes=2):
    numbers = validation_numbers(tiny_split(), "only", episodes)
    played, failed = validate(tiny_split(), corpora, out, make_entries(policies), numbers, show=False)
    assert failed == []
    return played


def runs(out):
    """The records of what was played, by behaviour."""
    folders = [path.parent for path in out.glob("validation/*/cell.json")]
    return [
        (json.loads((folder / "episode.json").read_text()), read_record(folder / "record.jsonl")) for folder in folders
    ]


# What is played


def test_validation_episodes_are_drawn_like_those_of_the_split_and_are_none_of_them():
    split = Split.load()
    numbers = validation_numbers(split, "maths", 24)
    assert numbers[:4] == [384, 385, 386, 388]
    assert len(numbers) == 24
    assert validation_numbers(split, "code", 2) == [387, 391]
    for number in numbers:
        same = draw_episode(dataclasses.replace(split, episodes=number + 1, **raw(split)), number)
        assert draw_played(split, number) == dataclasses.replace(same, prior="half")
        assert same.fold == "maths"
    assert validation_numbers(split, "maths", 3, 2) == [2, 4, 5]
    assert draw_played(split, 4) == dataclasses.replace(draw_episode(split, 4), prior="half")
    with pytest.raises(ConfigError, match="no episode is of fold 'arts'; expected one of code, maths"):
        validation_numbers(split, "arts", 2)
    with pytest.raises(ConfigError, match="0 episodes are asked for"):
        validation_numbers(split, "maths", 0)


def raw(split):
    """What Split made objects of, as the plain values it is made with."""
    return {
        "folds": {name: vars(fold) for name, fold in split.folds.items()},
        "corpora": {name: vars(corpus) for name, corpus in split.corpora.items()},
        "episode": vars(split.episode),
    }


@pytest.mark.slow
def test_policies_meet_the_same_episodes_from_a_half_and_get_the_signals_they_use(corpora, collection):
    played = play(corpora, collection, {"half": HALF, "natural": None, "influence": None})
    for own in played.values():
        assert [one.number for one in own] == [FIRST, FIRST + 1]
    found = {(drawn["behaviour"]["label"], drawn["number"]): (drawn, record) for drawn, record in runs(collection)}
    assert len(found) == 6
    for number in (FIRST, FIRST + 1):
        drawn = draw_played(tiny_split(), number)
        for name in played:
            episode, record = found[name, number]
            assert {**episode, "behaviour": None, "schedule": None} == {
                **drawn.to_json(), "behaviour": None, "schedule": None,
            }  # fmt: skip
            assert record.header["seed"] == number
            assert any(event["event"] == "feedback" for event in record.events)
            assert ("influence" in record.header) == (name == "influence")
            source = np.array([own == "source" for own in record.header["fields"]])
            target = np.array([own == "target" for own in record.header["fields"]])
            prior = np.array(record.header["prior"], dtype=float)
            assert prior[source].sum() == pytest.approx(prior[target].sum(), rel=1e-3)
        options = found["influence", number][1].header["policy"]["options"]
        assert options["preference"] == drawn.preference
    assert Collection(tiny_split(), collection).finished() == [0], "none of them is one to learn from"


def test_what_was_played_is_read_from_its_folder(corpora, collection):
    played = play(corpora, collection, {"half": HALF})["half"]
    for folder in (path.parent for path in collection.glob("validation/*/cell.json")):
        trajectory = Trajectory.from_episode(folder)
        if trajectory.meta["behaviour"] != "half":
            continue
        one = next(one for one in played if one.number == trajectory.meta["number"])
        assert one == Played.read(folder)
        own = trajectory.preference
        assert one.fall == pytest.approx(-(own * one.source_change + (1 - own) * one.target_change))
        assert one.fall == trajectory.gain()
        assert 0.2 < one.source_read < 0.7


@pytest.mark.slow
def test_what_is_there_is_not_played_again_and_a_changed_file_of_parameters_is(corpora, collection, tmp_path):
    file = tmp_path / "agent.safetensors"
    file.write_bytes(SHIPPED.read_bytes())
    policies = {"half": HALF, "mine": {"policy": "agent", "options": {"parameters": str(file)}}}
    first = play(corpora, collection, policies)
    times = {path: path.stat().st_mtime_ns for path in collection.glob("validation/*/record.jsonl")}
    assert play(corpora, collection, policies) == first
    assert {path: path.stat().st_mtime_ns for path in collection.glob("validation/*/record.jsonl")} == times
    other = tmp_path / "elsewhere.safetensors"
    file.rename(other)
    policies["mine"]["options"]["parameters"] = str(other)
    assert play(corpora, collection, policies) == first
    assert len(list(collection.glob("validation/*/record.jsonl"))) == len(times), "content counts, not the path"
    weights = load_parameters(other)
    save_parameters(weights._replace(head_weight=-weights.head_weight), other)
    again = play(corpora, collection, policies)
    assert again["half"] == first["half"]
    assert again["mine"] != first["mine"]
    assert len(list(collection.glob("validation/*/record.jsonl"))) == len(times) + 2


def test_a_collection_that_works_is_left_alone_unless_a_base_is_missing(corpora, collection, tmp_path):
    with sole_user(collection, "collection"):
        play(corpora, collection, {"half": HALF})
    with sole_user(tmp_path, "collection"), pytest.raises(StateError, match="another collection works in"):
        play(corpora, tmp_path, {"half": HALF})
    with pytest.raises(StateError, match="episodes of another split"):
        validate(tiny_split(seed=6), corpora, collection, make_entries({"half": HALF}), [FIRST])


# What is said of it


def one(number, fall, **more):
    values = {"source_read": 0.5, "source_change": 0.1, "target_change": -0.5}
    return Played("folder", number, fall, **{**values, "policy_errors": 0, **more})


def test_policies_are_compared_with_the_first_episode_by_episode():
    found = summary({
        "half": [one(8, 1.0), one(9, 2.0), one(10, 3.0)],
        "mine": [one(8, 1.5), one(10, 3.1, policy_errors=2)],
        "none": [],
    })  # fmt: skip
    assert found["half"]["fall"] == 2.0
    assert found["half"]["difference"] == {}
    mine = found["mine"]
    assert mine["difference"] == pytest.approx({"mean": 0.3, "error": 0.2, "worst": 0.1, "worst_number": 10})
    assert mine["fall"] == pytest.approx(2.3), "over its own episodes"
    text = table(found).splitlines()
    assert text[0].startswith("| policy")
    assert "+0.3000 ± 0.2000" in text[3]
    assert "+0.1000 (10)" in text[3]
    assert "mine ‡2" in text[3]
    assert text[4].replace(" ", "") == "|none|0|||||||", "nothing is known"


# The command


def test_the_command_prints_a_table_and_writes_it(corpora, collection, tmp_path, capsys):
    split = tmp_path / "split.yaml"
    split.write_text(yaml.safe_dump(json.loads(json.dumps(vars(tiny_split()), default=vars))))
    policies = tmp_path / "policies.yaml"
    policies.write_text(yaml.safe_dump({"half": HALF, "natural": None}))
    asked = ["--policies", str(policies), "--corpora", str(corpora), "--out", str(collection), "--episodes", "2"]
    assert main([str(split), *asked]) == 0
    printed = capsys.readouterr().out
    assert "| natural | 2 " in printed
    written = json.loads((collection / "validation" / "table.json").read_text())
    assert written["numbers"] == [FIRST, FIRST + 1]
    assert written["split"] == tiny_split().digest
    assert [one["number"] for one in written["policies"]["natural"]["played"]] == [FIRST, FIRST + 1]
    falls = [[one["fall"] for one in written["policies"][name]["played"]] for name in ("natural", "half")]
    difference = np.subtract(*falls).mean()
    assert written["policies"]["natural"]["difference"]["mean"] == pytest.approx(difference)
    assert f"{difference:+.4f} ± " in printed


def test_episodes_of_the_split_that_are_played_again_are_packed_and_others_are_not(corpora, collection, tmp_path):
    policies, file = tmp_path / "policies.yaml", tmp_path / "all.zst"
    policies.write_text(yaml.safe_dump({"half": HALF}))
    split = tmp_path / "split.yaml"
    split.write_text(yaml.safe_dump(json.loads(json.dumps(vars(tiny_split()), default=vars))))
    asked = [str(split), "--policies", str(policies), "--corpora", str(corpora), "--out", str(collection)]
    assert main([*asked, "--episodes", "1", "--first", "0"]) == 0
    assert main([*asked, "--episodes", "1"]) == 0
    card = pack_collection(Collection(tiny_split(), collection), file)
    packed = read_trajectories(file)
    assert {one.meta["number"] for one in packed} <= set(range(tiny_split().episodes))
    again = [one for one in packed if (one.meta["number"], one.meta["behaviour"]) == (0, "half")]
    assert len(again) == 1
    assert again[0].meta["split_digest"] == tiny_split().digest
    assert f"- {len(packed)} trajectories, " in card.read_text()
    assert "of them are of episodes that were played again" in card.read_text()


def test_policies_that_cannot_be_played_are_refused(tmp_path):
    path = tmp_path / "policies.yaml"
    for text, message in (
        ("", "names no policy"),
        ("half: {policy: nobody}", "nobody"),
        ("half: {polcy: fields}", "unknown key polcy; the nearest known key is policy"),
        ("doremi: {prepare: {by: reference, option: reference_losses}}", "policies.doremi has prepare"),
        ("fields: {train: {steps: 4}}", "policies.fields has train"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_policies(path)
