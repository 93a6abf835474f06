"""Mixtures: weights made integers once, where they enter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixloader import reference
from mixloader.errors import WeightsError
from mixloader.mixture import WEIGHT_ONE, as_fractions, as_weights, grouped, quantize


@given(st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=50).filter(any))
def test_quantize_agrees_with_the_reference(weights):
    assert quantize(np.array(weights)).tolist() == reference.quantize(weights)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=50).filter(any))
def test_quantized_weights_sum_to_one_and_keep_their_order(weights):
    units = quantize(np.array(weights))
    assert units.sum() == WEIGHT_ONE
    assert (units >= 0).all()
    assert all(u == 0 for u, w in zip(units, weights, strict=True) if w == 0)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(units[order]) >= -1).all(), "a greater weight is less by a rounding at most"
    exact = np.array(weights) / max(weights)
    assert np.allclose(units / WEIGHT_ONE, exact / exact.sum(), atol=1.1 / WEIGHT_ONE)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300).filter(any))
def test_weights_read_back_and_set_again_are_the_same(weights):
    units = quantize(np.array(weights))
    assert np.array_equal(quantize(as_fractions(units)), units)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, np.nan], "domain 'b' is nan"),
        ([np.inf, 1.0], "domain 'a' is inf"),
        ([1.0, -0.5], "domain 'b' is -0.5"),
        ([0.0, 0.0], "all weights are zero"),
        ([1.0], r"shape \[1\]; expected \[2\]"),
        ({"a": 1.0, "z": 1.0}, "unknown domain 'z'"),
        (["x", 1.0], "must be numbers"),
    ],
)
def test_what_is_no_mixture_is_refused(weights, message):
    with pytest.raises(WeightsError, match=message):
        as_weights(weights, ("a", "b"))


@pytest.mark.parametrize("weights", [[np.nan], [-1.0], [np.inf], [0.0, 0.0], []])
def test_quantize_refuses_what_is_no_mixture(weights):
    with pytest.raises(WeightsError):
        quantize(np.array(weights))


def test_a_mapping_may_leave_domains_out():
    assert as_weights({"b": 2}, ("a", "b")).tolist() == [0, 2]


def test_group_weights_are_shared_within_each_group():
    names, groups = ("web", "news", "algebra", "proofs", "code"), ("text", "text", "maths", "maths", None)
    weights = grouped({"text": 5, "maths": 3, "code": 2}, names, groups)
    assert np.allclose(weights, [0.25, 0.25, 0.15, 0.15, 0.2])
    weights = grouped({"text": 1, "maths": 1}, names, groups, within=[30, 10, 0, 7, 5])
    assert np.allclose(weights, [0.375, 0.125, 0, 0.5, 0])
    weights = grouped({"text": 1e308, "maths": 1e308}, names, groups, within=[1e308] * 5)
    assert np.allclose(weights, [0.25, 0.25, 0.25, 0.25, 0])


@given(data=st.data(), domains=st.integers(1, 12))
def test_each_group_gets_its_weight(data, domains):
    names = [f"d{i}" for i in range(domains)]
    groups = data.draw(st.lists(st.sampled_from([None, "g", "h"]), min_size=domains, max_size=domains))
    own = [name if group is None else group for name, group in zip(names, groups, strict=True)]
    asked = {group: data.draw(st.floats(0.01, 1)) for group in own}
    within = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=domains, max_size=domains)))
    weights = grouped(asked, names, groups, within)
    for group, weight in asked.items():
        of_group = np.array(own) == group
        assert np.isclose(weights[of_group].sum(), weight / sum(asked.values()))
        assert np.allclose(weights[of_group] / weights[of_group].sum(), within[of_group] / within[of_group].sum())


@pytest.mark.parametrize(
    ("weights", "groups", "within", "message"),
    [
        ({"g": 1, "z": 1}, ("g", None), None, "unknown group 'z' in weights; the groups are g, b"),
        ({"g": 1, "a": 1}, ("g", None), None, "unknown group 'a'"),
        ({"g": 1, "b": 1}, ("g", None), [0, 1], "group 'g' has a weight, but none of its domains"),
        ({"b": 1}, ("b", None), None, "'b' is both a group and a domain without one"),
        ({"g": 0, "b": 0}, ("g", None), None, "all weights are zero"),
        ({"g": -1, "b": 1}, ("g", None), None, "'g' is -1"),
    ],
)
def test_group_weights_that_are_none_are_refused(weights, groups, within, message):
    with pytest.raises(WeightsError, match=message):
        grouped(weights, ("a", "b"), groups, within)
