"""What the agent makes of an observation: running averages of the losses, and features free of scale.

The averages decay with the tokens read, not with the number of decisions, so that halving the interval
between decisions leaves the features nearly the same. One implementation serves the policy and its
fitting. Room for influence and feedback is at the end of the two lists of features.
"""

from __future__ import annotations

import numpy as np

from mixloader.agent.compiled import FIXED_ONE, compiled, fixed

HORIZONS = np.array([0.02, 0.06, 0.18])
"""Horizons of the three running averages of a loss, as fractions of the run's token budget."""

FIRST = 0.004
"""A domain's first loss is the mean over its tokens up to this fraction of the budget."""

STATE_ROWS = 11
"""Rows of the state [STATE_ROWS, D]: three sums of loss, three of tokens (decayed), the first loss's sum and
tokens, the best loss, and the sum of squared deviations with its tokens (decayed)."""

DOMAIN_FEATURES = (
    "source", "target", "log_relative_weight", "log_weight", "log_prior", "epochs", "epochs_projected", "log_seen",
    "excess_first", "excess_best", "slope_short", "slope_long", "log_level", "log_error_short", "log_error_long",
    "has_loss",
)  # fmt: skip
"""Features of a domain, in order. A missing loss leaves its features at 0 and `has_loss` at 0."""

GLOBAL_FEATURES = (
    "progress", "has_progress", "preference", "log_tokens", "source_weight", "target_weight",
    "has_source", "has_target", "source_excess", "target_excess", "source_slope", "target_slope",
)  # fmt: skip
"""Features of the whole run, in order."""

N_DOMAIN, N_GLOBAL = len(DOMAIN_FEATURES), len(GLOBAL_FEATURES)
NO_FIELD, SOURCE, TARGET = 0, 1, 2
_TYPICAL_STD = 2.5  # nats: deviation of a token's loss, where the observation has none


def field_codes(fields: tuple[str | None, ...]) -> np.ndarray:
    """Fields of a DomainTable as int64 [D]: SOURCE, TARGET or NO_FIELD."""
    codes = {"source": SOURCE, "target": TARGET}
    return np.array([codes.get(field or "", NO_FIELD) for field in fields], dtype=np.int64)


def new_state(n_domains: int) -> np.ndarray:
    """State before the first observation, float64 [STATE_ROWS, D]."""
    return np.zeros((STATE_ROWS, n_domains))


@compiled
def update_state(state, loss, std, count, tokens_since, budget):
    """Add the losses of one observation to `state` in place.

    loss, std: float64 [D], NaN where not measured; count: int64 [D], tokens behind them, 0 where not measured;
    tokens_since: tokens read by the run since the last observation; budget: tokens of the whole run.
    """
    elapsed = tokens_since / budget
    for d in range(state.shape[1]):
        measured = count[d] > 0 and np.isfinite(loss[d])
        for k in range(3):
            keep = np.exp(-elapsed / HORIZONS[k])
            state[k, d] *= keep
            state[3 + k, d] *= keep
            if measured:
                state[k, d] += loss[d] * count[d]
                state[3 + k, d] += count[d]
        keep = np.exp(-elapsed / HORIZONS[1])
        state[9, d] *= keep
        state[10, d] *= keep
        if not measured:
            continue
        if np.isfinite(std[d]):
            state[9, d] += std[d] ** 2 * count[d]
            state[10, d] += count[d]
        never = state[7, d] == 0
        if never or state[7, d] < FIRST * budget:
            state[6, d] += loss[d] * count[d]
            state[7, d] += count[d]
        # The middle average is quiet enough for its minimum to mean something.
        now = state[1, d] / state[4, d]
        state[8, d] = now if never else min(state[8, d], now)


@compiled
def _write_domain(state, d, weight, prior, tokens, seen, epochs, run, out):
    """Features of domain `d` into out [P]. run: (number of domains, tokens so far, budget, mean loss)."""
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
        out[8:15] = 0.0
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
def make_features(state, weights, prior, tokens, seen, epochs, fields, progress, preference, run_tokens, budget):
    """Features of an observation: float32 [D, P] and [G], in the order of the two lists above.

    state float64 [STATE_ROWS, D]; weights, prior float64 [D], positive; tokens, seen, fields int64 [D]; epochs
    float64 [D]; progress NaN where there is no budget.
    """
    n_domains = len(weights)
    out_domain = np.empty((n_domains, N_DOMAIN), dtype=np.float32)
    out_global = np.empty(N_GLOBAL, dtype=np.float32)
    level, level_weight = 0, 0
    for d in range(n_domains):
        if state[3, d] > 1e-200 and state[7, d] > 0:
            level += fixed(prior[d] * state[1, d] / state[4, d])
            level_weight += fixed(prior[d])
    mean_loss = level / level_weight if level_weight > 0 else 1.0

    # Integer sums by field: weight, domains, domains with a loss, excess over the first loss, long slope.
    sums = np.zeros((3, 5), dtype=np.int64)
    row = np.zeros(N_DOMAIN)
    for d in range(n_domains):
        run = (n_domains, run_tokens, budget, mean_loss)
        _write_domain(state, d, weights[d], prior[d], tokens[d], seen[d], epochs[d], run, row)
        row[0] = 1.0 if fields[d] == SOURCE else 0.0
        row[1] = 1.0 if fields[d] == TARGET else 0.0
        out_domain[d] = row
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
    return out_domain, out_global
