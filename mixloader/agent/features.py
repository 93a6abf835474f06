"""What the agent's network reads: features of what is remembered (memory.py), free of scale; compiled for numba.

One implementation serves the policy (through feature_maker.py), its simulator and its fitting. A file of weights names
the features that its network reads, so more may be added to the two lists; one that comes to mean something else gets
another name.
"""

from __future__ import annotations

import numpy as np

from mixloader.agent.compiled import FIXED_ONE, compiled, fixed

INFLUENCE_FADES = 0.25
"""After this part of the run without a new measurement, influence counts 1/e of what it did when it was new."""

FEEDBACK_FADES = 0.2
"""As INFLUENCE_FADES, of feedback."""

DOMAIN_FEATURES = (
    "source", "target", "log_relative_weight", "log_weight", "log_prior", "epochs", "epochs_projected", "log_seen",
    "excess_first", "excess_best", "slope_short", "slope_long", "log_level", "log_error_short", "log_error_long",
    "has_loss",
    "has_influence", "gain", "gain_long", "gain_source", "gain_target", "advantage", "gain_signal", "advantage_signal",
    "advantage_relative",
    "has_feedback", "feedback_change", "feedback_excess", "feedback_slope",
)  # fmt: skip
"""Features of a domain, in order. What is missing leaves its features at 0.

has_influence is 1 for a new measurement and fades to 0, and what follows fades with it. g = preference * influence on
the source + (1 - preference) * influence on the target. gain: arcsinh(g / scale) of the newest snapshot; gain_long, and
gain_source and gain_target of one field each: of the running average; advantage: of g less its mean over the current
mixture; *_signal: arcsinh of g and of the advantage over the standard error. scale: one for both fields, see `_scale`.
advantage_relative: arcsinh of the advantage over the scale of g alone: a field of large gradients that the preference
leaves little part does not widen it. has_feedback fades, too; of a domain that is told of by name: newest less first
loss, less best loss, less running average.
"""

GLOBAL_FEATURES = (
    "progress", "has_progress", "preference", "log_tokens", "source_weight", "target_weight",
    "has_source", "has_target", "source_excess", "target_excess", "source_slope", "target_slope",
    "source_influence", "target_influence", "source_gain", "target_gain", "advantage_spread", "advantage_certainty",
    "source_feedback", "target_feedback", "source_change", "target_change", "source_worse", "target_worse",
    "source_trend", "target_trend", "has_size", "log_size",
)  # fmt: skip
"""Features of the whole run, in order.

*_influence: how new influence on the field is, 1 to 0 (never); *_gain: of the current mixture, on that field;
advantage_spread: root mean square of the advantage over the mixture; advantage_certainty: of advantage_signal.
*_feedback (how new), *_change, *_worse, *_trend: as the four of a domain, of what is told of the field; where nothing
was told of it, the mean over its domains of what was told of those. log_size: log10 of the model's parameters / 10^6.
"""

N_DOMAIN, N_GLOBAL = len(DOMAIN_FEATURES), len(GLOBAL_FEATURES)
NO_FIELD, SOURCE, TARGET = 0, 1, 2
_TYPICAL_STD = 2.5  # nats: deviation of a token's loss, where the observation has none
_INFLUENCE = DOMAIN_FEATURES.index("has_influence")
_FEEDBACK = DOMAIN_FEATURES.index("has_feedback")
_RUN_INFLUENCE = GLOBAL_FEATURES.index("source_influence")
_RUN_FEEDBACK = GLOBAL_FEATURES.index("source_feedback")
_SIZE = GLOBAL_FEATURES.index("has_size")

OF_SIGNALS = {
    "influence": (*DOMAIN_FEATURES[_INFLUENCE:_FEEDBACK], *GLOBAL_FEATURES[_RUN_INFLUENCE:_RUN_FEEDBACK]),
    "feedback": (*DOMAIN_FEATURES[_FEEDBACK:], *GLOBAL_FEATURES[_RUN_FEEDBACK:_SIZE]),
}
"""Features that are made of a signal, all of them 0 without it and by nothing else touched: 0 there is its absence."""


def field_codes(fields: tuple[str | None, ...]) -> np.ndarray:
    """Fields of a DomainTable as int64 [D]: SOURCE, TARGET or NO_FIELD."""
    codes = {"source": SOURCE, "target": TARGET}
    return np.array([codes.get(field or "", NO_FIELD) for field in fields], dtype=np.int64)


@compiled
def _write_domain(state, d, weight, prior, tokens, seen, epochs, run, out):
    """Features of domain `d` that need no other signal than losses into out.

    run: (number of domains, tokens so far, budget, mean loss).
    """
    n_domains, run_tokens, budget, mean_loss = run
    out[2] = np.log(weight / prior)
    out[3] = np.log(n_domains * weight)
    out[4] = np.log(n_domains * prior)
    out[5] = np.log1p(epochs)
    out[6] = np.log1p(epochs + weight * max(budget - run_tokens, 0.0) / max(tokens, 1.0))
    out[7] = np.log(n_domains * seen / max(run_tokens, 1.0) + 0.1)
    # Far below one token's worth, a decayed average says nothing any more (and would divide by zero in the end).
    has_loss = state[3, d] > 1e-200 and state[7, d] > 0
    out[15] = 1.0 if has_loss else 0.0
    if not has_loss:
        for i in range(8, 15):
            out[i] = 0.0
        return
    short, middle, long = state[0, d] / state[3, d], state[1, d] / state[4, d], state[2, d] / state[5, d]
    deviation = np.sqrt(state[9, d] / state[10, d]) if state[10, d] > 1e-200 else _TYPICAL_STD
    out[8] = np.arcsinh(10 * (middle - state[6, d] / state[7, d]))
    out[9] = np.arcsinh(10 * (middle - state[8, d]))
    out[10] = np.arcsinh(20 * (short - middle))
    out[11] = np.arcsinh(20 * (middle - long))
    out[12] = np.log(max(middle, 1e-3) / max(mean_loss, 1e-3))
    # Less than one effective token is as good as none: the error stays bounded.
    out[13] = np.log(deviation / np.sqrt(1 + state[3, d]) + 1e-6)
    out[14] = np.log(deviation / np.sqrt(1 + state[5, d]) + 1e-6)


@compiled
def make_features(
    state, weights, prior, tokens, seen, epochs, fields, progress, preference, run_tokens, budget, log_size
):
    """Features of an observation: float32 [D, P] and [G], in the order of the two lists above.

    state: a State; weights, prior float64 [D], positive, sums of 1; tokens, seen, fields int64 [D]; epochs
    float64 [D]; progress NaN where there is no budget; log_size: log10 of the model's parameters, NaN if not known.
    """
    n_domains = len(weights)
    losses = state.losses
    out_domain = np.zeros((n_domains, N_DOMAIN), dtype=np.float32)
    out_global = np.zeros(N_GLOBAL, dtype=np.float32)
    level, level_weight = 0, 0
    for d in range(n_domains):
        if losses[3, d] > 1e-200 and losses[7, d] > 0:
            level += fixed(prior[d] * losses[1, d] / losses[4, d])
            level_weight += fixed(prior[d])
    mean_loss = level / level_weight if level_weight > 0 else 1.0

    # Integer sums by field: weight, domains, domains with a loss, excess over the first loss, long slope.
    sums = np.zeros((3, 5), dtype=np.int64)
    row = np.zeros(_INFLUENCE)
    for d in range(n_domains):
        run = (n_domains, run_tokens, budget, mean_loss)
        _write_domain(losses, d, weights[d], prior[d], tokens[d], seen[d], epochs[d], run, row)
        row[0] = 1.0 if fields[d] == SOURCE else 0.0
        row[1] = 1.0 if fields[d] == TARGET else 0.0
        for i in range(_INFLUENCE):
            out_domain[d, i] = row[i]
        field = fields[d]
        sums[field, 0] += fixed(weights[d])
        sums[field, 1] += 1
        if row[15] > 0:
            sums[field, 2] += 1
            sums[field, 3] += fixed(row[8])
            sums[field, 4] += fixed(row[11])

    has_progress = np.isfinite(progress)
    out_global[0] = progress if has_progress else 0.5
    out_global[1] = 1.0 if has_progress else 0.0
    out_global[2] = preference
    out_global[3] = np.log10(max(run_tokens, 1.0))
    for field in (SOURCE, TARGET):
        shift = field - SOURCE
        measured = max(sums[field, 2], 1) * FIXED_ONE
        out_global[4 + shift] = sums[field, 0] / FIXED_ONE
        out_global[6 + shift] = 1.0 if sums[field, 1] > 0 else 0.0
        out_global[8 + shift] = sums[field, 3] / measured
        out_global[10 + shift] = sums[field, 4] / measured
    if np.isfinite(log_size):
        out_global[_SIZE] = 1.0
        out_global[_SIZE + 1] = log_size - 6
    _write_influence(state.influence, weights, prior, fields, preference, budget, out_domain, out_global)
    _write_feedback(state.feedback, fields, budget, out_domain, out_global)
    return out_domain, out_global


@compiled
def _scale(x, known, prior, fields):
    """One scale for both fields: the root mean square over domains of the length of x [2, D] there, |x| <= 1.

    Domains count by their prior inside their group (source, target, neither), groups alike: two halves of a domain
    count as the whole, and a small target field as much as a large source field.
    """
    sums = np.zeros((3, 2), dtype=np.int64)
    for d in range(len(prior)):
        if known[d]:
            sums[fields[d], 0] += fixed(prior[d] * (x[0, d] ** 2 + x[1, d] ** 2))
            sums[fields[d], 1] += fixed(prior[d])
    total, groups = 0.0, 0
    for group in range(3):
        if sums[group, 1] > 0:
            total += sums[group, 0] / sums[group, 1]
            groups += 1
    return np.sqrt(total / max(groups, 1))


@compiled
def _read_influence(state, budget, fresh, newest, average, known):
    """Freshness, newest and average influence, each [2, D], and known [D], of the fields that were measured at all.

    newest and average are over their largest entries, which are returned: sums are in fixed point, and the unit of a
    gradient may be anything. Returns which fields were measured, too, as (1.0 or 0.0, 1.0 or 0.0).
    """
    n_domains = len(known)
    source, target = 0.0, 0.0
    for d in range(n_domains):
        source = 1.0 if state[2, 0, d] < np.inf else source
        target = 1.0 if state[2, 1, d] < np.inf else target
    used = (source, target)
    largest, largest_average = 0.0, 0.0
    for d in range(n_domains):
        known[d] = source + target > 0
        for f in range(2):
            known[d] = known[d] and (used[f] == 0 or (state[2, f, d] < np.inf and state[4, f, d] > 1e-200))
        for f in range(2):
            if known[d] and used[f] > 0:
                fresh[f, d] = np.exp(-state[2, f, d] / budget / INFLUENCE_FADES)
                newest[f, d] = state[0, f, d]
                average[f, d] = state[3, f, d] / state[4, f, d]
                largest = max(largest, abs(newest[f, d]))
                largest_average = max(largest_average, abs(average[f, d]))
    if largest > 0 and largest_average > 0:
        for d in range(n_domains):
            for f in range(2):
                newest[f, d] /= largest
                average[f, d] /= largest_average
    return source, target, largest, largest_average


@compiled
def _write_influence(state, weights, prior, fields, preference, budget, out_domain, out_global):
    n_domains = len(weights)
    fresh, newest, average = np.zeros((2, n_domains)), np.zeros((2, n_domains)), np.zeros((2, n_domains))
    balanced = np.zeros((2, n_domains))
    known = np.zeros(n_domains, dtype=np.bool_)
    source, target, largest, largest_average = _read_influence(state, budget, fresh, newest, average, known)
    if not (largest > 0 and largest_average > 0):
        return
    scale, scale_average = _scale(newest, known, prior, fields), _scale(average, known, prior, fields)
    if not (scale > 0 and scale_average > 0):
        return
    # What a field that was not measured would count for goes to the other one.
    total = source * preference + target * (1 - preference)
    if total > 0:
        source, target = source * preference / total, target * (1 - preference) / total

    sums = np.zeros(6, dtype=np.int64)  # by weight: known, gain, and for each field gain and freshness
    for d in range(n_domains):
        balanced[0, d] = source * average[0, d] + target * average[1, d]
        if known[d]:
            sums[0] += fixed(weights[d])
            sums[1] += fixed(weights[d] * balanced[0, d])
            for f in range(2):
                sums[2 + f] += fixed(weights[d] * average[f, d])
                sums[4 + f] += fixed(weights[d] * fresh[f, d])
    if sums[0] == 0:
        return
    mean = sums[1] / sums[0]
    scale_balanced = max(_scale(balanced, known, prior, fields), 1e-6 * scale_average)
    spread, certainty = 0, 0
    for d in range(n_domains):
        if not known[d]:
            continue
        # As new as the older one of those that were measured.
        fade = min(fresh[0, d], fresh[1, d])
        fade = fade if fade > 0 else max(fresh[0, d], fresh[1, d])
        gain = source * newest[0, d] + target * newest[1, d]
        gain_average = balanced[0, d]
        advantage = gain_average - mean
        error = np.sqrt((source * state[1, 0, d]) ** 2 + (target * state[1, 1, d]) ** 2) / largest
        error = max(error, 1e-3 * scale)
        signal = np.arcsinh(advantage * largest_average / largest / error)
        row = out_domain[d]
        row[_INFLUENCE] = fade
        row[_INFLUENCE + 1] = fade * np.arcsinh(gain / scale)
        row[_INFLUENCE + 2] = fade * np.arcsinh(gain_average / scale_average)
        row[_INFLUENCE + 3] = fresh[0, d] * np.arcsinh(average[0, d] / scale_average)
        row[_INFLUENCE + 4] = fresh[1, d] * np.arcsinh(average[1, d] / scale_average)
        row[_INFLUENCE + 5] = fade * np.arcsinh(advantage / scale_average)
        row[_INFLUENCE + 6] = fade * np.arcsinh(gain / error)
        row[_INFLUENCE + 7] = fade * signal
        row[_INFLUENCE + 8] = fade * np.arcsinh(advantage / scale_balanced)
        spread += fixed(weights[d] * advantage**2)
        certainty += fixed(weights[d] * (fade * signal) ** 2)
    freshest = 0.0
    for f in range(2):
        fade = sums[4 + f] / sums[0]
        freshest = max(freshest, fade)
        out_global[_RUN_INFLUENCE + f] = fade
        out_global[_RUN_INFLUENCE + 2 + f] = fade * np.arcsinh(sums[2 + f] / sums[0] / scale_average)
    out_global[_RUN_INFLUENCE + 4] = freshest * np.arcsinh(np.sqrt(spread / sums[0]) / scale_average)
    out_global[_RUN_INFLUENCE + 5] = np.sqrt(certainty / sums[0])


@compiled
def _of_feedback(state, column, budget):
    """Freshness, change since the first, excess over the best and slope of what was told in `column`."""
    age = state[4, column]
    if age == np.inf:
        return 0.0, 0.0, 0.0, 0.0
    fresh = np.exp(-age / budget / FEEDBACK_FADES)
    newest = state[2, column]
    return (
        fresh,
        np.arcsinh(10 * (newest - state[0, column])),
        np.arcsinh(10 * (newest - state[1, column])),
        fresh * np.arcsinh(20 * (newest - state[3, column])),
    )


@compiled
def _write_feedback(state, fields, budget, out_domain, out_global):
    n_domains = len(fields)
    sums = np.zeros((3, 5), dtype=np.int64)
    for d in range(n_domains):
        if state[4, d] < np.inf:
            four = _of_feedback(state, d, budget)
            sums[fields[d], 0] += 1
            for i in range(4):
                out_domain[d, _FEEDBACK + i] = four[i]
                sums[fields[d], 1 + i] += fixed(four[i])
    for f in range(2):
        four = _of_feedback(state, n_domains + f, budget)
        count = sums[SOURCE + f, 0]
        stands_in = state[4, n_domains + f] == np.inf and count > 0
        for i in range(4):
            out_global[_RUN_FEEDBACK + 2 * i + f] = (
                sums[SOURCE + f, 1 + i] / count / FIXED_ONE if stands_in else four[i]
            )
