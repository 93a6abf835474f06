"""Episodes of the simulator: the numbers that a run of continual pre-training is made of, and how they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixloader.agent.compiled import compiled
from mixloader.agent.features import NO_FIELD, SOURCE, TARGET
from mixloader.errors import ConfigError

MAX_DOMAINS = 56
"""Most domains of an episode: a few more than the 52 of the paper's domain space."""

RANGES = Path(__file__).with_name("ranges.json")
"""The ranges that episodes are drawn from; `python -m mixloader.agent.calibrate` makes them from real runs."""


class Episodes(NamedTuple):
    """B runs of up to D <= MAX_DOMAINS domains each; float64 unless said otherwise, of no meaning beyond `size`.

    Shapes [B, D]: field (int64), tokens (distinct, in parts of the budget), prior, probe (weight of the domain in
    its field's probe: sums to 1 over the probed domains of a field, 0 if no probe covers the domain), value (weight of
    its fall of loss in the score), start, gain, knee, power, hold, row_std, token_std (nats).
    Shapes [B, D, 2], of quick and slow forgetting: level, rate.
    Shapes [B, D, D]: transfer, similar. Shapes [B]: size (int64, domains), preference, budget (tokens), rows (rows of
    the whole run), warmup (part of the run), lr_end (last lr over the peak), bump (nats that the peak lr adds to
    training losses), memory (nats by which training losses are below held-out ones, times the logarithm of the epochs),
    relearn (part of what was gained that can be forgotten), wear (epochs after which a repeated token is worth 1/e).
    """

    size: np.ndarray
    field: np.ndarray
    tokens: np.ndarray
    prior: np.ndarray
    probe: np.ndarray
    value: np.ndarray
    start: np.ndarray
    gain: np.ndarray
    knee: np.ndarray
    power: np.ndarray
    level: np.ndarray
    rate: np.ndarray
    hold: np.ndarray
    row_std: np.ndarray
    token_std: np.ndarray
    transfer: np.ndarray
    similar: np.ndarray
    preference: np.ndarray
    budget: np.ndarray
    rows: np.ndarray
    warmup: np.ndarray
    lr_end: np.ndarray
    bump: np.ndarray
    memory: np.ndarray
    relearn: np.ndarray
    wear: np.ndarray


class Ranges(NamedTuple):
    """Lowest and highest value of what is drawn; log-uniform unless said otherwise. Nats, and parts of the run.

    target_gain, source_gain: nats that a domain gains at the reference, half of the run for its field at half of the
    peak learning rate; knee: in parts of that reference; power: uniform. target_level: nats forgotten when never
    practised; source_level: of the run, times level_domain. slow_level, slow_rate: of slow forgetting over quick
    forgetting, uniform. rate: of the run, times rate_domain. hold: of the run, times hold_domain and the root of the
    number of domains. transfer_*, similar_*: of two domains of the same field or of two fields, in a run (they become
    tanh of it); company: how far pairs differ from that by the domains' places, uneven: by chance (deviations of the
    logarithm, uniform).
    relearn, start, bump, row_std, token_std: uniform, memory and wear: see Episodes.
    """

    target_gain: tuple[float, float]
    source_gain: tuple[float, float]
    knee: tuple[float, float]
    power: tuple[float, float]
    target_level: tuple[float, float]
    source_level: tuple[float, float]
    level_domain: tuple[float, float]
    slow_level: tuple[float, float]
    rate: tuple[float, float]
    rate_domain: tuple[float, float]
    slow_rate: tuple[float, float]
    hold: tuple[float, float]
    hold_domain: tuple[float, float]
    transfer_same: tuple[float, float]
    transfer_cross: tuple[float, float]
    similar_same: tuple[float, float]
    similar_cross: tuple[float, float]
    company: tuple[float, float]
    uneven: tuple[float, float]
    relearn: tuple[float, float]
    wear: tuple[float, float]
    start: tuple[float, float]
    bump: tuple[float, float]
    memory: tuple[float, float]
    row_std: tuple[float, float]
    token_std: tuple[float, float]


def read_ranges(path: Path = RANGES) -> Ranges:
    """Read a JSON object {name: [lowest, highest]}. Raises ConfigError for another set of names or another form."""
    try:
        found = json.loads(path.read_text())
        pairs = {name: (float(low), float(high)) for name, (low, high) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read ranges from {path}: {error}; expected {{name: [lowest, highest]}}") from error
    if wrong := sorted(pairs.keys() ^ set(Ranges._fields)):
        raise ConfigError(f"{path} has missing or unknown ranges: {', '.join(wrong)}; expected those of {RANGES}")
    if wrong := sorted(name for name, (low, high) in pairs.items() if not 0 <= low <= high):
        raise ConfigError(f"{path}: {wrong[0]} is {list(pairs[wrong[0]])}; expected 0 <= lowest <= highest")
    return Ranges(**pairs)


def blank(count: int, width: int = MAX_DOMAINS) -> Episodes:
    """`count` episodes of up to `width` domains, whose numbers are all zero."""
    wide = (count, width)
    shapes: dict[str, tuple[int, ...]] = {"level": (*wide, 2), "rate": (*wide, 2)}
    for name in ("transfer", "similar"):
        shapes[name] = (*wide, width)
    for name in ("size", "preference", "budget", "rows", "warmup", "lr_end", "bump", "memory", "relearn", "wear"):
        shapes[name] = (count,)
    integers = ("size", "field")
    return Episodes(
        **{n: np.zeros(shapes.get(n, wide), np.int64 if n in integers else np.float64) for n in Episodes._fields}
    )


def draw(count: int, rng: np.random.Generator, ranges: Ranges | None = None) -> Episodes:
    """`count` runs with every number drawn anew from `ranges` (by default the shipped ones)."""
    episodes = blank(count)
    _draw_all(rng, ranges or read_ranges(), episodes)
    return cut(episodes)


def asked_anew(episodes: Episodes, rng: np.random.Generator, ranges: Ranges) -> Episodes:
    """The same dynamics under another preference, prior, probes, batch, budget and noise. The argument stays."""
    again = Episodes(*(array.copy() for array in episodes))
    _draw_tasks(rng, ranges, again)
    return again


def cut(episodes: Episodes) -> Episodes:
    """Without the padding that all of them have."""
    width, needed = episodes.field.shape[1], int(episodes.size.max())

    def short(array: np.ndarray) -> np.ndarray:
        axes = (slice(needed) if side == width else slice(None) for side in array.shape[1:])
        index = (slice(None), *axes)
        return np.ascontiguousarray(array[index])

    return Episodes(*map(short, episodes))


def take(episodes: Episodes, which: np.ndarray | slice) -> Episodes:
    """Some of the episodes."""
    return Episodes(*(np.ascontiguousarray(array[which]) for array in episodes))


def mask(episodes: Episodes) -> np.ndarray:
    """Which entries are domains and not padding, bool [B, D]."""
    return np.arange(episodes.field.shape[1]) < episodes.size[:, None]


def probe_weights(field: np.ndarray, probed: np.ndarray, preference: float) -> tuple[np.ndarray, np.ndarray]:
    """`probe` and `value` of Episodes, float64 [D] each, from the fields and which domains have probes (bool [D]).

    The score is preference * source + (1 - preference) * target, each the mean fall of held-out loss over the field's
    domains, probed or not. Giving those without a probe a fifth of it, as was tried, made an agent that gained on that
    score what half-and-half did not, and lost more on the domains that nobody asked after.
    """
    probe, value = np.zeros(len(field)), np.zeros(len(field))
    _weigh(field, probed, preference, probe, value)
    return probe, value


@compiled
def _weigh(field, probed, preference, probe, value):
    for code in (SOURCE, TARGET):
        total, covered = 0, 0
        for d in range(len(field)):
            total += field[d] == code
            covered += field[d] == code and probed[d]
        for d in range(len(field)):
            if field[d] != code:
                continue
            probe[d] = 1.0 / covered if probed[d] else 0.0
            value[d] = (preference if code == SOURCE else 1 - preference) / total


@compiled
def _uniform(rng, pair):
    return pair[0] + (pair[1] - pair[0]) * rng.random()


@compiled
def _log_uniform(rng, pair):
    return np.exp(_uniform(rng, (np.log(pair[0]), np.log(pair[1]))))


@compiled
def _draw_fields(rng, field):
    """Fields of 2 to MAX_DOMAINS domains: mostly both fields, sometimes only one, with or without others."""
    sources, targets, others = 1, 1, 0
    kind = rng.random()
    if kind >= 0.2:  # the commonest real case is one domain a field
        sources, targets = int(_log_uniform(rng, (1.0, 13.0))), int(_log_uniform(rng, (1.0, 7.0)))
        if kind > 0.94:  # topics as domains
            sources, targets = int(_log_uniform(rng, (8.0, 28.0))), int(_log_uniform(rng, (8.0, 28.0)))
        if rng.random() < 0.4:
            others = int(5 * rng.random())
        one_field = rng.random()
        if one_field < 0.04:
            sources, targets = 0, max(targets, 2)
        elif one_field < 0.08:
            sources, targets = max(sources, 2), 0
    size = min(sources + targets + others, len(field))
    field[:] = NO_FIELD
    field[:sources] = SOURCE
    field[sources : sources + targets] = TARGET
    return size


@compiled
def _draw_probed(rng, field, probed):
    """Which domains have probes: all of a field or a part, but at least one; none without a field."""
    share = 1.0 if rng.random() < 0.4 else 0.3 + 0.6 * rng.random()
    for code in (SOURCE, TARGET):
        covered, chosen, total = 0, -1, 0
        for d in range(len(field)):
            if field[d] == code:
                probed[d] = rng.random() < share
                covered += probed[d]
                total += 1
                if rng.random() * total < 1:
                    chosen = d
        if covered == 0 and chosen >= 0:
            probed[chosen] = True


@compiled
def _draw_company(rng, r, field, transfer, similar):
    """Transfer and similarity of all pairs, from places of the domains in a small space."""
    n = len(field)
    company, uneven = _uniform(rng, r.company), _uniform(rng, r.uneven)
    typical = np.array(
        [
            [_log_uniform(rng, r.transfer_same), _log_uniform(rng, r.transfer_cross)],
            [_log_uniform(rng, r.similar_same), _log_uniform(rng, r.similar_cross)],
        ]
    )
    place = np.empty((n, 3))
    for d in range(n):
        for k in range(3):
            place[d, k] = rng.standard_normal()
    for i in range(n):
        for j in range(n):
            apart = 0.0
            for k in range(3):
                apart += (place[i, k] - place[j, k]) ** 2
            # The squared distance of two standard normal points in three dimensions: 6 on average, deviation 4.9.
            near = np.exp(company * (6 - apart) / 4.9)
            cross = int(field[i] != field[j])
            transfer[i, j] = np.tanh(typical[0, cross] * near * np.exp(uneven * rng.standard_normal()))
            similar[i, j] = np.tanh(typical[1, cross] * near)
        transfer[i, i] = similar[i, i] = 1.0


@compiled
def _draw_prior(rng, field, tokens, prior):
    """What the user starts from: mostly natural, else uniform or a share a field."""
    kind = rng.random()
    prior[:] = tokens
    if kind >= 0.6:
        if kind < 0.8:
            prior[:] = 1.0
        source = 0.2 + 0.6 * rng.random()
        for code, share in ((SOURCE, source), (TARGET, 1 - source), (NO_FIELD, 0.1)):
            total = 0.0
            for d in range(len(field)):
                total += prior[d] if field[d] == code else 0.0
            for d in range(len(field)):
                if field[d] == code:
                    prior[d] *= share / total
    prior /= prior.sum()


@compiled
def _draw_domains(rng, r, e, b, n):
    """How each domain is learned and forgotten."""
    count = np.zeros(3)
    for d in range(n):
        count[e.field[b, d]] += 1
    source_level, rate = _log_uniform(rng, r.source_level), _log_uniform(rng, r.rate)
    slow_level, slow_rate = _uniform(rng, r.slow_level), _uniform(rng, r.slow_rate)
    hold = _log_uniform(rng, r.hold) * np.sqrt(n)
    for d in range(n):
        target = e.field[b, d] == TARGET
        reference = 0.25 / count[e.field[b, d]]
        knee, power = reference * _log_uniform(rng, r.knee), _uniform(rng, r.power)
        gained = _log_uniform(rng, r.target_gain) if target else _log_uniform(rng, r.source_gain)
        level = _log_uniform(rng, r.target_level) if target else source_level * _log_uniform(rng, r.level_domain)
        if rng.random() < 0.08:  # nothing helps it and nothing hurts it
            gained = level = 0.0
        e.start[b, d], e.knee[b, d], e.power[b, d] = _uniform(rng, r.start), knee, power
        e.gain[b, d] = gained / (1 - (1 + reference / knee) ** -power)
        e.level[b, d, 0], e.level[b, d, 1] = level, slow_level * level
        e.rate[b, d, 0] = rate * _log_uniform(rng, r.rate_domain)
        e.rate[b, d, 1] = slow_rate * e.rate[b, d, 0]
        e.hold[b, d] = hold * _log_uniform(rng, r.hold_domain)


@compiled
def _draw_task(rng, r, e, b, n):
    """What is asked of a run, from where, and how noisy its losses are."""
    field = e.field[b, :n]
    _draw_prior(rng, field, e.tokens[b, :n], e.prior[b, :n])
    e.preference[b] = 0.5 if rng.random() < 0.4 else rng.random()
    probed = np.zeros(n, dtype=np.bool_)
    _draw_probed(rng, field, probed)
    e.probe[b, :n], e.value[b, :n] = 0.0, 0.0
    _weigh(field, probed, e.preference[b], e.probe[b], e.value[b])
    few = rng.random() < 0.6
    e.rows[b] = _log_uniform(rng, (1200.0, 20_000.0) if few else (20_000.0, 1e7))
    e.budget[b] = e.rows[b] * 2.0 ** (7 + int(6 * rng.random()))
    e.bump[b], e.memory[b] = _uniform(rng, r.bump), _log_uniform(rng, r.memory)
    for d in range(n):
        e.row_std[b, d], e.token_std[b, d] = _uniform(rng, r.row_std), _uniform(rng, r.token_std)


@compiled
def _draw_all(rng, r, e):
    for b in range(len(e.size)):
        n = _draw_fields(rng, e.field[b])
        e.size[b] = n
        field, tokens = e.field[b, :n], e.tokens[b, :n]
        spread = 0.2 + 1.1 * rng.random()
        for d in range(n):
            tokens[d] = np.exp(spread * rng.standard_normal())
        tokens *= _log_uniform(rng, (0.5, 100.0)) / tokens.sum()
        _draw_company(rng, r, field, e.transfer[b], e.similar[b])
        _draw_domains(rng, r, e, b, n)
        _draw_task(rng, r, e, b, n)
        e.warmup[b] = 0.12 * rng.random()
        e.lr_end[b] = 1.0 if rng.random() < 0.1 else 0.3 * rng.random()
        e.relearn[b], e.wear[b] = _uniform(rng, r.relearn), _log_uniform(rng, r.wear)


@compiled
def _draw_tasks(rng, r, e):
    for b in range(len(e.size)):
        _draw_task(rng, r, e, b, e.size[b])
