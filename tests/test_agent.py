"""The learned agent: symmetries, bounds, missing signals, state, cadence, and the sense of what it does."""

import hashlib
import json
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from agent_runs import Run, make_table, noisy_losses, permuted
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mixloader.agent.action import LARGEST, RATE, act, project
from mixloader.agent.compiled import compiled
from mixloader.agent.features import DOMAIN_FEATURES, N_DOMAIN, N_GLOBAL, field_codes, make_features
from mixloader.agent.memory import new_state, update_state
from mixloader.agent.network import SetNetwork, forward, load_parameters, save_parameters
from mixloader.agent.policy import SHIPPED, Agent
from mixloader.errors import ConfigError, StateError
from mixloader.observation import DomainTable


@settings(deadline=None, max_examples=20)
@given(n_domains=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_permuting_the_domains_permutes_the_weights_bit_for_bit(n_domains, seed):
    """Exact: every sum over domains inside the agent is an integer sum, so no order can change a bit."""
    table = make_table(n_domains, seed)
    order = np.random.default_rng(seed).permutation(n_domains)
    paths = noisy_losses(n_domains, 30, seed)
    run = Run(table, 30, lambda p: paths[round(p * 30)])
    # The prior of the permuted table is taken over, not computed anew: numpy's float sums do depend on order.
    other = Run(permuted(table, order), 30, lambda p: paths[round(p * 30)][order])
    for _ in range(12):
        np.testing.assert_array_equal(other.advance(1), run.advance(1)[order])


def test_exchanging_the_observations_of_two_domains_in_mid_run_exchanges_the_response():
    table = DomainTable(
        ("a", "b", "c", "t"), ("source", "source", "source", "target"), (None,) * 4, np.full(4, 10**5), np.full(4, 0.25)
    )

    def losses(swap):
        def at(progress):
            late = max(progress - 0.3, 0.0)
            pair = [3.0 + late, 3.0 - 0.2 * late]
            return np.array([*(pair[::-1] if swap else pair), 3.0, 3.0 - progress])

        return at

    plain, swapped = Run(table, 60, losses(False)), Run(table, 60, losses(True))
    np.testing.assert_array_equal(plain.advance(18), swapped.advance(18))
    a, b = plain.advance(15), swapped.advance(15)
    np.testing.assert_array_equal(a, b[[1, 0, 2, 3]])
    assert abs(a[0] - a[1]) > 0.01, "the two domains were observed to differ, but the response did not"


def test_a_source_domain_whose_loss_rises_gets_more_than_its_twin_whose_loss_does_not():
    table = DomainTable(
        ("rises", "stays", "target"), ("source", "source", "target"), (None,) * 3, np.full(3, 10**6), np.full(3, 1 / 3)
    )
    run = Run(table, 100, lambda p: np.array([3.0 + 0.4 * min(4 * p, 1.0), 3.0, 4.0 - p]))
    path = np.array([run.advance(1) for _ in range(80)])
    assert (path[20:, 0] >= path[20:, 1]).all()
    assert path[:, 0].mean() > 1.2 * path[:, 1].mean()


def test_preference_moves_weight_between_the_fields():
    table = make_table(6, 3)
    source = np.array([field == "source" for field in table.fields])
    shares = []
    for preference in (0.05, 0.5, 0.95):
        run = Run(table, 60, lambda p: 3.0 + np.where(source, 0.3 * p, -0.7 * p), preference=preference)
        shares.append(run.advance(40)[source].sum())
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1


@settings(deadline=None, max_examples=25)
@given(n_domains=st.integers(2, 300), seed=st.integers(0, 10**6), missing=st.floats(0, 1), preference=st.floats(0, 1))
def test_weights_stay_a_mixture_between_floor_and_cap_whatever_is_missing(n_domains, seed, missing, preference):
    table = make_table(n_domains, seed)
    rng = np.random.default_rng(seed)
    run = Run(
        table,
        10,
        lambda p: rng.choice([rng.uniform(0, 12), np.nan], p=[1 - missing, missing]),
        seed,
        preference=preference,
    )
    for _ in range(10):
        before = run.weights
        weights = run.advance(1)
        assert weights.dtype == np.float64
        assert abs(weights.sum() - 1) < 1e-9
        assert (weights >= 0.1 * table.prior * (1 - 1e-9)).all()
        assert (weights <= np.maximum(0.95, table.prior) * (1 + 1e-9)).all()
        # Two logits may part by 2 * limit; renormalising and clipping add at most as much again.
        assert np.abs(np.log(weights / before)).max() <= 2 * min(RATE / 10, LARGEST) + 1e-9


def test_projection_clips_and_is_idempotent():
    prior = np.array([0.7, 0.2, 0.1])
    once = project(np.array([1e-9, 5.0, 1e-3]), prior, 0.05, 0.8)
    np.testing.assert_allclose(once, [0.035, 0.8, 0.165], rtol=1e-9)
    np.testing.assert_allclose(project(once, prior, 0.05, 0.8), once, rtol=1e-12)
    inside = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(project(3 * inside, prior, 0.05, 0.8), inside, rtol=1e-12)


def test_no_losses_at_all_still_gives_weights():
    table = make_table(5)
    run = Run(table, 20, lambda p: np.nan)
    assert np.isfinite(run.advance(15)).all()
    fresh = Agent()
    fresh.reset(table)
    assert run.agent.state_dict() == fresh.state_dict()


def test_state_round_trip_through_json_is_bitwise_exact():
    table = make_table(16, 5)
    paths = noisy_losses(16, 60, 5)
    first = Run(table, 60, lambda p: paths[round(p * 60)])
    first.advance(20)
    text = json.dumps(first.agent.state_dict(), allow_nan=False)
    assert len(text) <= 4096
    second = Run(table, 60, lambda p: paths[round(p * 60)])
    second.agent.load_state_dict(json.loads(text))
    second.weights, second.seen, second.done = first.weights, first.seen, first.done
    for _ in range(20):
        np.testing.assert_array_equal(first.advance(1), second.advance(1))


def test_state_of_another_run_is_refused():
    agent = Agent()
    agent.reset(make_table(4))
    state = agent.state_dict()
    agent.reset(make_table(5))
    with pytest.raises(StateError, match=r"this run of 5 domains"):
        agent.load_state_dict(state)


@pytest.mark.parametrize("every", [2, 4])
def test_deciding_less_often_leaves_nearly_the_same_path(every):
    table = make_table(6, 8)
    source = np.array([field == "source" for field in table.fields])

    def losses(p):
        return 3.0 + np.where(source, 0.3 * min(5 * p, 1), -0.8 * np.sqrt(p))

    often, seldom = Run(table, 192, losses), Run(table, 192, losses, every=every)
    moved = 0.0
    for _ in range(192 // 16):
        a, b = often.advance(16), seldom.advance(16 // every)
        assert np.abs(a - b).sum() / 2 < 0.03  # total variation
        moved = max(moved, np.abs(a - table.prior).sum() / 2)
    assert moved > 0.1, "the path must go somewhere for the comparison to mean anything"


def test_halves_of_a_split_domain_get_about_what_the_whole_gets():
    table = make_table(8, 12)
    twice = [*range(8), 7]
    half = np.array([1] * 7 + [2] * 2)
    tokens, prior = table.tokens[twice] // half, table.prior[twice] / half
    fields = tuple(table.fields[i] for i in twice)
    split = DomainTable((*table.names, "half"), fields, (None,) * 9, tokens, prior)
    paths = noisy_losses(8, 60, 3)
    whole = Run(table, 60, lambda p: paths[round(p * 60)])
    halves = Run(split, 60, lambda p: paths[round(p * 60)][twice])
    a, b = whole.advance(30), halves.advance(30)
    np.testing.assert_allclose(b[7], b[8], rtol=1e-9)
    # Not exact: the score is a mean over domains, so two halves rightly weigh more in it than the whole did.
    assert np.abs(np.append(b[:7], b[7] + b[8]) - a).sum() / 2 < 0.1


def test_a_domain_far_from_training_is_led_back_to_its_prior():
    table = make_table(6, 2)
    plain = Run(table, 60, seed=1)
    plain.advance(20)
    start = plain.weights
    assert np.abs(np.log(start / table.prior)).max() > 0.2
    strange = Run(table, 60, lambda p: np.where(np.arange(6) == 0, 1e9 * p, 3.0))
    strange.weights = start
    strange.advance(30)
    others = strange.weights[1:].sum() / table.prior[1:].sum()
    # Its log weight returned to the prior; the others share what is left as the network wants.
    assert abs(np.log(strange.weights[0] / table.prior[0])) < abs(np.log(others)) + 0.1


def test_a_strange_run_is_led_back_to_the_prior():
    """1e16 tokens a step are outside the range of `log_tokens`: weights return to the prior by bounded steps."""
    table = make_table(6, 2)
    run = Run(table, 60)
    run.step_tokens = 10**16
    run.weights = np.roll(table.prior, 1)
    distance = [np.abs(np.log(run.weights / table.prior)).max()]
    for _ in range(20):
        run.advance(1)
        distance.append(np.abs(np.log(run.weights / table.prior)).max())
    assert distance[1] > 0.1
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(distance))
    np.testing.assert_allclose(run.weights, table.prior, rtol=1e-6)


def test_without_a_budget_it_still_works():
    table = make_table(5, 4)
    run = Run(table, 60)
    weights = run.advance(30, progress=float("nan"))
    assert abs(weights.sum() - 1) < 1e-9
    assert np.abs(weights - table.prior).max() > 1e-3


def test_domains_set_to_zero_stay_at_zero_and_the_rest_share_what_is_left():
    table = make_table(5, 4)
    run = Run(table, 60)
    run.weights = np.array([0.0, 0.4, 0.3, 0.2, 0.1])
    weights = run.advance(10)
    assert weights[0] == 0
    assert abs(weights.sum() - 1) < 1e-9
    assert run.agent.decide(run.observe(weights=np.array([0.0, 1.0, 0, 0, 0]))) is None
    assert run.agent.decide(run.observe(tokens_since=0)) is None


def test_numba_and_torch_agree():
    rng = np.random.default_rng(0)
    parameters = load_parameters(SHIPPED)
    network = SetNetwork.of(parameters)
    for n_domains in (1, 2, 7, 100):
        domain = rng.normal(0, 1.5, (n_domains, N_DOMAIN)).astype(np.float32)
        run = rng.normal(0, 1.5, N_GLOBAL).astype(np.float32)
        weights, prior = rng.dirichlet(np.ones(n_domains), 2)
        ours = forward(domain, run, weights, prior, parameters)
        # Padding must not matter to the torch network.
        padded = torch.zeros(1, n_domains + 3, N_DOMAIN)
        padded[0, :n_domains] = torch.from_numpy(domain)
        w, q, mask = torch.zeros(3, 1, n_domains + 3)
        w[0, :n_domains], q[0, :n_domains] = torch.from_numpy(weights).float(), torch.from_numpy(prior).float()
        mask[0, :n_domains] = 1
        theirs = network(padded, torch.from_numpy(run)[None], w, q, mask.bool())[0, :n_domains].detach().numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_missing_losses_leave_their_features_at_zero():
    one = np.full(2, 0.5)
    zero = np.zeros(2, dtype=np.int64)
    domain, run = make_features(
        new_state(2),
        one,
        one,
        zero + 5,
        zero,
        zero * 0.0,
        field_codes(("source", None)),
        float("nan"),
        0.3,
        10.0,
        20.0,
        float("nan"),
    )
    loss_features = slice(DOMAIN_FEATURES.index("excess_first"), None)
    np.testing.assert_array_equal(domain[:, loss_features], 0)
    np.testing.assert_array_equal(domain[:, :2], [[1, 0], [0, 0]])
    assert run.shape == (N_GLOBAL,)


def test_compiles_without_a_place_for_the_cache(monkeypatch):
    """A read-only install without a home: numba then has no locator left and refuses `cache=True`."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])

    def double(x):
        return 2 * x

    with pytest.raises(RuntimeError, match="no locator"):
        njit(cache=True)(double)
    assert compiled(double)(4) == 8


def test_decisions_do_not_compile():
    """All is compiled at construction, for any number of domains and for read-only arrays."""
    functions = (update_state, make_features, forward, act)
    run = Run(make_table(9), signals=lambda p: {"influence": np.ones((9, 2)), "feedback": {"d1": 2.0, "source": 3.0}})
    compiled_before = [len(function.signatures) for function in functions]
    observation = run.observe()
    for array in (observation.loss.value, observation.weights, observation.seen, observation.influence.value):
        array.setflags(write=False)
    run.agent.decide(observation)
    run.weights = np.array([0, 0, 0.3, 0.3, 0.4, 0, 0, 0, 0])
    run.advance(1)
    assert [len(function.signatures) for function in functions] == compiled_before
    assert all(compiled_before)


def test_the_shipped_weights_are_the_network_s():
    parameters = load_parameters(SHIPPED)
    assert SHIPPED.stat().st_size < 300_000
    digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert digest in SHIPPED.with_name("CARD.md").read_text(), "CARD.md describes other weights than those beside it"
    assert parameters.features[:3] == ["source", "target", "log_relative_weight"]
    assert all(np.isfinite(value).all() for value in parameters)
    assert (parameters.low <= parameters.high).all()
    assert (parameters.scale > 0).all()


def test_weights_that_are_not_the_agent_s_are_refused(tmp_path):
    with pytest.raises(StateError, match=r"fit"):
        Agent(parameters=tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    with pytest.raises(StateError, match="cannot read"):
        Agent(parameters=broken)
    shipped = load_parameters(SHIPPED)
    save_parameters(shipped._replace(head_bias=np.zeros(2, dtype=np.float32)), broken)
    with pytest.raises(StateError, match="'head_bias' of shape \\(2,\\); expected \\(1,\\)"):
        Agent(parameters=broken)


def test_bad_options_and_domains_without_fields_are_refused():
    with pytest.raises(ConfigError, match="preference is 2"):
        Agent(preference=2)
    with pytest.raises(ConfigError, match="leave no room"):
        Agent(cap=0.1)
    table = make_table(2)
    with pytest.raises(ConfigError, match="no domain has a field"):
        Agent().reset(replace(table, fields=(None, None)))


def test_it_decides_in_a_thread():
    run = Run(make_table(4))
    out = []
    thread = threading.Thread(target=lambda: out.append(run.advance(1)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(out[0], Run(make_table(4)).advance(1))
