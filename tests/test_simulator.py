"""The simulator: its dynamics, their derivatives, and the draws of its episodes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import RANGES, draw
from simulator_reference import DIFFERENTIABLE, tensors
from simulator_reference import held_out as reference_held_out

from mixloader.agent import episodes as drawing
from mixloader.agent.episodes import (
    Episodes,
    blank,
    mask,
    probe_weights,
    read_ranges,
    take,
)
from mixloader.agent.features import NO_FIELD, SOURCE, TARGET
from mixloader.agent.simulator import held_out, improvements, influence_now, pull_back, pull_back_all, run, score
from mixloader.errors import ConfigError


@pytest.fixture(scope="module")
def episodes():
    return draw(96, np.random.default_rng(7))


def throughout(weights, steps=32):
    return np.repeat(weights[:, None], steps, 1)


def finished(episodes, weights, steps=32):
    """Improvements of both fields at the end, on fixed weights."""
    return improvements(episodes, run(episodes, throughout(weights, steps)).held_out[:, -1])


def only(episodes, code):
    """All weight on one field, natural inside; the prior where the episode has no such field."""
    inside = np.where((episodes.field == code) & mask(episodes), episodes.tokens, 0)
    total = inside.sum(1, keepdims=True)
    return np.where(total > 0, inside / np.maximum(total, 1e-9), episodes.prior)


def both_fields(episodes):
    return (episodes.field == SOURCE).any(1) & (episodes.field == TARGET).any(1)


def wandering(episodes, steps, seed=0):
    """Weights [B, T, D] of a random walk on the simplex, with a domain at zero now and then."""
    rng = np.random.default_rng(seed)
    steps_of_log = rng.normal(0, 0.7, (len(episodes.size), steps, episodes.field.shape[1])).cumsum(1)
    weights = np.exp(steps_of_log) * mask(episodes)[:, None] * (rng.random(steps_of_log.shape) < 0.95)
    weights[..., 0] += 1e-3
    return weights / weights.sum(-1, keepdims=True)


# Draws.


def test_draws_are_mixtures_of_many_sizes_and_reproducible(episodes):
    again = draw(96, np.random.default_rng(7))
    for name, array in episodes._asdict().items():
        assert np.array_equal(array, getattr(again, name)), name
        assert np.isfinite(array).all(), name
    sizes = episodes.size
    assert 0.1 < (sizes == 2).mean() < 0.4
    assert sizes.max() >= 14
    np.testing.assert_allclose(episodes.prior.sum(1), 1)
    assert (episodes.prior[~mask(episodes)] == 0).all()
    assert (episodes.prior > 0)[mask(episodes)].all()


def test_probes_cover_a_part_of_the_domains_and_the_score_says_what_counts(episodes):
    for code in (SOURCE, TARGET):
        inside = np.where(episodes.field == code, episodes.probe, 0)
        has = (episodes.field == code).any(1)
        np.testing.assert_allclose(inside.sum(1), has)
    assert (episodes.probe[(episodes.field == NO_FIELD)] == 0).all()
    has = mask(episodes) & (episodes.field != NO_FIELD)
    assert 0.5 < (episodes.probe > 0)[has].mean() < 0.95
    both = both_fields(episodes)
    np.testing.assert_allclose(episodes.value.sum(1)[both], 1)
    for code, part in ((SOURCE, episodes.preference), (TARGET, 1 - episodes.preference)):
        of_field = episodes.field == code
        assert (of_field & (episodes.probe == 0)).any()
        expected = np.where(of_field, (part / np.maximum(of_field.sum(1), 1))[:, None], 0)
        np.testing.assert_allclose(np.where(of_field, episodes.value, 0), expected)

    field = np.array([SOURCE, SOURCE, TARGET, NO_FIELD])
    probe, value = probe_weights(field, np.array([True, False, True, False]), 0.8)
    np.testing.assert_allclose(probe, [1, 0, 1, 0])
    np.testing.assert_allclose(value, [0.4, 0.4, 0.2, 0])


def test_the_score_is_preference_times_improvements_where_all_is_probed():
    drawn = draw(32, np.random.default_rng(1))
    for b in range(32):
        drawn.probe[b], drawn.value[b] = probe_weights(drawn.field[b], drawn.field[b] != NO_FIELD, drawn.preference[b])
    losses = run(drawn, wandering(drawn, 16)).held_out
    source, target = improvements(drawn, losses)
    expected = drawn.preference[:, None] * source + (1 - drawn.preference[:, None]) * target
    np.testing.assert_allclose(score(drawn, losses), expected, atol=1e-12)


def test_ranges_are_read_and_mistakes_are_sentences(tmp_path):
    path = tmp_path / "ranges.json"
    ranges = RANGES._asdict()
    ranges["hold"] = [5.0, 5.0]
    ranges["hold_domain"] = [1.0, 1.0]
    path.write_text(json.dumps(ranges))
    drawn = drawing.draw(8, np.random.default_rng(0), read_ranges(path))
    np.testing.assert_allclose(drawn.hold[mask(drawn)], (5 * np.sqrt(drawn.size[:, None]) * mask(drawn))[mask(drawn)])
    for wrong, message in (
        ({**ranges, "hold": [5, 4]}, r"hold is \[5.0, 4.0\]"),
        ({**ranges, "hope": [0, 1]}, "unknown ranges: hope"),
        ({**ranges, "hold": 3}, "expected {name"),
        ([1], "expected {name"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=message):
            read_ranges(path)


# Dynamics.


def test_the_path_is_that_of_the_reference(episodes):
    for steps, parts in ((12, 3), (48, 1)):
        weights = wandering(episodes, steps)
        expected = reference_held_out(tensors(episodes), torch.from_numpy(weights), parts).numpy()
        inside = np.broadcast_to(mask(episodes)[:, None], expected.shape)
        np.testing.assert_allclose(run(episodes, weights).held_out[inside], expected[inside], rtol=1e-11)


def test_what_is_not_practised_is_forgotten_and_what_is_read_is_learned(episodes):
    both = both_fields(episodes)
    source_on_target, target_on_target = finished(episodes, only(episodes, TARGET))
    source_on_source, target_on_source = finished(episodes, only(episodes, SOURCE))
    # But for the domains that nothing helps, which may be a field's only one.
    assert (target_on_target > target_on_source)[both].mean() > 0.9
    assert (source_on_source > source_on_target)[both].mean() > 0.9
    # The ranges that real runs of small models showed: nats of loss, mean over a field.
    assert 0.05 < -np.median(source_on_target[both]) < 2.0
    assert 0.3 < np.median(target_on_target[both]) < 2.5


def test_full_practice_stops_all_forgetting_and_brings_back_what_was_forgotten(episodes):
    forgets = episodes._replace(gain=np.zeros_like(episodes.gain), similar=np.ones_like(episodes.similar))
    kept = run(forgets, throughout(episodes.prior)).held_out
    np.testing.assert_allclose(kept, np.broadcast_to(episodes.start[:, None], kept.shape), atol=1e-12)

    both, half = both_fields(episodes), 20
    forgets = forgets._replace(similar=episodes.similar, lr_end=np.ones_like(episodes.lr_end))
    away, back = throughout(only(episodes, TARGET), half), throughout(only(episodes, SOURCE), half)
    source, _ = improvements(forgets, run(forgets, np.concatenate([away, back], 1)).held_out)
    forgettable = both & (np.where(episodes.field == SOURCE, episodes.probe * episodes.level[..., 0], 0).sum(1) > 0)
    assert forgettable.mean() > 0.7
    assert (source[:, half] < 0)[forgettable].all()
    # Not where a probed domain has too little of its field's text to be practised.
    assert (source[:, -1] > source[:, half])[forgettable].mean() > 0.95


def test_forgetting_stays_under_its_level(episodes):
    worst = run(episodes, throughout(only(episodes, TARGET), 64)).held_out.max(1) - episodes.start
    relearned = episodes.relearn[:, None] * episodes.gain
    assert (worst <= episodes.level.sum(-1) + relearned + 1e-9)[mask(episodes)].all()


def test_repetition_caps_what_a_domain_gives(episodes):
    target, both = only(episodes, TARGET), both_fields(episodes)
    scarce, plenty = (episodes._replace(tokens=episodes.tokens * factor) for factor in (1e-3, 1e3))
    assert (finished(scarce, target)[1] < finished(plenty, target)[1])[both].mean() > 0.9
    # All that a domain of t tokens can ever teach is t * (1 + wear): its first epoch, and a geometric tail.
    alone = draw(64, np.random.default_rng(2))
    alone = alone._replace(transfer=alone.transfer * np.eye(alone.field.shape[1]), tokens=alone.tokens * 1e-3)
    learned = run(alone, throughout(alone.prior, 256)).learned[:, -1]
    at_most = alone.tokens * (1 + alone.wear[:, None]) + 2 * alone.prior / 256
    assert (learned <= at_most)[mask(alone)].all()


def test_the_path_hardly_depends_on_the_number_of_steps(episodes):
    coarse, fine = (run(episodes, throughout(episodes.prior, n)).held_out[:, -1] for n in (12, 256))
    apart = np.abs(coarse - fine)[mask(episodes)]
    assert apart.max() < 0.1
    assert apart.mean() < 0.01


def place(episodes, order):
    """The episode of `episodes` (one of them) whose domain i is domain order[i]; repeats are allowed."""
    n = len(order)
    out = blank(1, n)
    for name, array in episodes._asdict().items():
        made = getattr(out, name)
        if name in ("transfer", "similar"):
            made[0, :n, :n] = array[0][np.ix_(order, order)]
        elif array.ndim > 1:
            made[0, :n] = array[0, order]
        else:
            made[:] = array
    out.size[0] = n
    return out


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_domains_have_no_order_and_two_halves_are_the_whole(seed):
    one = draw(1, np.random.default_rng(seed))
    n = int(one.size[0])
    weights = wandering(one, 16, seed)
    before = run(one, weights).held_out[0, :, :n]
    order = np.random.default_rng(seed).permutation(n)
    after = run(place(one, order), weights[..., order]).held_out[0, :, :n]
    np.testing.assert_allclose(after, before[:, order], rtol=1e-12)

    half = np.array([*range(n), 0])  # the first domain in two halves: each half its tokens, weight, probe and value
    halved = place(one, half)
    halves = weights[..., half]
    for array in (halved.tokens, halved.probe, halved.value, halves):
        array[..., 0] /= 2
        array[..., n] /= 2
    history = run(halved, halves)
    np.testing.assert_allclose(history.held_out[0, :, : n + 1], before[:, half], rtol=1e-10)
    np.testing.assert_allclose(score(halved, history.held_out), score(one, run(one, weights).held_out), atol=1e-12)


# Derivatives.


def test_the_adjoint_is_the_derivative_that_autograd_finds(episodes):
    few = take(episodes, slice(0, 24))
    steps, rng = 12, np.random.default_rng(3)
    weights = wandering(few, steps)
    cotangent = rng.normal(size=(24, steps + 1, few.field.shape[1])) * mask(few)[:, None]
    leaves, w = tensors(few, DIFFERENTIABLE), torch.from_numpy(weights).requires_grad_()
    (reference_held_out(leaves, w, 3) * torch.from_numpy(cotangent)).sum().backward()
    history = run(few, weights)
    by_weights, by_numbers = pull_back_all(few, weights, history, cotangent)
    inside = np.broadcast_to(mask(few)[:, None], weights.shape)
    np.testing.assert_allclose(by_weights[inside], w.grad.numpy()[inside], rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(pull_back(few, weights, history, cotangent), by_weights)
    for name in DIFFERENTIABLE:
        found, expected = getattr(by_numbers, name), leaves[name].grad.numpy()
        pair = mask(few)[:, :, None] & mask(few)[:, None]
        where = pair if expected.ndim == 3 and expected.shape[-1] > 2 else mask(few)
        where = where if expected.ndim > 1 else np.ones(24, dtype=bool)
        np.testing.assert_allclose(found[where], expected[where], rtol=1e-8, atol=1e-11, err_msg=name)


def test_the_adjoint_is_that_of_finite_differences(episodes):
    weights = wandering(episodes, 40)
    rng = np.random.default_rng(0)
    direction = rng.normal(size=weights.shape)
    direction = weights * (direction - (weights * direction).sum(-1, keepdims=True))  # along the simplex

    def at(s):
        return score(episodes, run(episodes, weights + s * direction).held_out)[:, -1]

    cotangent = np.zeros((96, 41, episodes.field.shape[1]))
    cotangent[:, -1] = -episodes.value
    history = run(episodes, weights)
    found = (pull_back(episodes, weights, history, cotangent) * direction).sum((1, 2))
    step = 1e-5
    expected = (at(step) - at(-step)) / (2 * step)
    # A domain that begins its second epoch inside the step has no derivative.
    assert np.isclose(found, expected, rtol=1e-5, atol=1e-8).mean() > 0.97
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-5)


def test_torch_sees_the_same_derivative(episodes):
    weights = torch.from_numpy(wandering(episodes, 8)).requires_grad_()
    losses = held_out(episodes, weights)
    (losses.square() / 2).sum().backward()
    history = run(episodes, weights.detach().numpy())
    np.testing.assert_array_equal(losses.detach(), history.held_out)
    found = pull_back(episodes, weights.detach().numpy(), history, history.held_out)
    np.testing.assert_array_equal(weights.grad, found)


def test_influence_is_what_a_little_reading_changes(episodes):
    """Against the path itself: after half a run, one tiny step on one domain alone."""
    steps, tiny = 32, 1e-6
    weights = wandering(episodes, steps)
    history = run(episodes, weights)
    part = steps // 2
    for b in range(20):
        one = take(episodes, slice(b, b + 1))
        n = int(one.size[0])
        found = np.empty((n, 2))
        influence_now(episodes, b, history, part, found)
        state = history.learned[b, part], history.forgotten[b, part], history.read[b, part]
        for j in range(n):
            changed = rates(one, state, j, n) * tiny
            before = history.held_out[b, part, :n]
            for f, code in enumerate((SOURCE, TARGET)):
                probe = np.where(one.field[0, :n] == code, one.probe[0, :n], 0)
                expected = -(probe * (moved(one, state, changed, n) - before)).sum() / tiny
                np.testing.assert_allclose(found[j, f], expected, rtol=1e-3, atol=1e-5)


def rates(e, state, j, n):
    """Time derivatives [3, n] of learned and of both kinds of forgotten, on domain j alone, by the docstring."""
    learned, forgotten, read = (part[:n] for part in state)
    fresh = np.exp(-max(read[j] / e.tokens[0, j] - 1, 0) / e.wear[0])
    s = e.similar[0, :n, j]
    reduction = e.gain[0, :n] * (1 - (1 + learned / e.knee[0, :n]) ** -e.power[0, :n])
    level = e.level[0, :n] + np.stack([e.relearn[0] * reduction, np.zeros(n)], -1)
    falls = e.rate[0, :n] * ((1 - s)[:, None] * (level - forgotten) - (e.hold[0, :n] * s)[:, None] * forgotten)
    return np.stack([e.transfer[0, :n, j] * fresh, falls[:, 0], falls[:, 1]])


def moved(e, state, changed, n):
    learned, forgotten = state[0][:n] + changed[0], state[1][:n].sum(-1) + changed[1] + changed[2]
    return e.start[0, :n] - e.gain[0, :n] * (1 - (1 + learned / e.knee[0, :n]) ** -e.power[0, :n]) + forgotten


def test_numbers_without_a_derivative_are_left_alone(episodes):
    weights = wandering(episodes, 8)
    _, grads = pull_back_all(episodes, weights, run(episodes, weights), np.ones((96, 9, episodes.field.shape[1])))
    for name in Episodes._fields:
        assert bool(getattr(grads, name).any()) == (name in DIFFERENTIABLE), name
