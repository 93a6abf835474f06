"""From a law to a mixture: bounds, the exact search against scipy, simulation, sampling and reuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize

from mixloader.errors import ConfigError
from mixloader.fitters import Reuse, bounds, fit, propose, sample_mixtures
from mixloader.fitters.bounds import project
from mixloader.fitters.exponential import Exponential
from mixloader.fitters.interior import kl_divergence, minimise
from mixloader.fitters.linear import Linear

LAW = Exponential(np.array([1.0, 2.0]), np.array([[-3.0, 0.5, 0.2, 0.1], [0.4, -2.0, 0.3, 0.6]]))
PRIOR = np.array([0.1, 0.2, 0.3, 0.4])


def total(law, weights, targets, kl, prior=PRIOR):
    return float(law.predict(weights[None])[0] @ targets) + kl * float(kl_divergence(weights, prior))


@st.composite
def problems(draw):
    """Bounds that some mixture meets, and a point."""
    d = draw(st.integers(2, 8))
    amounts = st.lists(st.floats(0.01, 1), min_size=d, max_size=d).map(np.array)
    inside = draw(amounts)
    inside = inside / inside.sum()
    lower = inside * draw(st.lists(st.floats(0, 1), min_size=d, max_size=d).map(np.array))
    upper = np.minimum(inside / draw(amounts), 1.0)
    zeros = draw(st.lists(st.booleans(), min_size=d, max_size=d).map(np.array))
    point = np.where(zeros & ~zeros.all(), 0.0, draw(amounts))
    return lower, upper, point


@settings(deadline=None, max_examples=100)
@given(problems())
def test_projection_is_within_bounds_and_nearest(problem):
    lower, upper, point = problem
    weights = project(np.log(np.maximum(point, 1e-300)), lower, upper)
    assert abs(weights.sum() - 1) < 1e-9
    assert (weights >= lower).all()
    assert (weights <= upper).all()
    # Nearest in KL: the ratio to the point is the same wherever no bound holds it, lower at caps, higher at floors.
    inner = (weights > lower + 1e-9) & (weights < upper - 1e-9) & (point > 0)
    if inner.any():
        ratio = weights[inner] / point[inner]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        at_cap = (weights == upper) & (point > 0) & (upper > lower)
        assert (weights[at_cap] / point[at_cap] <= ratio[0] * (1 + 1e-5)).all()


def test_caps_are_tokens_times_repetition_over_the_run():
    lower, upper = bounds(3, tokens=[10, 100, 1000], target_tokens=200, repetition=4, floor=0.05)
    np.testing.assert_allclose(upper, [0.2, 1.0, 1.0])
    np.testing.assert_allclose(lower, 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [1, 1, 1]}, "only the first is given"),
        ({"target_tokens": 5}, "only the second is given"),
        ({"tokens": [1, 1, 1], "target_tokens": 100}, r"the caps sum to 0\.12, so no mixture meets them"),
        ({"floor": 0.4}, r"the floors sum to 1\.2"),
        ({"floor": [0.5, 0, 0], "cap": 0.4}, r"the floor of domain 0 is 0\.5, above its cap of 0\.4"),
        ({"floor": [-1, 0, 0]}, "the floor of domain 0 is -1"),
        ({"cap": [1, 1]}, r"the cap has shape \[2\]"),
        ({"tokens": [1, 1, 1], "target_tokens": 0}, "target_tokens is 0"),
    ],
)
def test_bounds_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        bounds(3, **options)


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from([0.0, 0.01, 1.0]), st.integers(0, 100))
def test_the_exact_search_reaches_the_least_value(problem, kl, seed):
    """The certificate says so, and it is checked: scipy finds nothing lower."""
    lower, upper, point = problem
    rng = np.random.default_rng(seed)
    d = len(lower)
    law = Exponential(np.zeros(3), rng.normal(0, 4, (3, d)))
    targets = rng.dirichlet(np.ones(3))
    prior = np.maximum(point, 1e-3) / np.maximum(point, 1e-3).sum()
    found = minimise(lambda w: law.derivatives(w, targets), lower, upper, prior=prior, kl=kl)
    assert abs(found.weights.sum() - 1) < 1e-9
    assert (found.weights >= lower).all()
    assert (found.weights <= upper).all()
    assert found.gap <= 1e-6 * max(1.0, abs(found.value))

    def value(w):
        positive = np.maximum(w, 1e-12)
        return law.derivatives(w, targets)[0] + kl * float(positive @ np.log(positive / prior))

    start = project(np.log(prior), lower, upper)
    scipy = scipy_minimize(
        value, start, bounds=list(zip(lower, upper, strict=True)), method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    if abs(scipy.x.sum() - 1) < 1e-9:
        assert found.value <= scipy.fun + 1e-5 * max(1.0, abs(scipy.fun))


def test_olmix_proposal_by_hand():
    """One loss exp(-a w_0) with kl: at the optimum -a exp(-a w) + kl log(w q_1 / ((1 - w) q_0)) = 0."""
    law = Exponential(np.zeros(1), np.array([[-2.0, 0.0]]), kl=0.05)
    w = propose(law, [0.3, 0.7])[0]
    assert -2 * np.exp(-2 * w) + 0.05 * np.log(w * 0.7 / ((1 - w) * 0.3)) == pytest.approx(0, abs=1e-4)
    assert propose(law, [0.3, 0.7], kl=1e4)[0] == pytest.approx(0.3, abs=1e-3)
    assert propose(law, [0.3, 0.7], kl=0)[0] == pytest.approx(1, abs=1e-6)


def test_a_linear_law_fills_the_cheapest_domains_to_their_caps():
    law = Linear(np.zeros(1), np.array([[3.0, 1.0, 2.0, 4.0]]))
    np.testing.assert_allclose(propose(law, PRIOR, cap=0.4, floor=0.05), [0.15, 0.4, 0.4, 0.05], atol=1e-6)


@pytest.mark.parametrize("search", ["exact", "simulation"])
def test_proposals_keep_to_repetition_limits_and_floors(search):
    tokens = np.array([5.0, 30.0, 500.0, 400.0])
    weights = propose(
        LAW, PRIOR, [0.9, 0.1], tokens=tokens, target_tokens=100, repetition=4, floor=0.03, search=search, draws=2000
    )
    assert abs(weights.sum() - 1) < 1e-9
    assert (weights * 100 <= 4 * tokens * (1 + 1e-12)).all()
    assert (weights >= 0.03).all()
    assert weights[0] > 0.15  # what helps most is pressed against its cap of 0.2


def test_simulation_is_the_mean_of_the_best_draws():
    """RegMix's notebook, in its own three lines."""
    draws = np.random.default_rng(5).dirichlet(PRIOR, 3000)
    scores = LAW.predict(draws) @ np.array([0.5, 0.5])
    expected = draws[np.argsort(scores)[:100]].mean(axis=0)
    found = propose(LAW, PRIOR, search="simulation", kl=0, draws=3000, best=100, seed=5)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # Draws beyond a cap are moved to the nearest mixture within before they are compared.
    within = project(np.log(draws), np.zeros(4), np.full(4, 0.4))
    expected = within[np.argsort(LAW.predict(within).mean(axis=1), kind="stable")[:100]].mean(axis=0)
    found = propose(LAW, PRIOR, search="simulation", kl=0, draws=3000, best=100, seed=5, cap=0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(propose(LAW, PRIOR, search="simulation", kl=1e3, draws=3000, best=10), PRIOR, atol=0.05)


def test_simulation_comes_near_the_exact_search_and_targets_of_any_sign_are_simulated():
    targets = np.array([0.5, 0.5])
    exact = total(LAW, propose(LAW, PRIOR, kl=0.1), targets, 0.1)
    near = total(LAW, propose(LAW, PRIOR, kl=0.1, search="simulation", draws=20_000, best=10), targets, 0.1)
    assert exact <= near <= exact + 0.01
    against = propose(LAW, PRIOR, [-1.0, 0.0], draws=5000, best=10)  # the mixture that the first loss is worst at
    assert against[0] < 0.02


def test_target_weights_are_shares():
    np.testing.assert_allclose(propose(LAW, PRIOR, [2, 6]), propose(LAW, PRIOR, [0.25, 0.75]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_weights": [1.0]}, "expected 2 finite numbers, one a loss"),
        ({"target_weights": [0, 0]}, "not all zero"),
        ({"kl": -1}, "kl is -1"),
        ({"search": "best"}, "expected 'exact' or 'simulation'"),
        ({"search": "exact", "target_weights": [1, -1]}, "the exact search needs a convex law"),
        ({"search": "simulation", "best": 0}, "best is 0"),
    ],
)
def test_proposals_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        propose(LAW, PRIOR, **options)


def test_a_prior_of_zero_keeps_a_domain_out_under_kl_alone():
    prior = [0.0, 0.3, 0.3, 0.4]
    assert propose(LAW, prior, [1, 0], kl=0.05)[0] == 0
    assert propose(LAW, prior, [1, 0], kl=0)[0] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConfigError, match="give every domain a prior"):
        propose(LAW, [0.0, 0.0, 0.5, 0.5], kl=0.05, cap=0.4)
    with pytest.raises(ConfigError, match="expected 4 finite numbers >= 0"):
        propose(LAW, [1.0, 1.0])


# Sampling.


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.2, 1), min_size=4, max_size=12), st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([2e-4, 2e-3, 0.01]), st.integers(0, 99),
)  # fmt: skip
def test_samples_are_different_mixtures_on_the_grid_within_their_limits(prior, n, temperature, grid, seed):
    prior = np.array(prior) / sum(prior)
    cap = np.minimum(1.0, 4 * prior)
    mixtures = sample_mixtures(prior, n, seed=seed, temperature=temperature, grid=grid, max_usage=15, cap=cap)
    units = mixtures / grid
    assert mixtures.shape == (n, len(prior))
    assert np.abs(units - units.round()).max() < 1e-6
    assert (units.round().sum(axis=1) == round(1 / grid)).all()
    assert (mixtures <= np.minimum(15 * prior, cap) + 1e-9).all()
    assert len(np.unique(units.round(), axis=0)) == n
    np.testing.assert_array_equal(
        mixtures, sample_mixtures(prior, n, seed=seed, temperature=temperature, grid=grid, cap=cap)
    )


def test_samples_surround_the_tempered_prior_and_strength_makes_them_dense():
    prior = np.array([0.5, 0.3, 0.15, 0.05])
    wide = sample_mixtures(prior, 2000, max_usage=100)
    np.testing.assert_allclose(wide.mean(axis=0), np.sqrt(prior) / np.sqrt(prior).sum(), atol=0.03)
    sparse = sample_mixtures(prior, 500, max_strength=0.1001, grid=1e-4, max_usage=100)
    dense = sample_mixtures(prior, 500, min_strength=5.0, max_usage=100)
    assert (sparse == 0).mean() > 0.4 > 0.05 > (dense == 0).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0.3}, "1 divided by a whole number"),
        ({"max_usage": 0.5}, r"the greatest weights allowed sum to 0\.5"),
        ({"grid": 0.5, "n": 50}, "of 50 different mixtures"),
        ({"min_strength": 9.0}, "strengths in rising order"),
        ({"prior": [0.5, 0.0]}, "expected finite numbers above 0"),
    ],
)
def test_samples_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        sample_mixtures(options.pop("prior", [0.5, 0.5]), options.pop("n", 5), **options)


# Mixture reuse.

NAMES = ("web", "books", "code", "maths")
FROZEN = {"web": 3.0, "books": 1.0}


def test_reuse_by_hand():
    reuse = Reuse(NAMES, FROZEN)
    assert reuse.names == ("existing", "code", "maths")
    full = np.array([[0.3, 0.1, 0.4, 0.2]])
    np.testing.assert_allclose(reuse.collapse(full), [[0.4, 0.4, 0.2]])
    np.testing.assert_allclose(reuse.expand(reuse.collapse(full)), full)
    lower, upper = reuse.bounds(np.array([0.03, 0.02, 0.0, 0.1]), np.array([0.3, 0.2, 0.5, 1.0]))
    np.testing.assert_allclose(upper, [0.4, 0.5, 1.0])  # web's cap of 0.3 at three quarters
    np.testing.assert_allclose(lower, [0.08, 0.0, 0.1])  # books' floor of 0.02 at one quarter


def test_reuse_finds_the_best_mixture_among_those_that_keep_the_shares():
    """Fitted over three domains, the proposal equals the search over all four along the frozen direction."""
    law4 = Exponential(np.array([0.5]), np.array([[-0.5, 0.7, -1.5, -0.8]]))
    reuse = Reuse(NAMES, FROZEN)
    runs = reuse.expand(np.random.default_rng(0).dirichlet(np.ones(3), 40))
    law3 = fit("olmix", reuse.collapse(runs), law4.predict(runs))
    found = reuse.expand(propose(law3, [0.5, 0.3, 0.2], kl=0, cap=0.5)[None])[0]
    grid = np.array([(a, b, 100 - a - b) for a in range(51) for b in range(51) if 50 <= a + b <= 100]) / 100
    candidates = reuse.expand(grid)
    assert law4.predict(found[None]) <= law4.predict(candidates).min() + 1e-4
    assert found[0] == pytest.approx(3 * found[1])


@pytest.mark.parametrize(
    ("frozen", "virtual", "message"),
    [
        ({"wiki": 1.0}, "existing", "the frozen domains are wiki; expected some of web"),
        ({}, "existing", "the frozen domains are none"),
        ({"web": 1.0}, "code", "called 'code', as a domain is"),
        ({"web": -1.0}, "existing", "expected finite numbers >= 0"),
    ],
)
def test_reuse_that_cannot_be(frozen, virtual, message):
    with pytest.raises(ConfigError, match=message):
        Reuse(NAMES, frozen, virtual)


def test_runs_with_other_shares_are_refused():
    with pytest.raises(ConfigError, match=r"mixture 1 has other shares among the frozen domains, by 0\.1"):
        Reuse(NAMES, FROZEN).collapse(np.array([[0.3, 0.1, 0.4, 0.2], [0.2, 0.2, 0.4, 0.2]]))
    with pytest.raises(ConfigError, match="weight zero has a floor"):
        Reuse(NAMES, {"web": 1.0, "books": 0.0}).bounds(np.full(4, 0.01), np.ones(4))
