"""Continual pre-training in miniature: how losses of domains answer to a mixture, for fitting the agent.

An episode is a run whose rates are drawn at random. Time is the part p of the token budget, in [0, 1]. A domain d
has learned x_d effective tokens and forgotten f_d + g_d nats, quickly and slowly; its held-out loss is

    loss_d = start_d - gain_d * (1 - (1 + x_d / knee_d)^-power_d) + f_d + g_d
    dx_d/dp = lr * sum_j transfer_dj * w_j * fresh_j          (fresh_j falls with the epochs of domain j)
    df_d/dp = lr * rate_d * ((1 - s_d) * (level_d - f_d) - hold_d * s_d * f_d),   s_d = sum_j similar_dj * w_j

and g_d as f_d, with a level and a rate of its own. So loss falls by a power law (Hestness et al., arXiv
1712.00409), repeated tokens are worth less (Muennighoff et al., arXiv 2305.16264), what is not practised is
forgotten towards a level, and practice brings it back. Everything is batched, padded and differentiable in the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mixloader.agent.features import NO_FIELD, SOURCE, TARGET

MAX_DOMAINS = 24


@dataclass(frozen=True)
class Episodes:
    """B random runs of up to MAX_DOMAINS domains each; all tensors float32 unless said otherwise.

    Shapes [B, D], zero or harmless where padded: mask (bool), field (int64), tokens (distinct, in parts of the
    budget), prior, start, gain, knee, power, hold, row_std, token_std (nats).
    Shapes [B, D, 2], of quick and slow forgetting: level, rate.
    Shapes [B, D, D]: transfer, similar. Shapes [B]: preference, budget (tokens), rows (rows of the whole run),
    warmup (part of the run), lr_end (last lr over the peak), bump (nats that the peak lr adds to training losses),
    relearn (part of what was gained that can be forgotten), wear (epochs after which a repeated token is worth 1/e).
    """

    mask: Tensor
    field: Tensor
    tokens: Tensor
    prior: Tensor
    start: Tensor
    gain: Tensor
    knee: Tensor
    power: Tensor
    level: Tensor
    rate: Tensor
    hold: Tensor
    row_std: Tensor
    token_std: Tensor
    transfer: Tensor
    similar: Tensor
    preference: Tensor
    budget: Tensor
    rows: Tensor
    warmup: Tensor
    lr_end: Tensor
    bump: Tensor
    relearn: Tensor
    wear: Tensor

    def __len__(self) -> int:
        return len(self.budget)

    @classmethod
    def draw(cls, count: int, rng: np.random.Generator) -> Episodes:
        """`count` runs with every rate drawn anew; the ranges are in `_draw_one`."""
        drawn = [_draw_one(rng) for _ in range(count)]
        return cls(**{f.name: torch.from_numpy(np.stack([one[f.name] for one in drawn])) for f in fields(cls)})


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _draw_fields(rng: np.random.Generator) -> np.ndarray:
    """Fields of 2 to MAX_DOMAINS domains: mostly both fields, sometimes only one, with or without others."""
    sources, targets = int(_log_uniform(rng, 1, 13)), int(_log_uniform(rng, 1, 7))
    others = int(rng.integers(0, 5)) if rng.random() < 0.4 else 0
    if rng.random() < 0.08:
        sources, targets = (0, max(targets, 2)) if rng.random() < 0.5 else (max(sources, 2), 0)
    return np.repeat([SOURCE, TARGET, NO_FIELD], [sources, targets, others])[:MAX_DOMAINS]


def _draw_company(rng: np.random.Generator, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transfer and similarity [D, D] from places of the domains in a small space, fields apart from each other."""
    centre = rng.normal(0, 1.0, (3, 3))
    place = centre[field] + rng.normal(0, rng.uniform(0.3, 1.2), (len(field), 3))
    near = np.exp(-((place[:, None] - place[None]) ** 2).sum(-1) / (2 * rng.uniform(0.3, 1.2) ** 2))
    uneven = np.exp(rng.normal(0, 0.3, near.shape))
    transfer = np.minimum(rng.uniform(0, 0.8) * near * uneven, 1.0)
    similar = rng.uniform(0.05, 0.6) * near
    np.fill_diagonal(transfer, 1.0)
    np.fill_diagonal(similar, 1.0)
    return transfer, similar


def _draw_prior(rng: np.random.Generator, field: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """What the user starts from: mostly natural, else uniform or a share a field."""
    kind = rng.random()
    if kind < 0.6:
        return tokens / tokens.sum()
    prior = np.ones(len(field)) if kind < 0.8 else tokens.copy()
    share = rng.uniform(0.2, 0.8)
    for code, part in ((SOURCE, share), (TARGET, 1 - share), (NO_FIELD, 0.1)):
        inside = field == code
        prior[inside] *= part / max(prior[inside].sum(), 1e-9)
    return prior / prior.sum()


def _draw_one(rng: np.random.Generator) -> dict[str, np.ndarray]:
    field = _draw_fields(rng)
    n = len(field)
    tokens = np.exp(rng.normal(0, rng.uniform(0.2, 1.3), n))
    tokens *= _log_uniform(rng, 0.5, 100) / tokens.sum()
    transfer, similar = _draw_company(rng, field)
    is_target = field == TARGET
    # What a domain gains at the reference, half of the run for its field at half of the peak learning rate.
    reference = 0.25 / np.maximum(np.bincount(field, minlength=3)[field], 1)
    knee = reference * _log_uniform(rng, 0.02, 3.0, n)
    power = rng.uniform(0.2, 1.5, n)
    at_reference = np.where(is_target, _log_uniform(rng, 0.3, 2.5, n), _log_uniform(rng, 0.01, 0.25, n))
    gain = at_reference / (1 - (1 + reference / knee) ** -power)
    # Source losses rise by `level` when never practised; how fast differs more between runs than between domains.
    level = np.where(
        is_target, _log_uniform(rng, 0.02, 0.5, n), _log_uniform(rng, 0.2, 2.0) * _log_uniform(rng, 0.5, 2.0, n)
    )
    rate = _log_uniform(rng, 3, 40) * _log_uniform(rng, 0.6, 1.7, n)
    slow_level, slow_rate = rng.uniform(0, 0.6) * level, rng.uniform(0.05, 0.3) * rate
    hold = _log_uniform(rng, 1.0, 10) * np.sqrt(n) * _log_uniform(rng, 0.6, 1.7, n)
    useless = rng.random(n) < 0.08
    gain[useless], level[useless], slow_level[useless] = 0.0, 0.0, 0.0
    rows = _log_uniform(rng, 1500, 20_000) if rng.random() < 0.6 else _log_uniform(rng, 20_000, 1e7)

    def padded(values: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """The first axes of a [D] or [D, D] array padded to MAX_DOMAINS."""
        out = np.full((MAX_DOMAINS,) * values.ndim, fill, dtype=np.float32)
        out[(slice(0, n),) * values.ndim] = values
        return out

    numbers = {
        "preference": 0.5 if rng.random() < 0.4 else rng.uniform(0, 1),
        "budget": rows * 2 ** rng.integers(7, 13), "rows": rows,
        "warmup": rng.uniform(0, 0.12), "lr_end": 1.0 if rng.random() < 0.1 else rng.uniform(0, 0.3),
        "bump": rng.uniform(0, 0.15), "relearn": rng.uniform(0, 0.5), "wear": _log_uniform(rng, 3, 30),
    }  # fmt: skip
    codes = np.full(MAX_DOMAINS, NO_FIELD, dtype=np.int64)
    codes[:n] = field
    return {
        "mask": np.arange(MAX_DOMAINS) < n, "field": codes, "tokens": padded(tokens, 1.0),
        "prior": padded(_draw_prior(rng, field, tokens)), "start": padded(rng.uniform(1.5, 4.5, n)),
        "gain": padded(gain), "knee": padded(knee, 1.0), "power": padded(power, 1.0),
        "level": np.stack([padded(level), padded(slow_level)], -1),
        "rate": np.stack([padded(rate, 1.0), padded(slow_rate, 1.0)], -1),
        "hold": padded(hold, 1.0), "row_std": padded(rng.uniform(0.1, 0.45, n)),
        "token_std": padded(rng.uniform(1.5, 3.0, n)), "transfer": padded(transfer), "similar": padded(similar),
        **{name: np.float32(value) for name, value in numbers.items()},
    }  # fmt: skip


class Simulator:
    """Runs a batch of episodes from start to end in `steps` steps of equal tokens.

    Gradients flow from `held_out` and `score` to the weights that `step` was given.
    """

    def __init__(self, episodes: Episodes, steps: int, rng: np.random.Generator):
        self.episodes, self.steps, self.done = episodes, steps, 0
        self._rng = rng
        self._learned = torch.zeros_like(episodes.start)
        self._forgotten = torch.zeros_like(episodes.level)
        self.read = torch.zeros_like(episodes.start)
        """What was read of each domain, in parts of the budget, [B, D]."""
        self._rows = rng.random(episodes.start.shape)  # where in a row each domain's quota stands

    @property
    def learning_rate(self) -> Tensor:
        """Of the next step, over its peak: warm-up, then a cosine to lr_end; [B]."""
        e, p = self.episodes, (self.done + 0.5) / self.steps
        falling = e.lr_end + (1 - e.lr_end) * 0.5 * (
            1 + torch.cos(torch.pi * (p - e.warmup).clamp_min(0) / (1 - e.warmup))
        )
        return torch.minimum(p / e.warmup.clamp_min(1e-6), falling)

    def _reduction(self) -> Tensor:
        e = self.episodes
        return e.gain * (1 - (1 + self._learned / e.knee) ** -e.power)

    def held_out(self) -> Tensor:
        """Held-out loss of each domain now, nats a token, [B, D]."""
        return self.episodes.start - self._reduction() + self._forgotten.sum(-1)

    def step(self, weights: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Train one step on `weights` [B, D] (zero where padded).

        Returns what is seen of it, each [B, D]: mean training loss (NaN where no row was drawn), its standard
        deviation over tokens, and the number of tokens.
        """
        e, dt = self.episodes, 1 / self.steps
        seen = self._observe(weights.detach())
        lr = self.learning_rate[:, None]
        epochs = self.read / e.tokens
        fresh = torch.exp(-(epochs - 1).clamp_min(0) / e.wear[:, None])
        useful = torch.einsum("bij,bj->bi", e.transfer, weights * fresh)
        practice = torch.einsum("bij,bj->bi", e.similar, weights).clamp(0, 1)
        # Of what was gained, a part can be forgotten too: quickly, like the rest of it.
        forgettable = e.relearn[:, None] * self._reduction().clamp_min(0)
        level = e.level + torch.stack([forgettable, torch.zeros_like(forgettable)], dim=-1)
        pull = (1 - practice) + e.hold * practice
        rest = level * ((1 - practice) / pull)[..., None]
        # The exact solution over the step for constant weights: stable for any rate.
        kept = torch.exp(-e.rate * (lr * pull * dt)[..., None])
        self._forgotten = rest + (self._forgotten - rest) * kept
        self._learned = self._learned + lr * useful * dt
        self.read = self.read + weights * dt
        self.done += 1
        return seen

    def _observe(self, weights: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        e = self.episodes
        quota = self._rows + (weights * e.rows[:, None] / self.steps).double().numpy()
        rows = np.floor(quota)
        self._rows = quota - rows
        # A repeated token's training loss is lower than its held-out loss.
        memorised = 0.1 * torch.log1p((self.read / e.tokens - 1).clamp_min(0))
        loss = (self.held_out() + e.bump[:, None] * self.learning_rate[:, None] - memorised).detach().numpy()
        noise = self._rng.standard_normal(loss.shape) * e.row_std.numpy() / np.sqrt(np.maximum(rows, 1))
        token_rows = (e.budget / e.rows).numpy()[:, None]
        loss = np.where(rows > 0, loss + noise, np.nan)
        return loss, np.where(rows > 0, e.token_std.numpy(), np.nan), (rows * token_rows).astype(np.int64)

    def improvements(self) -> tuple[Tensor, Tensor]:
        """Mean fall of held-out loss over the source domains and over the target domains, [B] each; 0 without any."""
        e = self.episodes
        fall = e.start - self.held_out()
        by_field = [(e.field == code) & e.mask for code in (SOURCE, TARGET)]
        source, target = [(fall * inside).sum(1) / inside.sum(1).clamp_min(1) for inside in by_field]
        return source, target

    def score(self) -> Tensor:
        """The balanced score: preference * source improvement + (1 - preference) * target improvement, [B]."""
        source, target = self.improvements()
        return self.episodes.preference * source + (1 - self.episodes.preference) * target
