"""A Mixer on many ranks: one stream, one decision, and sentences where ranks differ."""

import threading
from pathlib import Path

import pytest
import ranks_run
import torch.distributed as dist
from corpora import tagged_domains
from ranks_run import ROWS, STEPS, run

from mixloader import Manifest, MixLoader
from mixloader.errors import ConfigError, WeightsError
from mixloader.mixer import Mixer
from mixloader.record import read_record

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tagged_domains(folder, {"web": [700, 300], "code": [400], "math": [90]})
    fields = {"web": "source", "code": "source", "math": "target"}
    domains = {name: {"path": folder / name, "field": field} for name, field in fields.items()}
    Manifest.open(domains).save(folder / "manifest.json")
    return str(folder / "manifest.json")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {
        "whole": ranks_run.whole(data, folder, 0, 1),
        "seldom": ranks_run.whole(data, folder, 0, 1, every=3),
        "scripted": ranks_run.scripted(data, 0, 1),
        "objective": ranks_run.objective(data, 0, 1),
    }


@pytest.fixture(scope="module")
def four(data, one, tmp_path_factory):
    return run("four", 4, tmp_path_factory.mktemp("four"), data=data, state=one["whole"]["state"])


@pytest.fixture(scope="module")
def two(data, four, tmp_path_factory):
    states = {name: four[1][name]["state"] for name in ("whole", "seldom")}
    return run("two", 2, tmp_path_factory.mktemp("two"), data=data, states=states)


def stream(ranks, accumulation=1):
    """{step: rows} of the batches that ranks have drawn: tokens and domain of the rows of the global batch."""
    steps = {}
    size = ROWS // (len(ranks) * accumulation)
    for rank, batches in enumerate(ranks):
        for step, micro_step, tokens, domains in batches:
            rows = steps.setdefault(step, [None] * ROWS)
            first = (micro_step * len(ranks) + rank) * size
            rows[first : first + size] = zip(tokens, domains, strict=True)
    return {step: [(list(tokens), domain) for tokens, domain in rows] for step, rows in steps.items()}


def test_G2_a_scripted_mixture_gives_one_stream_on_1_and_4_ranks(one, four):
    assert stream([each["scripted"] for each in four]) == stream([one["scripted"]])
    domains = [{d for _, d in rows} for rows in stream([one["scripted"]]).values()]
    assert domains[2:] == [{0}, {1}, {2}, {0}]


def test_G2_a_live_policy_decides_the_same_on_1_2_and_4_ranks(one, two, four):
    """The losses here are exact in fixed point, so that nothing but the ranks could make a difference."""
    expected, record = stream([one["whole"]["batches"]]), read_record(one["whole"]["record"])
    assert len(record.decisions) >= STEPS - 1
    assert len({tuple(decision["weights"]) for decision in record.decisions}) > 5
    for world, accumulation in ((two, 2), (four, 1)):
        assert stream([each["whole"]["batches"] for each in world], accumulation) == expected
        found = read_record(world[0]["whole"]["record"])
        assert found.decisions == record.decisions
        assert found.changes == record.changes
        assert all(each["whole"]["weights"] == one["whole"]["weights"] for each in world)
    assert stream([each["seldom"]["batches"] for each in four]) == stream([one["seldom"]["batches"]])
    assert read_record(four[0]["seldom"]["record"]).decisions == read_record(one["seldom"]["record"]).decisions


def test_feedback_of_any_rank_counts_and_of_several_the_mean(four):
    by_step = {d["step"]: d.get("feedback", {}) for d in read_record(four[0]["whole"]["record"]).decisions}
    assert by_step[4] == {"target": 1.5}, "of the last rank only"
    assert by_step[9] == {"source": 2.0, "web": 0.75}
    assert not by_step[6]


def test_policy_and_record_are_on_rank_0_only(four, two):
    assert [each["whole"]["leads"] for each in four] == [each["whole"]["has_policy"] for each in four]
    assert [each["whole"]["leads"] for each in two] == [True, False]


def test_G3_the_state_is_the_same_on_every_rank_and_goes_on_on_another_number(one, four, two, data, tmp_path):
    for name, key in (("whole", "rest"), ("seldom", "rest of seldom")):
        states = [each[name]["state"] for each in four]
        assert all(state == one[name]["state"] for state in states), "as one process would have saved it"
        whole = stream([one[name]["batches"]])
        after = {step: rows for step, rows in whole.items() if step >= 7}
        assert stream([each[key] for each in two]) == after
        every = 3 if name == "seldom" else 1
        assert stream([ranks_run.rest(data, tmp_path, 0, 1, states[1], every)]) == after
        if name == "whole":
            assert stream([each["rest"] for each in four]) == after, "saved by one process"


def test_domains_that_come_and_go_and_skipped_steps_are_the_same_on_all_ranks(two, data):
    expected = ranks_run.changed(data, 0, 1)
    assert stream([each["changed"]["batches"] for each in two]) == stream([expected["batches"]])
    assert all(each["changed"]["weights"] == expected["weights"] for each in two)
    assert {3, 4}.isdisjoint(stream([expected["batches"]]))


def test_objective_weights_are_the_same_on_all_ranks(one, four):
    assert len(set(map(tuple, one["objective"]))) > 3
    assert all(each["objective"] == one["objective"] for each in four)


def test_ranks_of_a_mesh_that_share_rows_follow_one_decision(one, four):
    found = [each["mesh"] for each in four]
    assert [each["rank"] for each in found] == [0, 0, 1, 1]
    assert [each["leads"] for each in found] == [True, False, False, False]
    assert found[0]["batches"] == found[1]["batches"]
    assert found[2]["batches"] == found[3]["batches"]
    expected = {step: rows for step, rows in stream([one["whole"]["batches"]]).items() if step < 7}
    assert stream([found[0]["batches"], found[2]["batches"]]) == expected
    assert read_record(found[0]["record"]).decisions[:4] == read_record(one["whole"]["record"]).decisions[:4]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("seed", "RankError: the ranks differ in what they begin with: seed: 3 on rank 0, 4 on rank 1. Give all ranks"),
        ("weights", "weight of 'web' from then on: 0.33"),
        ("batch size", "batch_size: 4 on rank 0, 2 on rank 1; grad_accumulation_steps: 1 on rank 0, 2 on rank 1"),
        ("lag", "lag: 1 on rank 0, 2 on rank 1"),
        ("data", 'domains: ["web", "code"] on rank 0, ["web", "code", "math"] on rank 1'),
        ("data", "fingerprint of the data: "),
        (
            "policy",
            'policy: {"name": "natural", "options": {}} on rank 0, {"name": "uniform", "options": {}} on rank 1',
        ),
        ("by hand", "RankError: the ranks differ after plan step 2: "),
        ("bad tokens", "StatsError: bad tokens since the last snapshot: 1 in domain 1 ('code')"),
        ("state", "RankError: the ranks differ in the state that they load: digest of the state: "),
    ],
)
def test_all_ranks_say_what_differs(two, name, said):
    for each in two:
        assert said in each["errors"][name]


def test_a_hand_on_one_rank_is_named(two):
    for each in two:
        assert "step of the last change of weights: 0 on rank 0, 2 on rank 1" in each["errors"]["by hand"]
        assert "weight of 'web' from then on: 0.67" in each["errors"]["by hand"]


def test_an_error_of_one_rank_is_told_by_the_others(two):
    first, second = (each["errors"] for each in two)
    assert second["option"] == "ConfigError: decide_every is 0; expected a whole number of at least 1"
    assert first["option"].startswith(
        "RankError: rank 1 failed in what they begin with: ConfigError: decide_every is 0"
    )
    assert first["unknown"].startswith("ConfigError: unknown policy 'magic'")
    assert second["unknown"].startswith("RankError: rank 0 failed in what they begin with: ConfigError: unknown")
    assert first["reset"].startswith("WeightsError: weights have shape [1]; expected [3]")
    assert second["reset"].startswith("RankError: rank 0 failed: WeightsError: weights have shape [1]")


def test_a_policy_that_fails_keeps_the_weights_of_all_and_rank_0_warns(two):
    for each in two:
        assert each["errors"]["failing"][2:] == [[0], [1], [1], [0]], "decided after 0, 1, none, 3"
    assert [len(each["errors"]["warnings"]) for each in two] == [1, 0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_takes_the_run_and_gives_it_to_another_number_of_ranks(two, data):
    for each in two:
        assert each["saved"]["tensor"] == [7.0] * 3
        assert each["saved"]["resumed"] == each["saved"]["expected"]
    folder = Path(two[0]["whole"]["record"]).parent
    expected = stream([each["saved"]["expected"] for each in two])
    assert min(expected) == 7
    assert stream([ranks_run.resumed_alone(data, folder)]) == expected


def test_a_rank_that_dies_is_told_within_the_lag(data, tmp_path):
    (found,) = run("dies", 2, tmp_path, wait=[0], data=data)
    assert "RankError: rank 0 waited for" in found["said"]
    assert "Another rank has died or is stuck" in found["said"]
    assert found["seconds"] < 20, "far less than the timeout of the group"


def test_process_groups_that_do_not_fit_the_loader_are_refused(data, monkeypatch):
    def making(**options):
        with MixLoader(data, 4, 8, num_workers=0, **options) as loader, Mixer(loader, group=dist.group.WORLD) as mixer:
            return mixer.ranks.alone

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert making()
        with pytest.raises(ConfigError, match="loader is rank 1 of 2, but this process is rank 0 of 1 in the process"):
            making(world_size=2, rank=1)
        monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        with pytest.raises(ConfigError, match=r"on device 'cpu', and the process group takes no tensors .*cuda:nccl"):
            making()
    finally:
        dist.destroy_process_group()


def test_a_change_from_another_thread_on_many_ranks_needs_a_step(data):
    with MixLoader(data, 4, 8, world_size=2, rank=0, num_workers=0) as loader:
        next(loader)
        said = []

        def change(**options):
            try:
                loader.set_weights([1, 1, 1], **options)
            except WeightsError as error:
                said.append(str(error))

        for options in ({}, {"step": 5}):
            thread = threading.Thread(target=change, kwargs=options)
            thread.start()
            thread.join()
        loader.set_weights([1, 2, 1])
    assert len(said) == 1
    assert "say from which step on" in said[0]
