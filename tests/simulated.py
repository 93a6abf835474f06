"""Trajectories of the simulator itself, so that what there is to find in them is known."""

import numpy as np

from mixloader.agent import episodes as drawing
from mixloader.agent.episodes import Episodes, Ranges, mask
from mixloader.agent.features import NO_FIELD, SOURCE, TARGET
from mixloader.agent.measured import STEPS
from mixloader.agent.simulator import influence_now, run
from mixloader.agent.trajectory import Trajectory
from mixloader.observation import DomainTable

RANGES = Ranges(
    target_gain=(0.3, 2.5),
    source_gain=(0.01, 0.25),
    knee=(0.02, 3.0),
    power=(0.2, 1.5),
    target_level=(0.02, 0.5),
    source_level=(0.2, 2.0),
    level_domain=(0.5, 2.0),
    slow_level=(0.0, 0.6),
    rate=(3.0, 40.0),
    rate_domain=(0.6, 1.7),
    slow_rate=(0.05, 0.3),
    hold=(1.0, 10.0),
    hold_domain=(0.6, 1.7),
    transfer_same=(0.02, 0.7),
    transfer_cross=(0.003, 0.2),
    similar_same=(0.03, 0.45),
    similar_cross=(0.003, 0.15),
    company=(0.3, 1.0),
    uneven=(0.1, 0.5),
    relearn=(0.0, 0.5),
    wear=(3.0, 30.0),
    start=(1.5, 4.5),
    bump=(0.0, 0.15),
    memory=(0.05, 1.0),
    row_std=(0.1, 0.45),
    token_std=(1.5, 3.0),
)
"""The tests' own, so that they stand whatever the shipped ones are calibrated to."""

PLAN_STEPS, ROWS, SEQ_LEN = 128, 16, 128
BUDGET = PLAN_STEPS * ROWS * SEQ_LEN
NOISE = 0.01
KINDS = {NO_FIELD: None, SOURCE: "source", TARGET: "target"}


def draw(count: int, rng: np.random.Generator) -> Episodes:
    """Episodes of RANGES."""
    return drawing.draw(count, rng, RANGES)


def made_runs(count, seed, episodes=None):
    """Trajectories of a random walk over mixtures, a decision every second plan step, and their episodes (or drawn)."""
    rng = np.random.default_rng(seed)
    episodes = draw(count, rng) if episodes is None else episodes
    shape = (count, STEPS, episodes.field.shape[1])
    walk = rng.normal(0, 1, (count, 1, shape[2])) + rng.normal(0, 0.3, shape).cumsum(1)
    weights = np.exp(walk) * np.maximum(episodes.prior[:, None], 1e-9) * mask(episodes)[:, None]
    weights /= weights.sum(-1, keepdims=True)
    episodes = episodes._replace(budget=np.full(count, float(BUDGET)))
    history = run(episodes, weights)
    return [made_run(episodes, weights[b], history, b, rng) for b in range(count)], episodes


def made_run(e, weights, history, b, rng):
    n, decisions, losses = int(e.size[b]), STEPS, history.held_out[b]
    fields = tuple(KINDS[code] for code in e.field[b, :n].tolist())
    windows = np.maximum(e.tokens[b, :n] * BUDGET / SEQ_LEN, 1).astype(np.int64)
    table = DomainTable(tuple(f"d{d}" for d in range(n)), fields, (None,) * n, windows * SEQ_LEN, e.prior[b, :n])
    step = 2 * np.arange(decisions) + 1
    points = np.linspace(0, STEPS, 5).astype(int)
    names = [name for name in ("source", "target") if name in fields]
    told = np.stack([np.where(e.field[b] == code, e.probe[b], 0) @ losses.T for code in (SOURCE, TARGET)], 1)
    told = told[:, [code - SOURCE for code in (SOURCE, TARGET) if KINDS[code] in names]] + 0.2
    wide, influence = (decisions, n), np.empty((n, 2))
    influence_now(e, b, history, STEPS // 2, influence)
    influence = np.where([(e.field[b] == code).any() for code in (SOURCE, TARGET)], 1e3 * influence, np.nan)[None]
    return Trajectory(
        table=table, windows=windows, step=step, effect=step + 1, tokens=(step + 1) * ROWS * SEQ_LEN,
        rows_per_step=ROWS, seq_len=SEQ_LEN, token_budget=BUDGET, weights=weights[[*range(STEPS), -1], :n],
        counts=np.zeros(wide, dtype=np.int64), loss=np.full(wide, np.nan), loss_std=np.full(wide, np.nan),
        loss_tokens=np.zeros(wide, dtype=np.int64), feedback_names=tuple(names),
        feedback_step=2 * np.arange(STEPS + 1) - 1, feedback=told + NOISE * rng.standard_normal(told.shape),
        influence_fields=("source", "target"), influence_at=np.array([STEPS // 2 - 1]), influence=influence,
        influence_std=influence, influence_rows=np.ones((1, n), dtype=np.int64),
        influence_step=np.ones((1, n), dtype=np.int64), probe_step=np.ones((1, 2), dtype=np.int64),
        held_out=losses[points, :n] + NOISE * rng.standard_normal((5, n)), held_out_tokens=points * 2 * ROWS * SEQ_LEN,
        probed=e.probe[b, :n] > 0, preference=float(e.preference[b]),
        meta={"schedule": {"learning_rate": 1e-3, "min_lr": 1e-3 * e.lr_end[b],
                           "warmup_steps": e.warmup[b] * PLAN_STEPS, "steps": PLAN_STEPS}},
    )  # fmt: skip
