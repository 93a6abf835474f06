"""Mixtures: weights made integers once, where they enter."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixloader import reference
from mixloader.mixture import WEIGHT_ONE, as_fractions, quantize


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
