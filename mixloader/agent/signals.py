"""What is seen of a simulated run: noisy training losses, influence and feedback, each as often as the run has it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixloader.agent.compiled import compiled
from mixloader.agent.episodes import Episodes
from mixloader.agent.features import SOURCE
from mixloader.agent.simulator import influence_now, learning_rate

FIELDS, DOMAINS, BOTH = 0, 1, 2
"""What feedback is told of."""


class Signals(NamedTuple):
    """The instruments of B runs. Shapes [B], float64, unless said otherwise.

    influence_every (int64): decisions from one measurement to the next, 0 for none; influence_error: standard error of
    one measurement for a domain with an equal share of the rows, in parts of the root mean square of influence at the
    start; influence_kept: weight of the earlier measurements when another comes; influence_unit: of what is reported;
    distortion [B, D, 2]: by what influence is systematically off (the optimiser's steps are not plain gradients).
    feedback_every (int64): as influence_every; feedback_error: nats, of a domain; offset [B, D]: nats by which the
    probe's text differs from the held-out text; told (int64): FIELDS, DOMAINS or BOTH. Feedback is of probed domains.
    budget_known (bool): whether progress is told; log_size: log10 of the model's parameters, NaN if not told.
    """

    influence_every: np.ndarray
    influence_error: np.ndarray
    influence_kept: np.ndarray
    influence_unit: np.ndarray
    distortion: np.ndarray
    feedback_every: np.ndarray
    feedback_error: np.ndarray
    offset: np.ndarray
    told: np.ndarray
    budget_known: np.ndarray
    log_size: np.ndarray


class Readings(NamedTuple):
    """What the instruments say after a step, float64 unless said otherwise; NaN where there is nothing.

    loss, loss_std [B, D] (nats), tokens int64 [B, D], of the step's training batches; influence, influence_std,
    influence_age [B, D, 2], the latest, and tokens of the run since it was measured; feedback [B, D + 2],
    told after this step, of the domains and then, at `size` and `size + 1`, of source and target (nats).
    Kept between steps: where in a row the quota of each domain stands, rows since the last influence [B, D]; sums of
    influence: weighted values, weights, squared weights [B, 3, D, 2]; the episode's unit [B].
    """

    loss: np.ndarray
    loss_std: np.ndarray
    tokens: np.ndarray
    influence: np.ndarray
    influence_std: np.ndarray
    influence_age: np.ndarray
    feedback: np.ndarray
    quota: np.ndarray
    rows: np.ndarray
    sums: np.ndarray
    unit: np.ndarray


def draw_signals(episodes: Episodes, steps: int, rng: np.random.Generator) -> Signals:
    """Instruments for runs of `steps` decisions: a quarter has no influence, a quarter no feedback."""
    shape = episodes.field.shape
    count = shape[0]

    def log_uniform(low: float, high: float) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), count))

    def every(least: float, most: float) -> np.ndarray:
        """Decisions between measurements of which a run has `least` to `most`; 0 in a quarter of the runs."""
        gap = np.maximum(1, np.rint(steps / log_uniform(least, most))).astype(np.int64)
        return np.where(rng.random(count) < 0.25, 0, gap)

    spread = rng.uniform(0, 0.6, (count, 1, 1))
    return Signals(
        influence_every=every(10, 100),
        influence_error=log_uniform(0.06, 3.0),
        influence_kept=0.5 ** (1 / log_uniform(0.5, 4)),
        influence_unit=log_uniform(1e-4, 1e4),
        distortion=np.exp(spread * rng.standard_normal((*shape, 2))),
        feedback_every=every(5, 100),
        feedback_error=log_uniform(0.002, 0.05),
        offset=0.1 * rng.standard_normal(shape),
        told=rng.choice([FIELDS, DOMAINS, BOTH], count, p=[0.6, 0.15, 0.25]),
        budget_known=rng.random(shape[:1]) > 0.1,
        log_size=np.where(rng.random(count) < 0.3, np.nan, rng.uniform(5.0, 10.5, count)),
    )


def new_readings(episodes: Episodes, rng: np.random.Generator) -> Readings:
    """Before the first step."""
    wide = episodes.field.shape
    count, width = wide

    def nothing(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan)

    return Readings(
        loss=nothing(*wide), loss_std=nothing(*wide), tokens=np.zeros(wide, dtype=np.int64),
        influence=nothing(*wide, 2), influence_std=nothing(*wide, 2), influence_age=nothing(*wide, 2),
        feedback=nothing(count, width + 2), quota=rng.random(wide), rows=np.zeros(wide),
        sums=np.zeros((count, 3, width, 2)), unit=np.zeros(count),
    )  # fmt: skip


@compiled
def read(e, signals, history, weights, t, rng, out):
    """Fill the Readings `out` after step t of every episode; weights: float64 [B, T, D]. Draws noise from `rng`."""
    for b in range(len(e.size)):
        _read_losses(e, b, history, weights[b, t], t, rng, out)
        _read_influence(e, signals, b, history, t, rng, out)
        _read_feedback(e, signals, b, history, t, rng, out)


@compiled
def _read_losses(e, b, history, weights, t, rng, out):
    """Mean training losses of the step: NaN where no row was drawn, else with the noise of the rows."""
    steps, parts = history.held_out.shape[1] - 1, history.learned.shape[1] - 1
    raised = e.bump[b] * learning_rate(e, b, (t + 0.5) / steps)
    for d in range(e.size[b]):
        quota = out.quota[b, d] + weights[d] * e.rows[b] / steps
        rows = np.floor(quota)
        out.quota[b, d] = quota - rows
        out.rows[b, d] += rows
        out.tokens[b, d] = int(rows * e.budget[b] / e.rows[b])
        if rows == 0:
            out.loss[b, d] = out.loss_std[b, d] = np.nan
            continue
        epochs = history.read[b, t * (parts // steps), d] / e.tokens[b, d]
        held_out = 0.5 * (history.held_out[b, t, d] + history.held_out[b, t + 1, d])
        memorised = min(e.memory[b] * np.log(epochs), 0.9 * max(held_out, 0.0)) if epochs > 1 else 0.0
        loss = held_out + raised - memorised
        out.loss[b, d] = loss + rng.standard_normal() * e.row_std[b, d] / np.sqrt(rows)
        out.loss_std[b, d] = e.token_std[b, d]


@compiled
def _read_influence(e, signals, b, history, t, rng, out):
    """A measurement where one is due, added to the decayed mean of the earlier ones."""
    n, steps = e.size[b], history.held_out.shape[1] - 1
    out.influence_age[b, :n] += e.budget[b] / steps
    if signals.influence_every[b] == 0 or (t + 1) % signals.influence_every[b] != 0:
        return
    now = np.empty((n, 2))
    influence_now(e, b, history, (t + 1) * (history.learned.shape[1] - 1) // steps, now)
    probed = np.zeros(2, dtype=np.bool_)
    for d in range(n):
        if e.probe[b, d] > 0:
            probed[e.field[b, d] - SOURCE] = True
    if out.unit[b] == 0:
        out.unit[b] = np.sqrt((now**2).sum() / (n * probed.sum())) + 1e-9
    total = 0.0
    for d in range(n):
        total += out.rows[b, d]
    error, kept = signals.influence_error[b] * out.unit[b], signals.influence_kept[b]
    unit = signals.influence_unit[b] / out.unit[b]
    for d in range(n):
        share = n * out.rows[b, d] / max(total, 1.0)
        out.rows[b, d] = 0.0
        for f in range(2):
            if not probed[f] or (share == 0 and kept * out.sums[b, 1, d, f] == 0):
                continue
            sums = out.sums[b, :, d, f]
            value = share * now[d, f] * signals.distortion[b, d, f] + np.sqrt(share) * error * rng.standard_normal()
            sums[0] = kept * sums[0] + value
            sums[1] = kept * sums[1] + share
            sums[2] = kept * kept * sums[2] + share
            if share > 0:
                out.influence_age[b, d, f] = 0.0
            out.influence[b, d, f] = unit * sums[0] / sums[1]
            # The standard error is itself an estimate.
            estimated = np.exp(0.2 * rng.standard_normal())
            out.influence_std[b, d, f] = unit * error * np.sqrt(sums[2]) / sums[1] * estimated


@compiled
def _read_feedback(e, signals, b, history, t, rng, out):
    """Held-out losses of the probed domains where an evaluation is due, of the fields, the domains or both.

    As they were before the step: an evaluation takes time, and the first is made before training.
    """
    n, told = e.size[b], signals.told[b]
    out.feedback[b, : n + 2] = np.nan
    if signals.feedback_every[b] == 0 or t % signals.feedback_every[b] != 0:
        return
    mean, probed = np.zeros(2), np.zeros(2)
    for d in range(n):
        if e.probe[b, d] == 0:
            continue
        loss = history.held_out[b, t, d] + signals.offset[b, d] + signals.feedback_error[b] * rng.standard_normal()
        mean[e.field[b, d] - SOURCE] += e.probe[b, d] * loss
        probed[e.field[b, d] - SOURCE] += e.probe[b, d]
        if told != FIELDS:
            out.feedback[b, d] = loss
    for f in range(2):
        if told != DOMAINS and probed[f] > 0:
            out.feedback[b, n + f] = mean[f]


def without(signals: Signals, *, influence: bool = False, feedback: bool = False) -> Signals:
    """The same instruments but for those that are named, which say nothing."""
    none = np.zeros_like(signals.influence_every)
    if influence:
        signals = signals._replace(influence_every=none)
    return signals._replace(feedback_every=none) if feedback else signals
