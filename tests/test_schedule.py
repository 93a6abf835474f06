"""Schedules: pure functions of the step, checked when they are bound, described in JSON."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixloader.errors import ConfigError, WeightsError
from mixloader.mixture import WEIGHT_ONE, quantize
from mixloader.schedule import Schedule

NAMES = ("a", "b", "c")
weights = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(any)
knots = st.dictionaries(st.integers(1, 2**40), weights, max_size=4).flatmap(
    lambda later: weights.map(lambda first: {0: first, **later})
)


@given(knots=knots, step=st.integers(0, 2**41))
def test_piecewise_weights_hold_until_the_next_knot(knots, step):
    schedule = Schedule.piecewise(knots).bind(NAMES)
    expected = quantize(np.array(knots[max(s for s in knots if s <= step)]))
    assert np.array_equal(schedule.at(step), expected)
    change = schedule.next_change(step)
    assert change == min((s for s in knots if s > step), default=None)


@given(knots=knots, data=st.data())
def test_linear_weights_move_evenly_and_meet_the_knots(knots, data):
    schedule = Schedule.linear(knots).bind(NAMES)
    for step, there in knots.items():
        assert np.array_equal(schedule.at(step), quantize(np.array(there)))
    step = data.draw(st.integers(0, max(knots) + 10))
    at = schedule.at(step)
    assert at.sum() == WEIGHT_ONE
    steps = sorted(knots)
    shares = [quantize(np.array(knots[s])) / WEIGHT_ONE for s in steps]
    expected = [np.interp(step, steps, [share[i] for share in shares]) for i in range(3)]
    assert np.allclose(at / WEIGHT_ONE, expected, atol=2e-9)
    change = schedule.next_change(step)
    assert change == (None if step >= steps[-1] else step + 1)


def test_a_function_is_asked_for_the_step():
    schedule = Schedule.function(lambda step: {"a": 1, "b": step}).bind(NAMES)
    assert np.array_equal(schedule.at(3), quantize(np.array([1.0, 3.0, 0.0])))
    assert schedule.next_change(3) == 4
    assert Schedule.function(abs).describe() is None


def test_a_function_that_is_not_pure_is_refused():
    answers = iter([[1, 0, 0], [0, 1, 0]])
    with pytest.raises(ConfigError, match="two answers for step 0"):
        Schedule.function(lambda step: next(answers)).bind(NAMES)


@given(knots=knots, linear=st.booleans(), step=st.integers(0, 2**41), by_name=st.booleans())
def test_a_schedule_comes_back_from_its_description(knots, linear, step, by_name):
    if by_name:
        knots = {s: dict(zip(NAMES, w, strict=True)) for s, w in knots.items()}
    schedule = (Schedule.linear if linear else Schedule.piecewise)(knots)
    again = Schedule.from_description(json.loads(json.dumps(schedule.describe())))
    assert again.describe() == schedule.describe()
    assert np.array_equal(again.bind(NAMES).at(step), schedule.bind(NAMES).at(step))


def test_arrays_and_numpy_steps_are_described_as_plain_numbers():
    description = Schedule.linear({np.int64(0): np.array([1, 2, 3], dtype=np.float32)}).describe()
    assert json.dumps(description) == '{"kind": "linear", "knots": [[0, [1.0, 2.0, 3.0]]]}'


def test_the_weights_that_at_returns_are_the_callers():
    schedule = Schedule.piecewise({0: [1, 1, 2]}).bind(NAMES)
    schedule.at(0)[:] = 0
    assert schedule.at(0).sum() == WEIGHT_ONE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.piecewise({1: [1, 1, 1]}), "a knot at step 0"),
        (lambda: Schedule.linear({}), "a knot at step 0"),
        (lambda: Schedule.linear([[0, [1]]]), "a mapping from step to weights"),
        (lambda: Schedule.linear({0: [1], 0.5: [1]}), "stands at 0.5"),
        (lambda: Schedule.linear({0: [1], -1: [1]}), "stands at -1"),
        (lambda: Schedule.linear({0: [1], True: [1]}), "stands at True"),
        (lambda: Schedule.function([1, 2]), "expected a callable"),
        (lambda: Schedule.from_description({"kind": "function", "knots": []}), "describes no schedule"),
        (lambda: Schedule.from_description([]), "describes no schedule"),
        (lambda: Schedule.from_description({"kind": "linear", "knots": [0]}), "pairs"),
        (lambda: Schedule.from_description({"kind": "linear", "knots": [[0, [1]], [0, [2]]]}), "same step"),
    ],
)
def test_what_is_no_schedule_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_weights_that_do_not_fit_the_domains_are_refused_with_their_step():
    with pytest.raises(WeightsError, match="at step 9: unknown domain 'z'"):
        Schedule.linear({0: {"a": 1}, 9: {"z": 1}}).bind(NAMES)
    bound = Schedule.function(lambda step: [1, 1, -step]).bind(NAMES)
    with pytest.raises(WeightsError, match="at step 2: the weight of domain 'c' is -2"):
        bound.at(2)
    with pytest.raises(ValueError, match="asked for step -1"):
        bound.at(-1)
