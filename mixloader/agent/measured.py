"""What real runs say that the simulator is held against: their mixtures, and losses on text that is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mixloader.agent.episodes import MAX_DOMAINS, Episodes, blank, probe_weights
from mixloader.agent.features import SOURCE, TARGET, field_codes
from mixloader.errors import ConfigError

if TYPE_CHECKING:
    from mixloader.agent.trajectory import Trajectory

STEPS = 64
"""Steps of equal tokens in which a real run is simulated."""

ERROR = 0.03
"""Nats by which a held-out loss may differ from the simulator's: noise of its text, and what no equation says."""

OTHER_TEXT = 0.1
"""Part by which the loss on a probe's text may change more or less than that on other text of the same domain."""

FEEDBACKS = 8
"""Evaluations of one run that its feedback counts as: their errors are not independent."""


class Runs(NamedTuple):
    """B real runs, and M numbers that were measured in each; float64 unless said otherwise.

    episodes: what is known of them; all else is zero. weights: [B, STEPS, D], what was read. A measurement is the sum
    over domains of `of` [B, M, D] times the held-out loss at `when` [B, M] (in steps); where `relative` [B, M] is 1,
    that less the same before training. value [B, M] (nats), error [B, M] (infinite where there is no measurement).
    by_domain: bool [B, M], a held-out loss of one domain, and not feedback. episode: int64 [B], the same for runs that
    differ in nothing but what was read.
    """

    episodes: Episodes
    weights: np.ndarray
    when: np.ndarray
    of: np.ndarray
    relative: np.ndarray
    value: np.ndarray
    error: np.ndarray
    by_domain: np.ndarray
    episode: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """int64 [E]: a run of each episode."""
        return np.unique(self.episode, return_index=True)[1]


def measured_runs(trajectories: Sequence[Trajectory]) -> Runs:
    """Raises ConfigError for trajectories without held-out losses, or with more domains than episodes can have."""
    for number, run in enumerate(trajectories):
        if len(run.held_out) < 2 or len(run.table) > MAX_DOMAINS:
            raise ConfigError(
                f"trajectory {number} has {len(run.held_out)} held-out losses of {len(run.table)} domains; expected at "
                f"least 2 of at most {MAX_DOMAINS}"
            )
    width = max(len(run.table) for run in trajectories)
    episodes = blank(len(trajectories), width)
    told = [_measurements(run) for run in trajectories]
    most = max(len(one) for one in told)
    shape = (len(trajectories), most)
    runs = Runs(
        episodes, np.zeros((len(trajectories), STEPS, width)), np.zeros(shape), np.zeros((*shape, width)),
        np.zeros(shape), np.zeros(shape), np.full(shape, np.inf), np.zeros(shape, dtype=bool),
        _episodes_of(trajectories),
    )  # fmt: skip
    for b, (run, measurements) in enumerate(zip(trajectories, told, strict=True)):
        size = len(run.table)
        _describe(run, episodes, b)
        runs.weights[b, :, :size] = _weights(run)
        for m, (when, of, relative, value, error) in enumerate(measurements):
            runs.when[b, m], runs.of[b, m, :size], runs.relative[b, m] = when * STEPS, of, relative
            runs.value[b, m], runs.error[b, m], runs.by_domain[b, m] = value, error, not relative
    return runs


def _episodes_of(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Runs are of one episode if they have its number and its domains; others are each alone."""
    names: dict[object, int] = {}
    out = []
    for place, run in enumerate(trajectories):
        number = run.meta.get("number")
        key = place if number is None else (run.meta.get("split_digest"), number, run.table.names)
        out.append(names.setdefault(key, len(names)))
    return np.array(out, dtype=np.int64)


def _describe(run: Trajectory, episodes: Episodes, b: int) -> None:
    """What is known of the run: all but how its domains answer to it."""
    size, budget = len(run.table), float(run.steps * run.tokens_per_step)
    field = field_codes(run.table.fields)
    episodes.size[b], episodes.preference[b] = size, run.preference
    episodes.budget[b], episodes.rows[b] = budget, budget / run.seq_len
    episodes.field[b, :size], episodes.prior[b, :size] = field, run.table.prior
    episodes.tokens[b, :size] = run.windows * run.seq_len / budget
    episodes.start[b, :size] = run.held_out[0]
    episodes.probe[b, :size], episodes.value[b, :size] = probe_weights(field, run.probed, run.preference)
    schedule = run.meta.get("schedule", {})
    episodes.warmup[b] = schedule.get("warmup_steps", 0) / run.steps
    peak = schedule.get("learning_rate", 0.0)
    episodes.lr_end[b] = schedule.get("min_lr", 0.0) / peak if peak > 0 else 0.0


def _weights(run: Trajectory) -> np.ndarray:
    """The mean mixture of each of STEPS equal parts of the run, float64 [STEPS, D]."""
    bounds = np.concatenate([[0], run.effect.clip(max=run.steps), [run.steps]])
    read = np.concatenate([np.zeros((1, len(run.table))), np.cumsum(run.weights * np.diff(bounds)[:, None], axis=0)])
    at = np.linspace(0, run.steps, STEPS + 1)
    # Two decisions may take effect in the same step: the later one is in force.
    last = np.append(np.diff(bounds) > 0, True)
    parts = [np.diff(np.interp(at, bounds[last], column[last])) for column in read.T]
    return np.stack(parts, axis=1) * STEPS / run.steps


def _measurements(run: Trajectory) -> list[tuple[float, np.ndarray, bool, float, float]]:
    """(part of the run, weight of each domain [D], whether it is a change, nats, error) each."""
    budget = run.steps * run.tokens_per_step
    each = np.eye(len(run.table))
    out = [
        (min(float(tokens) / budget, 1.0), each[d], False, float(loss), ERROR)
        for tokens, losses in zip(run.held_out_tokens, run.held_out, strict=True)
        for d, loss in enumerate(losses)
        if np.isfinite(loss)
    ]
    field = field_codes(run.table.fields)
    for name, losses in zip(run.feedback_names, run.feedback.T, strict=True):
        told = np.flatnonzero(np.isfinite(losses))
        code = {"source": SOURCE, "target": TARGET}.get(name)
        of = (field == code) & run.probed if code else np.array([name == own for own in run.table.names])
        if len(told) < 2 or not of.any():
            continue
        first, many = float(losses[told[0]]), np.sqrt(max(1.0, len(told) / FEEDBACKS))
        begun = (run.feedback_step[told[0]] + 1) / run.steps
        if begun > 1 / STEPS:
            continue
        for e in told[1:]:
            when = min((run.feedback_step[e] + 1) / run.steps, 1.0)
            change = float(losses[e]) - first
            out.append((float(when), of / of.sum(), True, change, float(many * np.hypot(ERROR, OTHER_TEXT * change))))
    return out
