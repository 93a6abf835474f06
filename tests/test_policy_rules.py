"""Each rule against its source's arithmetic, worked out by hand here, never by calling the code."""

import math

import numpy as np
import pytest
from mixing_worlds import observe, table_of

from mixloader.errors import ConfigError
from mixloader.policies import make_policy


def decide(name, table, observations, **options):
    """What the policy says after the last of the observations."""
    policy = make_policy(name, **options)
    policy.reset(table)
    for observation in observations:
        answer = policy.decide(observation)
    return answer


def parts(*values):
    return np.array(values) / sum(values)


# Static mixtures and schedules


def test_temperature():
    table = table_of(3, tokens=[100, 1600, 0])
    np.testing.assert_allclose(make_policy("temperature", temperature=2).reset(table), [0.2, 0.8, 0])
    np.testing.assert_allclose(make_policy("temperature", temperature=1).reset(table), parts(1, 16, 0))
    np.testing.assert_allclose(make_policy("temperature", temperature=math.inf).reset(table), [0.5, 0.5, 0])


def test_unimax_fills_like_water_up_to_the_cap_on_epochs():
    table = table_of(4, tokens=[100, 50, 1000, 400])
    # A budget of 1200 at 2 epochs: b takes 100 of 300, a 200 of 366.7, and the 900 left go evenly to c and d.
    weights = make_policy("unimax", max_epochs=2, budget=1200).reset(table)
    np.testing.assert_allclose(weights, np.array([200, 100, 450, 450]) / 1200)
    # At 1 epoch 1500 are wanted of 1550: a 100, b 50, d 400, and 950 for c. Of 3000, all are at their cap.
    np.testing.assert_allclose(make_policy("unimax", max_epochs=1, budget=1500).reset(table), parts(100, 50, 950, 400))
    np.testing.assert_allclose(make_policy("unimax", max_epochs=1, budget=3000).reset(table), parts(100, 50, 1000, 400))


def test_unimax_takes_the_budget_of_the_run():
    table = table_of(2, tokens=[10**4, 10**6])
    # Step 9 of 40: 10,000 of 40,000 tokens. a is capped at 20,000 of 40,000 by 2 epochs, at 10,000 by 1.
    half = observe([1, 1], step=9, progress=0.25)
    np.testing.assert_allclose(decide("unimax", table, [half], max_epochs=2), [0.5, 0.5])
    np.testing.assert_allclose(decide("unimax", table, [half], max_epochs=1), [0.25, 0.75])
    with pytest.raises(ConfigError, match="token_budget"):
        decide("unimax", table, [observe([1, 1])])


def test_schedules_over_steps_and_tokens():
    table = table_of(2)
    knots = {0: [1, 0], 100: [0, 1]}
    at_74 = observe([1, 1], step=72, lag=1)  # effect step 74
    np.testing.assert_allclose(decide("linear", table, [at_74], knots=knots), [0.26, 0.74], atol=1e-8)
    np.testing.assert_allclose(decide("piecewise", table, [at_74], knots=knots), [1, 0])
    in_tokens = {0: {"a": 1}, 50_000: {"b": 1}}  # 1000 tokens a step
    np.testing.assert_allclose(decide("piecewise", table, [at_74], knots=in_tokens, unit="tokens"), [0, 1])
    with pytest.raises(ConfigError, match="'steps' or 'tokens'"):
        make_policy("linear", knots=knots, unit="epochs")


def test_a_schedule_goes_on_where_it_was_when_domains_change():
    policy = make_policy("linear", knots={0: {"a": 1}, 100: {"b": 1}})
    np.testing.assert_allclose(policy.reset(table_of(2)), [1, 0])
    policy.decide(observe([1, 1], step=73))
    np.testing.assert_allclose(policy.reset(table_of(3)), [0.25, 0.75, 0], atol=1e-8)


# Excess losses


def test_doremi_one_step():
    # From even weights: excess 0.5, 0 (clipped) and 0.2; (1 - c) exp(s) / sum + c / 3.
    e = [math.exp(0.5), 1.0, math.exp(0.2)]
    expected = 0.97 * np.array(e) / sum(e) + 0.01
    references = {"a": 2.5, "b": 3.1, "c": 1.8}
    answer = decide("doremi", table_of(3), [observe([3.0, 3.0, 2.0])], reference_losses=references, floor=0.03)
    np.testing.assert_allclose(answer, expected, rtol=1e-12)


def test_doremi_takes_the_measured_excess_and_eta():
    signal = observe([9.0, 9.0], [0.25, 0.75], excess=[0.4, 0.1])
    a, b = 0.25 * math.exp(0.5 * 0.4), 0.75 * math.exp(0.5 * 0.1)
    np.testing.assert_allclose(decide("doremi", table_of(2), [signal], eta=0.5, floor=0.0), parts(a, b), rtol=1e-12)
    assert make_policy("doremi").needs == {"excess"}
    assert make_policy("doremi", reference_losses={"a": 1.0}).needs == {"loss"}


def test_doremi_average_is_over_steps():
    policy = make_policy("doremi", reference_losses={"a": 0.0, "b": 1.0}, floor=0.0)
    policy.reset(table_of(2))
    assert policy.average is None
    first = policy.decide(observe([1.0, 1.0], step=0))
    second = policy.decide(observe([1.0, 1.0], first, step=3, steps=3))
    np.testing.assert_allclose(policy.average, (first + 3 * second) / 4)


def test_dbl_is_not_clipped_and_prefers_evaluations():
    # L - L*: a 2 - 2.5 = -0.5 by the evaluation (training says 3), b 3 - 2 = 1. One update is 50 steps.
    seen = observe([3.0, 3.0], [0.6, 0.4], steps=50, step=49, feedback={"a": 2.0, "target": 9.0})
    e = np.array([0.6 * math.exp(-0.5), 0.4 * math.exp(1.0)])
    expected = (1 - 1e-4) * e / e.sum() + 1e-4 / 2
    answer = decide("dbl", table_of(2), [seen], target_losses={"a": 2.5, "b": 2.0})
    np.testing.assert_allclose(answer, expected, rtol=1e-12)
    with pytest.raises(ConfigError, match="'x', which is no domain"):
        make_policy("dbl", target_losses={"x": 1.0}).reset(table_of(2))


def test_velocitune():
    # Way: a from 4 to 2, now 3: a half left. b from 3 to 2.5, now 2.25: done, 0. c risen over its start: 1.
    first = observe([4.0, 3.0, 3.0], steps=50, step=49)
    later = observe([3.0, 2.25, 3.5], [0.5, 0.3, 0.2], steps=50, step=99)
    targets = {"a": 2.0, "b": 2.5, "c": 1.0}
    expected = parts(0.5 * math.exp(0.5), 0.3, 0.2 * math.exp(1.0))
    np.testing.assert_allclose(decide("velocitune", table_of(3), [first, later], target_losses=targets), expected)
    given = {"a": 4.0, "b": 3.0, "c": 3.0}
    answer = decide("velocitune", table_of(3), [later], target_losses=targets, initial_losses=given)
    np.testing.assert_allclose(answer, expected)


# ADO


def test_ado():
    """Losses that are power laws of n: rho and p as in the source's curr_dist, as far as the fit is exact."""
    prior, drawn = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    floor, rise, alpha = np.array([2.0, 1.0, 3.0]), np.array([1.0, 2.0, 0.5]), np.array([0.41, 0.215, 0.605])
    policy = make_policy("ado", start_step=20, fit_steps=1000, ignore_steps=0)
    policy.reset(table_of(3, prior=prior))
    answers = []
    for step in range(23):
        losses = floor + rise * (step + 0.5) ** -alpha  # in the middle of the step, n in thousands of tokens
        seen = ((step + 1) * 1000 * drawn).round().astype(np.int64)
        answers.append(policy.decide(observe(losses, prior, step=step, seen=seen)))
    assert all(answer is None for answer in answers[:21])

    def rho(step):
        n = step + 1
        h = drawn + 0.9**n * (prior - drawn)  # from the prior, 0.1 a step to what was read
        share = prior * alpha * rise * n**-alpha / n * np.sqrt(h)
        share = np.maximum(share / share.sum(), 0.01)
        return share / share.sum()

    np.testing.assert_allclose(answers[21], 0.9 * prior + 0.1 * rho(21), atol=1e-3)
    average = 21 / 22 * prior + 1 / 22 * rho(21)  # p_avg after itr 21: 1 / (itr + 1) of rho
    np.testing.assert_allclose(answers[22], 0.9 * average + 0.1 * rho(22), atol=1e-3)
    assert np.abs(rho(21) - prior).max() > 0.05


# Bandits


def test_exp3():
    # eta 0.3, K = 2: a grows by 0.3 * (2 / 0.25) / 2 = 1.2, b by 0.3 * (3 / 0.75) / 2 = 0.6, from log p.
    seen = observe([2.0, 3.0], [0.25, 0.75], steps=100, step=99)
    a, b = 0.25 * math.exp(1.2), 0.75 * math.exp(0.6)
    expected = 0.9 * parts(a, b) + 0.05
    np.testing.assert_allclose(decide("exp3", table_of(2), [seen]), expected, rtol=1e-12)


def unread(observation, domain):
    """The same, but this domain was read a step ago and not since."""
    observation.loss.age[domain] = 1
    return observation


def test_exp3_pulls_only_arms_that_were_read():
    seen = unread(observe([2.0, 3.0], step=1), 1)
    answer = decide("exp3", table_of(2), [seen], gamma=0.0, update_steps=1)
    np.testing.assert_allclose(answer, parts(math.exp(0.3 * 2.0 / 0.5 / 2), 1.0), rtol=1e-12)
    # By gain: a has 0.4 less than before, so 0.3 * (0.4 / 0.5) / 2 = 0.12.
    first, second = observe([2.0, 3.0]), unread(observe([1.6, 3.0], step=1), 1)
    answer = decide("exp3", table_of(2), [first, second], reward="gain", gamma=0.0, update_steps=1)
    np.testing.assert_allclose(answer, parts(math.exp(0.12), 1.0), rtol=1e-12)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_odm_keeps_the_estimate_of_an_arm_that_was_not_read(form):
    policy = make_policy("odm", form=form)
    policy.reset(table_of(2))
    policy.decide(observe([2.0, 3.0], [0.4, 0.6]))
    before = policy.state_dict()["rewards"]
    policy.decide(unread(observe([2.0, 3.0], [0.4, 0.6], step=1), 1))
    after = policy.state_dict()["rewards"]
    assert after[1] == before[1]
    assert after[0] != before[0]


def test_odm_as_in_the_paper():
    # K = 2, step 99, so t = 100: e_t = sqrt(ln 2 / 200), e_{t-1} = sqrt(ln 2 / 198). R = 0.1 * L / p.
    r = np.array([0.1 * 2.0 / 0.4, 0.1 * 3.0 / 0.6])
    even, before = math.sqrt(math.log(2) / 200), math.sqrt(math.log(2) / 198)
    e = np.exp(before * r)
    expected = (1 - 2 * even) * e / e.sum() + even
    np.testing.assert_allclose(decide("odm", table_of(2), [observe([2.0, 3.0], [0.4, 0.6], step=99)]), expected)
    r2 = 0.9 * r + 0.1 * np.array([1.0 / 0.4, 1.0 / 0.6])
    e = np.exp(math.sqrt(math.log(2) / 200) * r2)
    even = math.sqrt(math.log(2) / 202)
    two = [observe([2.0, 3.0], [0.4, 0.6], step=99), observe([1.0, 1.0], [0.4, 0.6], step=100)]
    np.testing.assert_allclose(decide("odm", table_of(2), two), (1 - 2 * even) * e / e.sum() + even)


def test_odm_as_in_the_code_is_linear():
    # R = 0.1 exp(L); p = (1 - K e) R / sum R + e. Early on e is 1 / K, so p is even.
    even = math.sqrt(math.log(2) / 200)
    expected = (1 - 2 * even) * parts(math.exp(2.0), math.exp(3.0)) + even
    late, early = observe([2.0, 3.0], [0.4, 0.6], step=99), observe([2.0, 3.0], [0.4, 0.6], step=0)
    np.testing.assert_allclose(decide("odm", table_of(2), [late], form="code"), expected)
    np.testing.assert_allclose(decide("odm", table_of(2), [early], form="code"), [0.5, 0.5])


def test_dynamixsft():
    # Relative falls: a 0.5 / 4, b 0.1 / 2, c none: scaled 1, 0.4, 0. Q = 0.1 of that; p0 exp(2 Q), at least 0.1 / 3.
    table = table_of(3, prior=[0.5, 0.48, 0.02])
    first, second = observe([4.0, 2.0, 3.0]), observe([3.5, 1.9, 3.0 + 1e-12], step=10, steps=10)
    e = np.array([0.5 * math.exp(0.2), 0.48 * math.exp(0.08), 0.02])
    floored = np.maximum(e / e.sum(), 0.1 / 3)
    answer = decide("dynamixsft", table, [first, second])
    np.testing.assert_allclose(answer, floored / floored.sum(), rtol=1e-8)


# Cross-domain


def test_skillit_with_a_given_graph():
    # Row a: 0.5 L_a + 1 L_b; row b: 1 L_b. Losses summed over two updates (window 2): a 2 + 1.8, b 3 + 2.9.
    graph = {"a": {"a": 0.5, "b": 1.0}, "b": {"b": 1.0}}
    table = table_of(2, prior=[0.4, 0.6])
    seen = [observe([9.0, 9.0]), observe([2.0, 3.0], step=400), observe([1.8, 2.9], step=800)]
    a = 0.4 * math.exp(0.2 * (0.5 * 3.8 + 5.9))
    b = 0.6 * math.exp(0.2 * 5.9)
    answer = decide("skillit", table, seen, graph=graph, window=2)
    np.testing.assert_allclose(answer, parts(a, b), rtol=1e-12)
    same = decide("skillit", table, seen, graph=[[0.5, 1.0], [0.0, 1.0]], window=2)
    np.testing.assert_array_equal(answer, same)
    with pytest.raises(ConfigError, match="from 'a' to 'x'"):
        make_policy("skillit", graph={"a": {"x": 1.0}}).reset(table)


def test_skillit_waits_for_the_next_update():
    policy = make_policy("skillit", graph=np.eye(2))
    policy.reset(table_of(2))
    assert policy.decide(observe([1.0, 2.0], step=0)) is not None
    assert policy.decide(observe([1.0, 2.0], step=399)) is None
    assert policy.decide(observe([1.0, 2.0], step=400)) is not None


# Gradients


def test_influence():
    # Even preference: (4 + 0.5) / 2 = 2.25 and (-2 + 2) / 2 = 0; over 2.25: 1, 0.
    seen = observe([1, 1], [0.3, 0.7], steps=10, step=9, influence=[[4.0, 0.5], [-2.0, 2.0]])
    e = np.array([0.3 * math.exp(0.5), 0.7])
    np.testing.assert_allclose(decide("influence", table_of(2), [seen]), 0.96 * e / e.sum() + 0.02, rtol=1e-12)
    # All for the source: 1 and -0.5.
    e = np.array([0.3 * math.exp(0.5), 0.7 * math.exp(-0.25)])
    answer = decide("influence", table_of(2), [seen], preference=1.0)
    np.testing.assert_allclose(answer, 0.96 * e / e.sum() + 0.02, rtol=1e-12)


def test_doge():
    # Norms 2 and 4. By unit gradients, over the best: source 2, 4 -> 0.5, 1; target 4, -0.5 -> 1, -0.125.
    seen = observe([1, 1], influence=[[4.0, 8.0], [16.0, -2.0]], gram=[[4.0, -1.0], [-1.0, 16.0]])
    a, b = 0.25 * 0.5 + 0.75 * 1, 0.25 * 1 - 0.75 * 0.125
    expected = parts(math.exp(0.05 * a), math.exp(0.05 * b))
    np.testing.assert_allclose(decide("doge", table_of(2), [seen], preference=0.25), expected, rtol=1e-12)
    answer = decide("doge", table_of(2), [seen], preference=0.0)  # b is clipped at 0
    np.testing.assert_allclose(answer, parts(math.exp(0.05), 1.0), rtol=1e-12)
    one = observe([1, 1], influence=[[math.nan, 8.0], [math.nan, -2.0]], gram=[[4.0, -1.0], [-1.0, 16.0]])
    np.testing.assert_array_equal(answer, decide("doge", table_of(2), [one], preference=0.25))  # all for what is known
    # Toward the domains: cosines a-b 2 / 8, a-c 0, b-c 4 / 8; mean over all three.
    seen = observe([1, 1, 1], gram=[[4.0, 2.0, 0.0], [2.0, 16.0, 4.0], [0.0, 4.0, 4.0]])
    expected = parts(*(math.exp(0.05 * total / 3) for total in (1.25, 1.75, 1.5)))
    np.testing.assert_allclose(decide("doge", table_of(3), [seen], toward="domains"), expected, rtol=1e-12)


def test_dga():
    # Target only: 3 and 1, root mean square sqrt(5). beta 0.1 of one full step.
    seen = observe([1, 1], [0.5, 0.5], steps=10, step=9, influence=[[math.nan, 3.0], [math.nan, 1.0]])
    step = parts(math.exp(0.5 * 3 / math.sqrt(5)), math.exp(0.5 / math.sqrt(5)))
    np.testing.assert_allclose(decide("dga", table_of(2), [seen]), 0.9 * 0.5 + 0.1 * step, rtol=1e-12)


def test_rb():
    # q = prior: G q = (0.5 * 2 + 0.5 * 1, 0.5 * 1 + 0.5 * 3) = (1.5, 2), norm 2.5.
    seen = observe([1, 1], gram=[[2.0, 1.0], [1.0, 3.0]])
    expected = parts(math.exp(2 * 0.6), math.exp(2 * 0.8))
    np.testing.assert_allclose(decide("rb", table_of(2), [seen]), expected, rtol=1e-12)
    # Fields: 0.8 on a, 0.2 on b: (1.8, 1.4). By name: (1, 3) / sqrt(10).
    norm = math.hypot(1.8, 1.4)
    expected = parts(math.exp(2 * 1.8 / norm), math.exp(2 * 1.4 / norm))
    fields = table_of(2, fields=("source", "target"))
    np.testing.assert_allclose(decide("rb", fields, [seen], preference=0.8), expected, rtol=1e-12)
    expected = parts(math.exp(2 / math.sqrt(10)), math.exp(6 / math.sqrt(10)))
    np.testing.assert_allclose(decide("rb", fields, [seen], evaluation={"b": 1.0}), expected, rtol=1e-12)


def test_pike():
    # Signal 4 and 1, variance 5 - 4 = 1 and 11 - 1 = 10; mean of 4 + 0.05 and 1 + 0.5: 2.775.
    seen = observe([1, 1], steps=10, step=9, gram=[[4.0, 0.0], [0.0, 1.0]], row_norm_sq=np.array([5.0, 11.0]))
    a, b = (4 - 0.05 * 1) / 2.775, (1 - 0.05 * 10) / 2.775
    expected = parts(math.exp(0.5 * a), math.exp(0.5 * b))
    np.testing.assert_allclose(decide("pike", table_of(2), [seen]), expected, rtol=1e-12)


def test_alignment_rewards_of_ac_odm():
    from mixloader.policies.gradient import alignment_rewards

    # Off-diagonal sums 1, 3, 2 over a mean norm of (1 + 2 + 3) / 3 = 2: 0.5, 1.5, 1. Mean 1, deviation 0.5.
    gram = np.array([[1.0, 1.0, 0.0], [1.0, 4.0, 2.0], [0.0, 2.0, 9.0]])
    np.testing.assert_allclose(alignment_rewards(gram), [-1, 1, 0], atol=1e-5)


# The clock


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("doremi", {"reference_losses": {"a": 2.0, "b": 2.5, "c": 1.0}, "floor": 0.01}),
        ("dbl", {"target_losses": {"a": 2.0, "b": 2.5, "c": 1.0}}),
        ("velocitune", {"target_losses": {"a": 2.0, "b": 2.5, "c": 1.0}, "initial_losses": {"a": 4, "b": 4, "c": 4}}),
        ("influence", {}),
        ("doge", {}),
        ("pike", {}),
        ("dga", {}),
    ],
)
def test_two_decisions_over_half_the_steps_go_as_far_as_one(name, options):
    signals = {
        "influence": [[3.0, 1.0], [1.0, 2.0], [-1.0, 0.5]],
        "gram": [[4.0, 1.0, 0.0], [1.0, 9.0, 2.0], [0.0, 2.0, 1.0]],
        "row_norm_sq": np.array([9.0, 9.0, 4.0]),
    }
    losses = [2.3, 2.6, 1.5]

    def path(steps, times):
        policy = make_policy(name, **options)
        policy.reset(table_of(3))
        weights = np.array([0.2, 0.3, 0.5])
        for i in range(times):
            weights = policy.decide(observe(losses, weights, step=9 + steps * i, steps=steps, **signals))
        return weights

    once, often = path(8, 1), path(1, 8)
    assert np.abs(once - [0.2, 0.3, 0.5]).max() > 1e-3
    np.testing.assert_allclose(often, once, atol=0.1 * np.abs(once - [0.2, 0.3, 0.5]).max())
