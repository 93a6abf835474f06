"""Offline fitters: planted laws come back, predictions rank unseen mixtures, and a seed fixes everything."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize
from scipy.stats import spearmanr

from mixloader.errors import ConfigError
from mixloader.fitters import FITTERS, ConvexLaw, Law, best_of, cross_validate, fit, fit_mixmin, propose, spearman
from mixloader.fitters.exponential import Exponential
from mixloader.fitters.regmix import PUBLISHED, Boosting


def simplex(seed, n, d, strength=1.0):
    return np.random.default_rng(seed).dirichlet(np.full(d, strength), n)


PLANTED = Exponential(np.array([1.5, 0.8]), np.array([[1.2, -0.7, 0.3, 0.1], [-2.0, 0.9, 0.2, 1.1]]))


@pytest.mark.parametrize("method", ["olmix", "mixing-law"])
def test_a_planted_exponential_law_comes_back(method):
    x = simplex(0, 60, 4)
    law = fit(method, x, PLANTED.predict(x))
    np.testing.assert_allclose(law.offset, PLANTED.offset, atol=1e-4)
    np.testing.assert_allclose(law.exponents, PLANTED.exponents, atol=1e-4)


def test_outliers_hardly_move_the_huber_fit():
    x = simplex(1, 120, 4)
    y = PLANTED.predict(x)
    y[::15] += 3.0  # runs that diverged
    law = fit("olmix", x, y)
    clean = simplex(2, 50, 4)
    assert np.abs(law.predict(clean) - PLANTED.predict(clean)).max() < 0.01
    assert np.abs(fit("linear", x, y).predict(clean) - PLANTED.predict(clean)).max() > 0.1


def test_a_mixing_law_has_an_offset_below_zero_where_olmix_refuses():
    x = simplex(3, 60, 4)
    y = PLANTED.predict(x) - 4.0
    np.testing.assert_allclose(fit("mixing-law", x, y).offset, PLANTED.offset - 4.0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"a loss is -.*only losses above zero"):
        fit("olmix", x, y)


def test_rows_that_a_file_rounded_are_read_as_their_shares():
    law = Exponential(np.zeros(1), np.array([[50.0, 0.0]]))
    np.testing.assert_allclose(law.predict([[0.498, 0.5]]), law.predict([[0.498 / 0.998, 0.5 / 0.998]]))
    x = simplex(22, 30, 4)
    rounded = x * np.random.default_rng(23).uniform(0.995, 1.005, (30, 1))
    np.testing.assert_allclose(fit("olmix", rounded, PLANTED.predict(x)).exponents, PLANTED.exponents, atol=1e-4)


def test_the_linear_law_is_least_squares():
    x = simplex(4, 30, 3)
    truth = np.array([2.0, -1.0, 0.5])
    law = fit("linear", x, 3.0 + x @ truth)
    fresh = simplex(5, 10, 3)
    np.testing.assert_allclose(law.predict(fresh)[:, 0], 3.0 + fresh @ truth, atol=1e-12)
    noisy = x @ truth + np.random.default_rng(6).normal(size=30)
    residual = noisy - fit("linear", x, noisy).predict(x)[:, 0]
    np.testing.assert_allclose(np.column_stack((np.ones(30), x)).T @ residual, 0.0, atol=1e-10)


def test_regmix_ranks_what_a_line_cannot():
    pytest.importorskip("lightgbm")
    x = simplex(7, 300, 3)
    y = np.abs(x[:, 0] - 0.4) + 1.0  # rises on both sides: no linear function ranks it
    law = fit("regmix", x, y, rounds=200)
    fresh = simplex(8, 200, 3)
    real = np.abs(fresh[:, 0] - 0.4)
    assert spearman(law.predict(fresh)[:, 0], real) > 0.95
    assert np.abs(law.predict(fresh)[:, 0] - real - 1).mean() < 0.02  # in the units of the losses, not their logarithm
    assert spearman(fit("linear", x, y).predict(fresh)[:, 0], real) < 0.6


def test_regmix_is_the_same_for_a_seed_and_works_from_few_runs_and_negative_losses():
    pytest.importorskip("lightgbm")
    x, fresh = simplex(9, 24, 4), simplex(10, 20, 4)
    y = -x[:, :2]
    laws = [fit("regmix", x, y, rounds=50, rate=0.1, seed=seed) for seed in (3, 3, 4)]
    first, second, other = (law.predict(fresh) for law in laws)
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert spearman(first[:, 0], -fresh[:, 0]) > 0.8
    np.testing.assert_array_equal(laws[0].predict(fresh, [1]), first[:, 1:])


def test_published_settings_are_the_notebooks():
    lightgbm = pytest.importorskip("lightgbm")
    x, fresh = simplex(11, 100, 3), simplex(12, 10, 3)
    y = np.sin(5 * x[:, 0])
    parameters = {"learning_rate": 0.01, "seed": 42, "verbosity": -1, "num_threads": 1, "min_data_in_leaf": 5}
    notebook = lightgbm.train(parameters, lightgbm.Dataset(x, y), num_boost_round=1000).predict(fresh)
    ours = fit("regmix", x, y, preset="published").predict(fresh)[:, 0]
    np.testing.assert_allclose(ours, notebook, rtol=1e-12)
    assert PUBLISHED.log_floor is None


def test_a_missing_lightgbm_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    x = simplex(20, 10, 3)
    with pytest.raises(ConfigError, match=r"needs the package lightgbm; pip install 'mixloader\[fit\]'"):
        fit("regmix", x, x)
    assert fit("linear", x, x).n_fields == 3


@pytest.mark.parametrize("method", FITTERS)
def test_every_law_predicts_chosen_losses_and_refuses_what_is_no_mixture(method):
    if method == "regmix":
        pytest.importorskip("lightgbm")
    x = simplex(13, 40, 4)
    law = fit(method, x, PLANTED.predict(x))
    assert isinstance(law, Law)
    assert (law.n_domains, law.n_fields) == (4, 2)
    assert law.kl == (0.05 if method == "olmix" else 0.0)
    np.testing.assert_allclose(law.predict(x, [1]), law.predict(x)[:, [1]], rtol=1e-12)
    for wrong in ([[0.5, 0.5]], [[0.5, 0.6, 0.0, 0.0]], [[1.5, -0.5, 0.0, 0.0]], [[np.nan, 1.0, 0.0, 0.0]]):
        with pytest.raises(ConfigError, match="mixture"):
            law.predict(wrong)


def test_a_domain_that_no_run_has_read_is_refused_and_harmless_in_a_fold():
    x = np.column_stack((simplex(21, 40, 3), np.zeros(40)))
    y = PLANTED.predict(x)
    with pytest.raises(ConfigError, match="domain 3 has weight zero in every run"):
        fit("olmix", x, y)
    unread = FITTERS["olmix"](x, y).predict([[0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(unread[0], y.mean(axis=0))


def test_mistakes_are_sentences():
    x = simplex(14, 10, 3)
    y = np.ones(10)
    with pytest.raises(ConfigError, match=r"unknown method 'regmx'; known methods are regmix, linear"):
        fit("regmx", x, y)
    with pytest.raises(ConfigError, match=r"method 'linear' cannot be fitted with settings \{'depth': 3\}"):
        fit("linear", x, y, depth=3)
    with pytest.raises(ConfigError, match=r"unknown setting 'depth' of regmix; known are rounds"):
        fit("regmix", x, y, depth=3)
    with pytest.raises(ConfigError, match=r"losses have shape \[9, 1\]; expected \[10, F\]"):
        fit("linear", x, y[:9])
    with pytest.raises(ConfigError, match=r"the losses of run 2 are \[nan\]"):
        fit("linear", x, [1, 1, np.nan, *y[:7]])
    with pytest.raises(ConfigError, match=r"row_share in \(0, 1\]"):
        Boosting(row_share=0)
    with pytest.raises(ConfigError, match="folds is 11"):
        next(cross_validate(FITTERS["linear"], x, y, folds=11))


# MixMin.


def brute_force(law, weights, steps=60):
    """The best mixture of three domains on a grid."""
    grid = [(a, b, steps - a - b) for a, b in itertools.product(range(steps + 1), repeat=2) if a + b <= steps]
    candidates = np.array(grid) / steps
    scores = law.predict(candidates) @ weights
    return candidates[scores.argmin()], scores.min()


def test_mixmin_by_hand():
    """Two texts of length 1 with P_0 = (1/2, 1/8) and P_1 = (1/8, 1/2): by symmetry half and half, loss log(16/5)."""
    law = fit_mixmin(np.log([[1 / 2, 1 / 8], [1 / 8, 1 / 2]]))
    np.testing.assert_allclose(propose(law, [0.9, 0.1]), [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(law.predict([[0.5, 0.5]]), [[np.log(16 / 5)]])


@pytest.mark.parametrize("seed", range(3))
def test_mixmin_equals_brute_force_and_scipy(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 40)
    law = fit_mixmin(rng.normal(-3, 1.5, (40, 3)) * lengths[:, None], lengths, fields=np.arange(40) % 2)
    weights = np.array([0.3, 0.7])
    ours = propose(law, np.ones(3), weights)
    value = float(law.predict(ours[None])[0] @ weights)
    near, least = brute_force(law, weights)
    assert value <= least + 1e-9
    assert np.abs(ours - near).max() < 0.05
    found = scipy_minimize(
        lambda w: law.derivatives(w, weights)[0], np.full(3, 1 / 3), jac=lambda w: law.derivatives(w, weights)[1],
        bounds=[(0, 1)] * 3, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, method="SLSQP",
        options={"ftol": 1e-12},
    )  # fmt: skip
    assert value <= found.fun + 1e-7


def test_mixmin_is_stable_where_probabilities_underflow():
    """Texts of 2,000 nats, each 1,500 likelier under one of two models: nothing overflows, each gets its share."""
    probs = np.full((8, 2), -3500.0)
    probs[:6, 0] = probs[6:, 1] = -2000.0
    np.testing.assert_allclose(propose(fit_mixmin(probs), [0.5, 0.5]), [0.75, 0.25], atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"log_probs": [[np.nan, -1.0]]},
        {"log_probs": [[-1.0, -2.0]], "lengths": [0]},
        {"log_probs": [[-1.0, -2.0]], "lengths": [1, 1]},
        {"log_probs": [[-1.0, -2.0]], "fields": [1]},
    ],
)
def test_mixmin_refuses(arguments):
    with pytest.raises(ConfigError, match="expected"):
        fit_mixmin(**arguments)


# Derivatives and cross-validation.


@pytest.mark.parametrize(
    "law",
    [
        PLANTED,
        fit("linear", simplex(15, 20, 4), simplex(16, 20, 2)),
        fit_mixmin(simplex(17, 9, 4), fields=[0, 1, 1] * 3),
    ],
    ids=["exponential", "linear", "mixmin"],
)
def test_derivatives_equal_differences(law):
    assert isinstance(law, ConvexLaw)
    weights, targets, h = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.3, 0.7]), 1e-5
    value, gradient, hessian = law.derivatives(weights, targets)
    assert value == pytest.approx(float(law.predict(weights[None])[0] @ targets))
    steps = np.eye(4) * h
    ahead, behind = ([law.derivatives(weights + sign * s, targets) for s in steps] for sign in (1, -1))
    np.testing.assert_allclose(
        gradient, [(a[0] - b[0]) / (2 * h) for a, b in zip(ahead, behind, strict=True)], atol=1e-6
    )
    np.testing.assert_allclose(
        hessian, [(a[1] - b[1]) / (2 * h) for a, b in zip(ahead, behind, strict=True)], atol=1e-5
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_spearman_equals_scipy(pairs):
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0], abs=1e-12)


def test_cross_validation_predicts_each_run_without_it():
    """A fitter that remembers knows nothing of the fold left out; and each run is left out once."""
    x = simplex(18, 23, 3)
    seen = []

    class Remembers:
        def __init__(self, mixtures):
            self.known = {tuple(row) for row in mixtures}

        def predict(self, mixtures):
            assert not self.known & {tuple(row) for row in mixtures}
            seen.extend(map(tuple, mixtures))
            return mixtures[:, :1]

    (score,) = cross_validate(lambda mixtures, losses, seed: Remembers(mixtures), x, x[:, 0], folds=4)
    assert sorted(seen) == sorted(map(tuple, x))
    assert score.spearman[0] == pytest.approx(1)
    assert score.rmse[0] == 0


def test_the_best_settings_are_those_with_the_best_weighted_rank_correlation():
    x = simplex(19, 40, 3)
    y = np.column_stack((np.exp(-3 * x[:, 0]), x[:, 1]))

    def fitter(mixtures, losses, seed, column):
        law = fit("linear", mixtures, losses)
        keep = np.zeros(2)
        keep[column] = 1.0
        return type(
            "Half", (), {"predict": lambda self, m: law.predict(m) * keep + np.arange(len(m))[:, None] * 1e-9}
        )()

    scores = list(cross_validate(fitter, x, y, [{"column": 0}, {"column": 1}]))
    assert best_of(scores, [1.0, 0.0]).settings == {"column": 0}
    assert best_of(scores, [0.0, 1.0]).settings == {"column": 1}
