"""Guards: exact projection, bounds that hold in a run, the bound on change, the deadline, and what the record says."""

import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from corpora import tagged_domains
from hypothesis import given
from hypothesis import strategies as st
from mixing import RandomWalk, Told, assert_same_batches, train

from mixloader import Manifest, MixLoader
from mixloader.errors import ConfigError, MixLoaderError
from mixloader.guards import Guards, project
from mixloader.mixer import Mixer
from mixloader.mixture import WEIGHT_ONE, as_fractions
from mixloader.observation import DomainTable
from mixloader.record import read_record
from mixloader.replay import replay

T = 8


def table(*fields):
    n = len(fields)
    names = tuple("abcdefghijklmnop"[:n])
    return DomainTable(names, fields, (None,) * n, np.full(n, 10), np.full(n, 1 / n))


# The projection


@st.composite
def problems(draw):
    """weights, low, high [D] with sum(low) <= 1 <= sum(high)."""
    n = draw(st.integers(1, 12))
    numbers = st.floats(0, 1)
    weights = np.array(draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=n, max_size=n)))
    a, b = (np.array(draw(st.lists(numbers, min_size=n, max_size=n))) for _ in range(2))
    low, high = np.minimum(a, b), np.maximum(a, b)
    if low.sum() > 1:
        low = low / low.sum() * draw(st.floats(0, 1))
    if high.sum() < 1:
        high = high + (1 - high.sum()) / n * draw(st.floats(1.001, 3))
    return weights, low, high


@given(problems())
def test_the_projection_is_a_mixture_between_the_bounds_and_idempotent(problem):
    weights, low, high = problem
    out = project(weights, low, high)
    assert abs(out.sum() - 1) < 1e-9
    assert (out >= low - 1e-9).all()
    assert (out <= high + 1e-9).all()
    assert np.allclose(project(out, low, high), out, rtol=0, atol=1e-9)


@given(problems(), st.randoms(use_true_random=False))
def test_the_projection_does_not_depend_on_the_order_of_domains(problem, random):
    order = list(range(len(problem[0])))
    random.shuffle(order)
    ours = project(*(values[order] for values in problem))
    assert np.allclose(ours, project(*problem)[order], rtol=0, atol=1e-9)


@given(problems())
def test_the_projection_is_optimal(problem):
    """The conditions of the nearest point in relative entropy: between the bounds one common ratio to the weights,
    a smaller one at caps, a greater one at floors."""
    weights, low, high = problem
    out = project(weights, low, high)
    positive = weights > 1e-25 * weights.max()
    ratio = out[positive] / weights[positive]
    at_low, at_high = out[positive] <= low[positive] + 1e-9, out[positive] >= high[positive] - 1e-9
    free = ratio[~at_low & ~at_high]
    if len(free):
        assert np.allclose(free, free[0], rtol=1e-6)
        assert (ratio[at_high & ~at_low] <= free[0] * (1 + 1e-6)).all()
        assert (ratio[at_low & ~at_high] >= free[0] * (1 - 1e-6)).all()


def test_the_projection_of_hand_worked_cases():
    free = np.zeros(3), np.ones(3)
    assert project(np.array([8.0, 1, 1]), *free).tolist() == [0.8, 0.1, 0.1]
    # The cap takes 0.3 from the first; the others, 1 : 3, share it.
    assert np.allclose(project(np.array([0.8, 0.05, 0.15]), np.zeros(3), np.full(3, 0.5)), [0.5, 0.125, 0.375])
    # A floor for one is paid in proportion; nobody is driven to zero.
    assert np.allclose(project(np.array([0.9, 0.05, 0.05]), np.array([0, 0.24, 0]), np.ones(3)), [0.72, 0.24, 0.04])
    # Weights of zero share what caps leave over, between their own bounds.
    assert np.allclose(project(np.array([1.0, 0, 0]), np.array([0, 0, 0.1]), np.array([0.4, 0.2, 1])), [0.4, 0.2, 0.4])


# Bounds


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        (Guards(floor=0.4), "the least weights of a, b, c sum to 1.2, above 1"),
        (Guards(cap=0.3), "the greatest weights of a, b, c sum to 0.9, below 1"),
        (Guards(floor={"a": 0.5}, cap=0.4), "the least weight of 'a' is 0.5, above its greatest, 0.4"),
        (Guards(floor={"x": 0.5}), "floor names 'x'; the domains are a, b, c"),
        (Guards(fields={"target": (0, 1), "other": (0, 1)}), "the field 'other', which no domain has"),
        (Guards(fields={"target": (0.5, 0.4)}), "the least weight of 'target' is 0.5, above its greatest"),
        (Guards(fields={"target": (0.6, 1), "source": (0.5, 1)}), "the least weights of source, target sum to 1.1"),
        (Guards(cap=0.4, fields={"target": (0.5, 1)}), "'target' is to have from 0.5 to 1, but its domains together"),
        (Guards(cap={"a": 0.1, "b": 0.1}, fields={"target": (0, 0.7)}), "sum to at least 0 and at most 0.9"),
    ],
)
def test_bounds_that_leave_no_mixture_are_refused_before_the_run(guards, message):
    with pytest.raises(ConfigError, match=message):
        guards.bind(table("source", "source", "target"))


@pytest.mark.parametrize(
    "values", [{"floor": -0.1}, {"cap": 2}, {"floor": {"a": float("nan")}}, {"fields": {"source": 0.5}},
               {"fields": {"source": (0, 1.5)}}, {"change": 0}, {"deadline_s": -1}, {"cap": True}],
)  # fmt: skip
def test_values_that_are_no_bounds_are_refused(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values)).removesuffix('s')}.* (is|are) .*; expected"):
        Guards(**values)


@given(problems(), st.lists(st.sampled_from(["source", "target", None]), min_size=12, max_size=12), st.floats(0.1, 0.9))
def test_fields_keep_their_share(problem, fields, share):
    weights = problem[0] if problem[0].any() else problem[0] + 1
    n = len(weights)
    domains = table(*fields[:n])
    if {"source", "target"} - set(fields[:n]):
        return
    guards = Guards(floor=0.1 / n, fields={"source": (share, share)}).bind(domains)
    out = guards.bound(weights)
    source = out[[field == "source" for field in domains.fields]].sum()
    assert abs(out.sum() - 1) < 1e-9
    assert out.min() >= 0.1 / n - 1e-9
    assert abs(source - share) < 1e-9
    assert np.allclose(guards.bound(out), out, rtol=0, atol=1e-9)


def test_a_closed_domain_gets_nothing_and_bounds_give_way():
    guards = Guards(floor=0.1, cap=0.4).bind(table("source", "source", "target"))
    assert np.allclose(guards.bound(np.array([1.0, 1, 1]), np.array([False, False, True])), [0.5, 0.5, 0])
    fields = Guards(fields={"source": (0, 0.5)}).bind(table("source", "source", "target"))
    assert np.allclose(fields.bound(np.array([1.0, 3, 1]), np.array([False, False, True])), [0.25, 0.75, 0])


def test_change_is_bounded_by_the_tokens_read():
    guards = Guards(change=0.5).bind(table("source", "target"))
    before = np.array([0.5, 0.5])
    assert np.allclose(guards.apply(np.array([1.0, 0]), before, 200_000), [0.6, 0.4])
    half = guards.apply(np.array([1.0, 0]), before, 100_000)
    assert np.allclose(guards.apply(np.array([1.0, 0]), half, 100_000), [0.6, 0.4]), "two halves are a whole"
    assert np.allclose(guards.apply(np.array([1.0, 0]), before, 10**9), [1, 0])


# In a run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return Manifest.open(tagged_domains(folder, {"web": [700, 300], "code": [400], "math": [90]}))


def open_loader(data, **options):
    return MixLoader(data, 4, T, seed=3, num_workers=0, **options)


@pytest.mark.parametrize("lag", [0, 2])
def test_guarded_weights_rule_the_stream_and_what_was_asked_is_in_the_record(data, tmp_path, lag):
    path, change = tmp_path / "record.jsonl", 1000.0
    guards = Guards(floor={"math": 0.05}, cap=0.6, change=change)

    def one_domain(observation):
        observation.weights[:] = 0  # what a policy does to its observation stays there
        return np.eye(3)[observation.step % 3]

    with open_loader(data) as loader, Mixer(loader, Told(one_domain), lag=lag, record=path, guards=guards) as mixer:
        batches = train(loader, mixer, 12)
    record = read_record(path)
    assert record.header["guards"] == {"floor": {"math": 0.05}, "cap": 0.6, "change": change}
    mixtures = [as_fractions(record.units_at(step)) for step in range(12)]
    assert max(weights.max() for weights in mixtures) <= 0.6 + 1e-6
    assert min(weights[2] for weights in mixtures) >= 0.05 - 1e-6
    moves = [0.5 * np.abs(b - a).sum() for a, b in pairwise(mixtures)]
    assert max(moves) <= change * 4 * T / 1e6 + 1e-6
    assert max(moves) > 0.9 * change * 4 * T / 1e6
    for decision in record.decisions:
        assert decision["requested"] == (np.eye(3, dtype=int)[decision["step"] % 3] * WEIGHT_ONE).tolist()
    with replay(record, data) as again:
        assert_same_batches([next(again) for _ in batches], batches)


def test_weights_between_the_bounds_are_left_alone(data, tmp_path):
    def run(path, **options):
        wanted = Told(lambda o: [0.5, 0.2 + 0.01 * (o.step % 5), 0.3 - 0.01 * (o.step % 5)], first=[0.4, 0.3, 0.3])
        with open_loader(data) as loader, Mixer(loader, wanted, record=path, **options) as mixer:
            train(loader, mixer, 8)
        return read_record(path).decisions

    guarded = run(tmp_path / "guarded.jsonl", guards=Guards(floor=0.1, cap=0.6))
    assert guarded == run(tmp_path / "free.jsonl")
    assert all("requested" not in decision for decision in guarded)


def test_the_first_weights_and_those_after_a_change_of_domains_are_guarded(data, tmp_path):
    with open_loader(data) as loader, Mixer(loader, "natural", guards=Guards(floor=0.2)) as mixer:
        assert np.allclose(loader.weights.min(), 0.2)
        train(loader, mixer, 2)
        mixer.add_domain("more", tagged_domains(tmp_path, {"more": [300]})["more"])
        assert np.allclose(loader.weights.min(), 0.2)
        mixer.remove_domain("math")
        train(loader, mixer, 6)
        assert loader.weights[2] == 0
        assert np.allclose(np.sort(loader.weights)[1], 0.2)
    with open_loader(data, weights=[98, 1, 1]) as loader, Mixer(loader, Told(lambda o: None), guards=Guards(cap=0.5)):
        assert np.allclose(loader.weights, [0.5, 0.25, 0.25])
    with open_loader(data) as loader:
        before = loader.state_dict()
        with pytest.raises(ConfigError, match=r"sum to 1\.2, above 1"):
            Mixer(loader, "natural", guards=Guards(floor=0.4))
        assert loader.state_dict() == before


def test_a_domain_past_its_epochs_gets_no_weight_and_the_caps_of_the_others_give_way(data, tmp_path):
    path = tmp_path / "record.jsonl"
    options = {"max_epochs": {"math": 1}}
    guards = Guards(floor=0.1, cap=0.4)
    with open_loader(data, **options) as loader, Mixer(loader, "uniform", guards=guards) as mixer:
        train(loader, mixer, 15)
    equal = Told(lambda o: np.ones(3))
    with open_loader(data, **options) as loader, Mixer(loader, equal, guards=guards, record=path) as mixer:
        train(loader, mixer, 15)
        assert loader.exhausted == ("math",)
    assert np.allclose(as_fractions(read_record(path).decisions[-1]["weights"]), [0.5, 0.5, 0])
    assert np.allclose(as_fractions(read_record(path).decisions[0]["weights"]), np.full(3, 1 / 3))


def test_a_guarded_run_resumes_exactly(data, tmp_path):
    guards = Guards(floor=0.1, cap=0.5, change=2000)
    with open_loader(data) as loader, Mixer(loader, RandomWalk(), guards=guards) as mixer:
        train(loader, mixer, 5)
        saved = json.loads(json.dumps([loader.state_dict(), mixer.state_dict()]))
        whole, end = train(loader, mixer, 10), mixer.state_dict()
    with open_loader(data) as loader, Mixer(loader, RandomWalk(), guards=guards) as mixer:
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        assert_same_batches(train(loader, mixer, 10), whole)
        assert mixer.state_dict() == end


# The deadline


def test_a_late_policy_keeps_the_weights_warns_once_and_is_in_the_record(data, tmp_path):
    path = tmp_path / "record.jsonl"

    go_on = {2: threading.Event(), 5: threading.Event()}

    def sometimes(observation):
        if observation.step in go_on:
            go_on[observation.step].wait()
        return np.eye(3)[observation.step % 3]

    guards = Guards(deadline_s=0.5)
    with open_loader(data) as loader, Mixer(loader, Told(sometimes), lag=0, record=path, guards=guards) as mixer:
        batches = train(loader, mixer, 2)
        with pytest.warns(RuntimeWarning, match="failed after plan step 2: TimeoutError: no answer within 0.5 s"):
            batches += train(loader, mixer, 3)
        go_on[2].set()
        batches += train(loader, mixer, 6)
        go_on[5].set()
        batches += train(loader, mixer, 8)
    record = read_record(path)
    assert [event["source"] for event in record.events if event["event"] == "policy_error"] == [2, 5]
    drawn = [set(batch["domain_ids"].tolist()) for batch in batches[1:]]
    assert drawn == [{0}, {1}, {1}, {0}, {1}, {1}, {0}], "late answers are dropped, not used late"
    with replay(record, data) as again:
        assert_same_batches([next(again) for _ in batches], batches)


def test_a_policy_that_never_returns_holds_nothing_up(data):
    forever = threading.Event()

    class Stuck(RandomWalk):
        def decide(self, observation):
            if observation.step >= 2:
                self.level += 1000
                forever.wait()
            return super().decide(observation)

    with open_loader(data) as loader:
        mixer = Mixer(loader, Stuck(), lag=0, guards=Guards(deadline_s=0.1))
        train(loader, mixer, 2)
        before = mixer.state_dict()["decider"]["policy"]
        started = time.monotonic()
        with pytest.warns(RuntimeWarning, match="no answer within 0.1 s"):
            train(loader, mixer, 4)
        assert mixer.state_dict()["decider"]["policy"] == before, "the state before the call that never ended"
        with pytest.raises(MixLoaderError, match=r"has been at one decision for more than 0\.1 s"):
            mixer.remove_domain("math")
        mixer.close()
        assert time.monotonic() - started < 10
        forever.set()


def test_within_the_deadline_a_run_is_what_it_is_without(data):
    def run(**options):
        with open_loader(data) as loader, Mixer(loader, RandomWalk(), **options) as mixer:
            return train(loader, mixer, 6), mixer.state_dict()

    (batches, state), (others, other_state) = run(), run(guards=Guards(deadline_s=30))
    assert_same_batches(batches, others)
    assert state == other_state
