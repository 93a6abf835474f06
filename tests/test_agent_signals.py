"""What the agent makes of influence, feedback and the model's size, and how it does without them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from agent_runs import Run, make_table, measured, noisy_losses, permuted, save_random
from corpora import tagged_domains
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import train

from mixloader import Guards, Manifest, Mixer, MixLoader
from mixloader.agent.action import RATE
from mixloader.agent.feature_maker import FeatureMaker
from mixloader.agent.features import DOMAIN_FEATURES, GLOBAL_FEATURES, OF_SIGNALS
from mixloader.agent.memory import FEEDBACK_HORIZON, INFLUENCE_HORIZON
from mixloader.agent.network import SetNetwork, load_parameters, save_parameters
from mixloader.agent.policy import SHIPPED, Agent
from mixloader.compare.runner import signals_of
from mixloader.errors import ConfigError, StateError
from mixloader.observation import DomainTable

OF_DOMAIN = {name: i for i, name in enumerate(DOMAIN_FEATURES)}
OF_RUN = {name: i for i, name in enumerate(GLOBAL_FEATURES)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights that reads all features and answers to each of them."""
    torch.manual_seed(3)
    network = SetNetwork(hidden=16)
    with torch.no_grad():
        network.out_weight.mul_(10)
        network.head_weight.mul_(30)
    return save_random(tmp_path_factory.mktemp("weights") / "all.safetensors", network)


def table_of(fields, prior=None):
    n_domains = len(fields)
    prior = np.full(n_domains, 1 / n_domains) if prior is None else np.asarray(prior)
    names = tuple(chr(ord("a") + d) for d in range(n_domains))
    return DomainTable(names, tuple(fields), (None,) * n_domains, np.full(n_domains, 10**6), prior)


class Seen:
    """Features of a run of which only signals are of interest: losses and weights stay as they are."""

    def __init__(self, table, preference=0.5, steps=100, model_size=None, weights=None, **options):
        self.run = Run(table, steps, lambda p: np.full(len(table), 3.0), parameters=SHIPPED)
        self.run.weights = table.prior if weights is None else weights
        self.maker = FeatureMaker(**options)
        self.maker.reset(table, preference, model_size)

    def see(self, **signals):
        domain, run = self.maker.see(self.run.observe(**measured(**signals)))
        return (
            {name: domain[:, i].astype(float) for name, i in OF_DOMAIN.items()},
            {name: float(run[i]) for name, i in OF_RUN.items()},
        )


def test_influence_is_one_gradient_for_both_fields_on_one_scale():
    """Hand-worked: I, its balanced gradient g and the mean over the mixture, over one root mean square."""
    influence = np.array([[3.0, 0.2], [1.0, -0.4], [-0.5, 0.6]])
    prior = np.array([0.6, 0.3, 0.1])
    seen = Seen(table_of(["source", "source", "target"], prior), 0.25, weights=np.array([0.5, 0.2, 0.3]))
    domain, run = seen.see(influence=influence, std=0.1)
    balanced = 0.25 * influence[:, 0] + 0.75 * influence[:, 1]
    # Prior inside each field, the fields alike.
    of_fields = [(0.6 * 9.04 + 0.3 * 1.16) / 0.9, 0.61]
    scale = np.sqrt(np.mean(of_fields))
    advantage = balanced - np.array([0.5, 0.2, 0.3]) @ balanced
    np.testing.assert_allclose(domain["gain"], np.arcsinh(balanced / scale), rtol=1e-5)
    np.testing.assert_allclose(domain["gain_long"], np.arcsinh(balanced / scale), rtol=1e-5)
    np.testing.assert_allclose(domain["gain_source"], np.arcsinh(influence[:, 0] / scale), rtol=1e-5)
    np.testing.assert_allclose(domain["gain_target"], np.arcsinh(influence[:, 1] / scale), rtol=1e-5)
    np.testing.assert_allclose(domain["advantage"], np.arcsinh(advantage / scale), rtol=1e-5)
    own_scale = np.sqrt(np.mean([(0.6 * balanced[0] ** 2 + 0.3 * balanced[1] ** 2) / 0.9, balanced[2] ** 2]))
    np.testing.assert_allclose(domain["advantage_relative"], np.arcsinh(advantage / own_scale), rtol=1e-5)
    error = 0.1 * np.hypot(0.25, 0.75)
    np.testing.assert_allclose(domain["gain_signal"], np.arcsinh(balanced / error), rtol=1e-5)
    np.testing.assert_allclose(domain["advantage_signal"], np.arcsinh(advantage / error), rtol=1e-5)
    np.testing.assert_array_equal(domain["has_influence"], 1)
    now = np.array([0.5, 0.2, 0.3]) @ influence / scale
    np.testing.assert_allclose([run["source_gain"], run["target_gain"]], np.arcsinh(now), rtol=1e-5)
    assert run["source_influence"] == run["target_influence"] == pytest.approx(1)
    spread = np.sqrt(np.array([0.5, 0.2, 0.3]) @ advantage**2)
    assert run["advantage_spread"] == pytest.approx(np.arcsinh(spread / scale), rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), exponent=st.floats(-80, 80), missing=st.floats(0, 0.9))
def test_the_unit_of_influence_does_not_matter(seed, exponent, missing):
    rng = np.random.default_rng(seed)
    table = make_table(5, seed)
    plain, scaled = Seen(table), Seen(table)
    for _ in range(3):
        influence = np.where(rng.random((5, 2)) < missing, np.nan, rng.normal(size=(5, 2)))
        std = rng.uniform(0.01, 2, (5, 2))
        a = plain.see(influence=influence, std=std)
        b = scaled.see(influence=influence * 10**exponent, std=std * 10**exponent)
    for ours, theirs in zip(a, b, strict=True):
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n_domains=st.integers(2, 12), told=st.booleans())
def test_two_halves_of_a_domain_are_seen_as_the_whole_is(seed, n_domains, told):
    rng = np.random.default_rng(seed)
    table = make_table(n_domains, seed)
    twice = [*range(n_domains), n_domains - 1]
    half = np.array([1] * (n_domains - 1) + [2] * 2)
    split = DomainTable(
        (*table.names, "half"), tuple(table.fields[i] for i in twice), (None,) * (n_domains + 1),
        table.tokens[twice] // half, table.prior[twice] / half,
    )  # fmt: skip
    mixture = rng.dirichlet(np.ones(n_domains)) * 0.9 + 0.1 / n_domains
    whole, halves = Seen(table, weights=mixture), Seen(split, weights=mixture[twice] / half)
    for i in range(4):
        influence = rng.normal(size=(n_domains, 2))
        feedback = {"source": 3 - 0.1 * i, "target": rng.uniform(2, 3)} if told else {}
        signals = {"std": 0.3, "feedback": feedback}
        (a, run_a), (b, run_b) = (
            whole.see(influence=influence, **signals), halves.see(influence=influence[twice], **signals)
        )  # fmt: skip
    for name in list(OF_DOMAIN)[OF_DOMAIN["has_influence"] :]:
        np.testing.assert_allclose(a[name][twice], b[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name in list(OF_RUN)[OF_RUN["source_influence"] :]:
        assert run_a[name] == pytest.approx(run_b[name], rel=1e-4, abs=1e-5), name


def test_noisy_snapshots_of_influence_count_less_in_the_average():
    seen = Seen(table_of(["source", "target"]))
    for influence, std in (([[1.0, 0], [0, 0]], 0.05), ([[-1.0, 0], [0, 0]], 5.0)):
        domain, _ = seen.see(influence=influence, std=std)
    assert domain["gain"][0] < 0 < domain["gain_long"][0]
    # By hand: weights 1 / (relative error^2 + 0.05^2), one hundredth of the run apart.
    keep = np.exp(-0.01 / INFLUENCE_HORIZON)
    first, second = keep / (0.05**2 + 0.05**2), 1 / (25 + 0.05**2)
    average = (first - second) / (first + second)
    assert seen.maker.state.influence[3, 0, 0] / seen.maker.state.influence[4, 0, 0] == pytest.approx(average)


def test_the_spread_over_few_rows_is_not_taken_for_certainty():
    influence = [[1.0, 0.3], [0.2, 0.9]]
    signals = [
        Seen(table_of(["source", "target"])).see(influence=influence, std=0.1, rows=rows)[0]["gain_signal"]
        for rows in (10**9, 4, 1)
    ]
    error = 0.1 * np.hypot(0.5, 0.5)
    np.testing.assert_allclose(np.sinh(signals[0]), np.array([0.65, 0.55]) / error, rtol=1e-5)
    np.testing.assert_allclose(np.sinh(signals[1]), np.sinh(signals[0]) * np.sqrt(3 / 4), rtol=1e-5)
    # Of one row nothing is known: its error may be as large as the largest entry.
    np.testing.assert_allclose(np.sinh(signals[2]), np.array([0.65, 0.55]) / np.hypot(0.5, 0.5), rtol=1e-5)


def test_old_influence_fades():
    seen = Seen(table_of(["source", "target"]), steps=40)
    path = [seen.see(influence=[[1.0, 0.5], [0.2, 2.0]]) for _ in range(2)]
    path += [seen.see() for _ in range(30)]
    for name in ("has_influence", "gain", "advantage", "gain_signal"):
        sizes = np.abs([domain[name] for domain, _ in path[1:]])
        assert (np.diff(sizes, axis=0) < 0).all(), name
        np.testing.assert_allclose(sizes[-1] / sizes[0], np.exp(-30 / 40 / 0.25), rtol=1e-4)
    assert path[-1][1]["target_influence"] < 0.1
    # An old measurement that only now is told of counts as old.
    late, _ = Seen(table_of(["source", "target"]), steps=40).see(influence=[[1.0, 0.5], [0.2, 2.0]], age=10)
    np.testing.assert_allclose(late["has_influence"], np.exp(-10 / 40 / 0.25), rtol=1e-4)


def test_a_field_that_was_not_measured_is_left_out():
    table = table_of(["source", "source", "target"])
    influence = np.array([[1.0, 3.0], [2.0, 1.0], [-1.0, 2.0]])
    only = np.where([False, True], influence, np.nan)
    a, run_a = Seen(table, preference=0.9).see(influence=only)
    b, _ = Seen(table, preference=0.9).see(influence=influence[:, 1:], fields=("target",))
    for name in OF_DOMAIN:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert np.argmax(a["gain"]) == 0
    np.testing.assert_array_equal(a["gain_source"], 0)
    assert run_a["source_influence"] == 0 < run_a["target_influence"]
    # The order of the fields is that of their names, and others do not matter.
    shuffled = np.hstack([influence[:, ::-1], 9 * influence[:, :1]])
    c, _ = Seen(table).see(influence=shuffled, fields=("target", "source", "other"))
    d, _ = Seen(table).see(influence=influence)
    np.testing.assert_array_equal(c["gain"], d["gain"])


def test_feedback_is_told_as_change_excess_and_slope():
    seen = Seen(table_of(["source", "source", "target"]), steps=100)
    first = {"source": 3.0, "b": 2.5, "target": 4.0}
    seen.see(feedback=first)
    domain, run = seen.see()
    assert run["source_feedback"] == pytest.approx(np.exp(-0.01 / 0.2))
    assert run["source_change"] == run["target_worse"] == 0
    np.testing.assert_allclose(domain["has_feedback"], [0, np.exp(-0.01 / 0.2), 0], rtol=1e-5)
    seen.see(feedback={**first, "target": 3.5})
    domain, run = seen.see(feedback={"source": 3.2, "b": 2.7, "target": 3.6})
    assert run["source_change"] == pytest.approx(np.arcsinh(10 * 0.2), rel=1e-5)
    assert run["target_change"] == pytest.approx(-np.arcsinh(10 * 0.4), rel=1e-5)
    assert run["target_worse"] == pytest.approx(np.arcsinh(10 * 0.1), rel=1e-5)
    np.testing.assert_allclose(domain["feedback_change"], [0, np.arcsinh(10 * 0.2), 0], rtol=1e-5)
    # The running average has moved to the newest by 1 - exp(-tokens between / horizon).
    assert run["source_trend"] == pytest.approx(np.arcsinh(20 * 0.2 * np.exp(-0.01 / FEEDBACK_HORIZON)), rel=1e-5)


def test_what_was_told_once_is_taken_once():
    """Feedback stays in the observations, with its age; a second reading would move the running average."""
    once, again = (Seen(table_of(["source", "target"])) for _ in range(2))
    for step in range(6):
        value = 3.0 if step < 3 else 2.0
        once.see(feedback={"source": value} if step in (0, 3) else {})
        again.see(feedback={"source": value}, feedback_age=1 + step % 3)
    np.testing.assert_array_equal(once.maker.state.feedback, again.maker.state.feedback)


def test_the_mean_of_its_domains_stands_in_for_a_field_of_which_nothing_was_told():
    table = table_of(["source", "source", "source", "target"])
    by_domain, by_field = Seen(table), Seen(table)
    for a, b in ((3.0, 2.0), (3.1, 2.1), (3.1, 2.1)):
        _, ours = by_domain.see(feedback={"a": a, "b": b})
        _, theirs = by_field.see(feedback={"source": (a + b) / 2})
    for name in ("source_feedback", "source_change", "source_worse", "source_trend"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert ours[name] != 0
        assert ours[name.replace("source", "target")] == 0
    _, both = by_domain.see(feedback={"source": 5.0, "a": 3.3})
    assert both["source_change"] == 0, "what is told of the field itself comes first"


def test_the_size_of_the_model_is_told_if_it_is_known():
    assert Seen(make_table(3)).see()[1]["has_size"] == 0
    _, run = Seen(make_table(3), model_size=4e7).see()
    assert (run["has_size"], run["log_size"]) == (1, pytest.approx(np.log10(40), rel=1e-6))


finite = st.floats(-1e6, 1e6)
strange = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e300, -1e300, 1e-300])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), n_domains=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_features_are_finite_and_weights_between_floor_and_cap_whatever_comes(weights, data, n_domains, seed):
    table = make_table(n_domains, seed)
    number, told = st.one_of(finite, strange), st.one_of(st.floats(0, 20), st.just(np.nan))
    names = [*table.names, "source", "target", "stranger"]

    def signals(p):
        some = data.draw(st.booleans())
        grid = st.lists(number, min_size=2 * n_domains, max_size=2 * n_domains)
        return {
            "influence": np.reshape(data.draw(grid), (n_domains, 2)) if some else None,
            "std": np.abs(np.reshape(data.draw(grid), (n_domains, 2))) if some else 0.1,
            "age": data.draw(st.integers(0, 50)),
            "feedback": data.draw(st.dictionaries(st.sampled_from(names), told)),
            "feedback_age": data.draw(st.integers(0, 3)),
        }

    run = Run(table, 8, seed=seed, signals=signals, parameters=weights, model_size=1e9)
    maker = FeatureMaker()
    maker.reset(table, 0.5, 1e9)
    for _ in range(5):
        before, observation = run.weights, run.observe()
        domain, common = maker.see(observation)
        assert np.isfinite(domain).all()
        assert np.isfinite(common).all()
        run.weights = run.agent.decide(observation)
        assert abs(run.weights.sum() - 1) < 1e-9
        assert (run.weights >= 0.1 * table.prior * (1 - 1e-9)).all()
        assert (run.weights <= np.maximum(0.95, table.prior) * (1 + 1e-9)).all()
        assert np.abs(np.log(run.weights / before)).max() <= 2 * min(RATE / 8, 1) + 1e-9


def planted(n_domains, seed):
    """Signals that differ between domains, of which some are missing now and then."""
    rng = np.random.default_rng(seed)
    base, walk = rng.normal(size=(n_domains, 2)), rng.normal(0, 0.2, (200, n_domains, 2)).cumsum(0)
    probed = rng.random(n_domains) < 0.6

    def at(p, order=slice(None)):
        i = round(p * 100)
        influence = np.where(np.isnan(base) | (i < 3), np.nan, base + walk[i])[order] if i % 5 else None
        told = {f"d{d}": 3 + walk[i, d, 0] for d in np.flatnonzero(probed)} if i % 4 == 0 else {}
        return {
            "influence": influence, "std": np.abs(walk[i + 1])[order] + 0.1, "age": i % 3,
            "feedback": told | ({"target": 2 + walk[i, 0, 1]} if i % 7 == 0 else {}),
        }  # fmt: skip

    return at


@settings(deadline=None, max_examples=15)
@given(n_domains=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_permuting_the_domains_permutes_the_weights_bit_for_bit(weights, n_domains, seed):
    table = make_table(n_domains, seed)
    order = np.random.default_rng(seed).permutation(n_domains)
    paths, signals = noisy_losses(n_domains, 30, seed), planted(n_domains, seed)
    run = Run(table, 30, lambda p: paths[round(p * 30)], signals=signals, parameters=weights)
    other = Run(
        permuted(table, order), 30, lambda p: paths[round(p * 30)][order], signals=lambda p: signals(p, order),
        parameters=weights,
    )  # fmt: skip
    for _ in range(12):
        np.testing.assert_array_equal(other.advance(1), run.advance(1)[order])


def test_two_halves_of_a_domain_get_about_what_the_whole_gets(weights):
    table, signals, paths = make_table(8, 12), planted(8, 12), noisy_losses(8, 60, 3)
    twice = [*range(8), 7]
    half = np.array([1] * 7 + [2] * 2)
    split = DomainTable(
        (*table.names, "half"), tuple(table.fields[i] for i in twice), (None,) * 9,
        table.tokens[twice] // half, table.prior[twice] / half,
    )  # fmt: skip

    def of_halves(p):
        told = signals(p, twice)
        same = {"half": told["feedback"]["d7"]} if "d7" in told["feedback"] else {}
        return told | {"feedback": told["feedback"] | same}

    whole = Run(table, 60, lambda p: paths[round(p * 60)], signals=signals, parameters=weights)
    halves = Run(split, 60, lambda p: paths[round(p * 60)][twice], signals=of_halves, parameters=weights)
    apart, gone = [], []
    for _ in range(30):
        a, b = whole.advance(1), halves.advance(1)
        np.testing.assert_allclose(b[7], b[8], rtol=1e-9)
        apart.append(np.abs(np.append(b[:7], b[7] + b[8]) - a).sum() / 2)
        gone.append(np.abs(a - table.prior).sum() / 2)
    # Not exact: counts of domains, and means over those of a field, are features, too.
    assert max(gone) > 0.2
    assert max(apart) < 0.25 * max(gone)


def test_signals_move_the_weights_and_can_be_turned_off(weights):
    """The ablations: with a signal off, the path is bit for bit that of a run in which it never came."""
    table, signals = make_table(6, 1), planted(6, 1)

    def path(on, **options):
        def some(p):
            return {k: v for k, v in signals(p).items() if k in on or k in ("std", "age")}

        return Run(table, 60, signals=some, parameters=weights, **options).advance(30)

    both = path({"influence", "feedback"})
    without_influence = path({"influence", "feedback"}, use_influence=False)
    without_feedback = path({"influence", "feedback"}, use_feedback=False)
    np.testing.assert_array_equal(without_influence, path({"feedback"}))
    np.testing.assert_array_equal(without_feedback, path({"influence"}))
    assert np.abs(both - without_influence).max() > 1e-3
    assert np.abs(both - without_feedback).max() > 1e-3


@pytest.mark.parametrize("every", [2, 4])
def test_deciding_less_often_leaves_nearly_the_same_path(weights, every):
    table = make_table(6, 8)
    base = np.random.default_rng(4).normal(size=(6, 2))

    def signals(p):
        # Told at fixed places of the run, however often decisions come.
        told = np.floor(p * 12 + 1e-9) / 12
        return {
            "influence": base + 0.5 * p, "std": 0.3,
            "feedback": {"source": 3 + 0.2 * told, "target": 3 - told, "d3": 2 - 0.5 * told},
            "feedback_age": round((p - told) * 192),
        }  # fmt: skip

    options = {"losses": lambda p: np.full(6, 3.0 - p), "signals": signals, "parameters": weights}
    often, seldom = Run(table, 192, **options), Run(table, 192, every=every, **options)
    apart, gone = [], []
    for _ in range(192 // 16):
        a, b = often.advance(16), seldom.advance(16 // every)
        apart.append(np.abs(a - b).sum() / 2)  # total variation
        gone.append(np.abs(a - table.prior).sum() / 2)
    assert max(gone) > 0.2, "the path must go somewhere for the comparison to mean anything"
    assert max(apart) < 0.2 * max(gone)


def test_state_round_trip_with_all_signals_is_bitwise_exact(weights):
    table, signals = make_table(16, 5), planted(16, 5)
    first, second = (Run(table, 60, signals=signals, parameters=weights, model_size=1e8) for _ in range(2))
    first.advance(21)
    text = json.dumps(first.agent.state_dict(), allow_nan=False)
    assert len(text) <= 6000
    second.agent.load_state_dict(json.loads(text))
    second.weights, second.seen, second.done = first.weights, first.seen, first.done
    for _ in range(20):
        np.testing.assert_array_equal(first.advance(1), second.advance(1))


def test_a_domain_added_in_mid_run_begins_anew_and_the_others_go_on():
    table = table_of(["source", "source", "target"])
    more = dataclasses.replace(
        table_of(["source", "source", "target", "target"]), prior=np.array([0.25, 0.25, 0.25, 0.25])
    )
    influence = np.array([[1.0, 0.2], [0.3, 0.4], [-0.2, 2.0]])
    grown, same = Seen(table), Seen(table)
    for i in range(10):
        for seen in (grown, same):
            seen.run.losses = lambda p: 3.0 + np.arange(3) * p
            seen.see(influence=influence, feedback={"a": 3 + 0.1 * i, "target": 3 - 0.1 * i})
    grown.maker.extend(more)
    before = same.maker.state
    after = grown.maker.state
    np.testing.assert_array_equal(after.losses[:, :3], before.losses)
    np.testing.assert_array_equal(after.influence[:, :, :3], before.influence)
    np.testing.assert_array_equal(after.feedback[:, [0, 1, 2, 4, 5]], before.feedback)
    grown.run.table, grown.run.weights = more, np.array([0.3, 0.3, 0.3, 0.1])
    grown.run.seen, grown.run.losses = np.append(grown.run.seen, 0), lambda p: np.array([3.0, 3 + p, 3 + 2 * p, 5.0])
    domain, run = grown.see(influence=np.vstack([influence, [np.nan, np.nan]]), feedback={"d": 4.0})
    np.testing.assert_array_equal(domain["has_loss"], 1)
    np.testing.assert_allclose(domain["has_influence"], [1, 1, 1, 0])
    assert domain["excess_first"][2] > 0.5
    assert domain["excess_first"][3] == domain["feedback_change"][3] == 0 < domain["has_feedback"][3]
    assert run["target_change"] == pytest.approx(-np.arcsinh(10 * 0.9), rel=1e-5)


@pytest.mark.parametrize("guards", [None, Guards(deadline_s=60.0)])
def test_a_run_that_grew_resumes_exactly(tmp_path, weights, guards):
    data = Manifest.open(tagged_domains(tmp_path / "data", {"web": [700], "code": [400], "math": [300]}))
    two = dataclasses.replace(data, domains=data.domains[:2])
    fields = [
        dataclasses.replace(domain, field=field)
        for domain, field in zip(two.domains, ("source", "target"), strict=True)
    ]
    two = dataclasses.replace(two, domains=tuple(fields))
    states, ends = [], []

    def begin(loader):
        return Mixer(loader, "agent", parameters=weights, token_budget=1200, guards=guards)

    with MixLoader(two, 4, 8, seed=3, num_workers=0) as loader, begin(loader) as mixer:
        train(loader, mixer, 5)
        mixer.feedback({"source": 3.0, "web": 2.0})
        train(loader, mixer, 8)
        mixer.state_dict()  # waits for the decisions under way
        known = mixer.policy._maker.state.losses.copy()
        mixer.add_domain("math", [shard.path for shard in data.domain("math").shards], 0.25)
        np.testing.assert_array_equal(mixer.policy._maker.state.losses[:, :2], known)
        train(loader, mixer, 14)
        manifest = loader.manifest
        states.append(json.loads(json.dumps((loader.state_dict(), mixer.state_dict()))))
        train(loader, mixer, 24)
        ends.append((loader.state_dict(), mixer.state_dict()))
    with MixLoader(manifest, 4, 8, seed=3, num_workers=0) as loader, begin(loader) as mixer:
        loader.load_state_dict(states[0][0])
        mixer.load_state_dict(states[0][1])
        train(loader, mixer, 24)
        ends.append((loader.state_dict(), mixer.state_dict()))
    assert ends[0] == ends[1]


def test_it_goes_on_with_more_domains_only():
    agent = Agent()
    agent.reset(table_of(["source", "target"]))
    with pytest.raises(StateError, match=r"cannot go on with domains d0, d1, d2 after a, b"):
        agent.extend(make_table(3))


def test_a_larger_model_and_missing_signals_are_not_strange_to_it(weights):
    """Only what is out of the range of training leads back to the prior: neither a large model, nor what is missing."""
    parameters = load_parameters(weights)
    table, signals = make_table(6, 2), planted(6, 2)
    low, high = parameters.low.copy(), parameters.high.copy()
    names = parameters.features
    low[names.index("log_size")], high[names.index("log_size")] = -0.5, 0.5
    for name in ("gain", "source_change", "has_influence", "source_influence"):
        low[names.index(name)] = high[names.index(name)] = 0.9
    path = weights.with_name("narrow.safetensors")
    save_parameters(parameters._replace(low=low, high=high), path)

    def far(**options):
        run = Run(table, 60, parameters=path, **options)
        return np.abs(np.log(run.advance(20) / table.prior)).max()

    assert far(model_size=1e12) > 0.2
    assert far(signals=signals) < 1e-6, "source_change is out of range"


def test_what_it_uses_is_what_its_weights_read(weights, tmp_path):
    assert signals_of(Agent()) == {"loss"}
    assert Agent(parameters=weights).needs == {"loss"}
    assert signals_of(Agent(parameters=weights)) == {"loss", "influence", "feedback"}
    assert signals_of(Agent(parameters=weights, use_influence=False)) == {"loss", "feedback"}
    names = [name for name in (*DOMAIN_FEATURES, *GLOBAL_FEATURES) if name not in OF_SIGNALS["influence"]]
    save_parameters(SetNetwork(names, hidden=8, blocks=1).parameters_as_arrays(), tmp_path / "few.safetensors")
    few = load_parameters(tmp_path / "few.safetensors")
    assert few.features == names
    assert few.own_weight.shape == (1, 8, 8)
    assert signals_of(Agent(parameters=tmp_path / "few.safetensors")) == {"loss", "feedback"}


def test_weights_of_unknown_features_are_refused(tmp_path):
    from safetensors.numpy import save_file

    tensors = {k: v for k, v in load_parameters(SHIPPED)._asdict().items() if "columns" not in k}
    path = tmp_path / "odd.safetensors"
    names = load_parameters(SHIPPED).features
    for features, match in (
        (["moon", *names[1:]], r"unknown features \['moon'\]"),
        (names[:-1], "names 27 features for a network of 28 inputs"),
        (names[::-1], "another order"),
    ):
        save_file(tensors, path, metadata={"mixloader": json.dumps({"features": features})})
        with pytest.raises(StateError, match=match):
            Agent(parameters=path)
    with pytest.raises(ConfigError, match="model_size is 0"):
        Agent(model_size=0)
