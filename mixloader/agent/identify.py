"""Which episode of the simulator a real run is: its numbers, found from the losses that were measured.

Each number is exp(middle + half * z), where z = -1 and 1 are the bounds of its range in the logarithm, and z is taken
to be normal before anything is measured, so that its bounds hold 95 % of it. The most likely z is found by gradient
(the simulator's adjoint) for all runs at once. With `sample`, measurements and z's centres are moved by noise of their
errors first, which makes the result a draw from about what the measurements leave possible (randomise, then optimise;
Bardsley et al. 2014) and not its middle: what nothing was measured of keeps the spread of its range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixloader.agent.compiled import compiled
from mixloader.agent.episodes import Episodes, Ranges, mask
from mixloader.agent.features import TARGET
from mixloader.agent.measured import Runs
from mixloader.agent.simulator import pull_back_all, run

_DEVIATION = 1 / 1.96
_LEAST = 0.02
"""A range that begins at 0 is taken to begin at this part of its end."""

OF_RUN = (
    "source_level", "slow_level", "rate", "slow_rate", "hold", "transfer_same", "transfer_cross", "similar_same",
    "similar_cross", "company", "uneven", "relearn", "wear",
)  # fmt: skip
"""Names of Ranges with one number a run."""

OF_DOMAIN = (
    "target_gain", "source_gain", "knee", "power", "target_level", "level_domain", "rate_domain", "hold_domain",
)  # fmt: skip
"""Names of Ranges with one number a domain; of the two gains, and of target_level and level_domain, it has one."""

_FITTED = ("start", "gain", "knee", "power", "level", "rate", "hold", "transfer", "similar", "relearn", "wear")


class Identified(NamedTuple):
    """What was found of B runs.

    values: by the names of Ranges, float64 [B] or [B, D]; NaN where a domain has none. episodes: the runs as episodes.
    predicted: float64 [B, M], the measurements as the simulator has them.
    """

    values: dict[str, np.ndarray]
    episodes: Episodes
    predicted: np.ndarray


@compiled
def _measure(size, when, of, relative, held_out, out):
    """The measurements [B, M] of held-out losses [B, T + 1, D], into out."""
    for b in range(out.shape[0]):
        for m in range(out.shape[1]):
            low = min(int(when[b, m]), held_out.shape[1] - 2)
            after = when[b, m] - low
            for d in range(size[b]):
                there = (1 - after) * held_out[b, low, d] + after * held_out[b, low + 1, d]
                out[b, m] += of[b, m, d] * (there - relative[b, m] * held_out[b, 0, d])


@compiled
def _back_measure(size, when, of, relative, cotangent, out):
    """Adjoint of `_measure`: adds to out [B, T + 1, D]."""
    for b in range(cotangent.shape[0]):
        for m in range(cotangent.shape[1]):
            low = min(int(when[b, m]), out.shape[1] - 2)
            after = when[b, m] - low
            for d in range(size[b]):
                c = cotangent[b, m] * of[b, m, d]
                out[b, low, d] += (1 - after) * c
                out[b, low + 1, d] += after * c
                out[b, 0, d] -= relative[b, m] * c


class _Measured(torch.autograd.Function):
    """The measurements [B, M] of runs from the numbers of _FITTED, in order."""

    @staticmethod
    def forward(ctx, runs, *numbers):
        arrays = {name: number.detach().numpy() for name, number in zip(_FITTED, numbers, strict=True)}
        ctx.runs, ctx.episodes = runs, runs.episodes._replace(**arrays)
        ctx.history = run(ctx.episodes, runs.weights)
        out = np.zeros_like(runs.when)
        _measure(runs.episodes.size, runs.when, runs.of, runs.relative, ctx.history.held_out, out)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx, cotangent):
        runs, by_losses = ctx.runs, np.zeros_like(ctx.history.held_out)
        size, c = runs.episodes.size, cotangent.contiguous().numpy()
        _back_measure(size, runs.when, runs.of, runs.relative, c, by_losses)
        _, grads = pull_back_all(ctx.episodes, runs.weights, ctx.history, by_losses)
        return None, *(torch.from_numpy(getattr(grads, name)) for name in _FITTED)


def identify(
    runs: Runs,
    ranges: Ranges,
    *,
    use: np.ndarray | None = None,
    sample: np.random.Generator | None = None,
    alone: bool = False,
    iterations: int = 300,
) -> Identified:
    """The numbers of every run; Adam on all z at once, each episode's problem being its own.

    Runs of one episode (Runs.episode) have the same numbers. What one mixture brought says little of what another
    would have: fitted to single runs, the simulator was off by 0.06 nats on average in favour of an agent that had been
    fitted in it; fitted to several runs of each episode, by 0.02, and it told 95 % of what set them apart.
    use: bool [B, M], the measurements that may be known (by default all). alone: domains neither teach each other nor
    are forgotten, a power law each. Deterministic given `sample`.
    """
    model = _Model(runs, ranges, alone)
    known = np.isfinite(runs.error) if use is None else use & np.isfinite(runs.error)
    value, weight = runs.value, np.where(known, 1 / runs.error**2, 0.0)
    centre = {name: torch.zeros_like(z) for name, z in model.z.items()}
    if sample is not None:
        value = value + sample.standard_normal(value.shape) * np.where(known, runs.error, 0.0)
        centre = {
            name: torch.from_numpy(_DEVIATION * sample.standard_normal(tuple(z.shape))) for name, z in model.z.items()
        }
    expected, precision = torch.from_numpy(value), torch.from_numpy(weight)
    with torch.no_grad():
        for name, z in model.z.items():
            z.copy_(centre[name])
    optimizer = torch.optim.Adam(model.z.values(), lr=0.2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=0.005)
    for _ in range(iterations):
        optimizer.zero_grad()
        misfit = (precision * (model.predict(model.numbers()) - expected).square()).sum()
        strain = sum(((z - centre[name]) / _DEVIATION).square().sum() for name, z in model.z.items())
        (0.5 * (misfit + strain)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model.result()


class _Model:
    """z of all runs, and what follows from it."""

    def __init__(self, runs: Runs, ranges: Ranges, alone: bool):
        e = runs.episodes
        self.runs, self.alone = runs, alone
        _, of_run = np.unique(runs.episode, return_inverse=True)
        self._of_run = torch.from_numpy(of_run)  # which row of z is the run's
        shape = (int(of_run.max()) + 1, e.field.shape[1])
        of_domain = ("start", "gained", "knee", "power", "level", "rate_domain", "hold_domain")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(of_domain, shape) | dict.fromkeys(OF_RUN, shape[:1])
        self.z = {name: torch.zeros(s, dtype=torch.float64) for name, s in shapes.items()}
        for name in ("near", "by_chance"):
            self.z[name] = torch.zeros((*shape, shape[1]), dtype=torch.float64)
        for z in self.z.values():
            z.requires_grad_()
        self._bounds = {}
        for name, (low, high) in ranges._asdict().items():
            bounds = np.log([max(low, _LEAST * high, 1e-12), max(high, 1e-12)])
            self._bounds[name] = (float(bounds.mean()), float(np.ptp(bounds) / 2))
        self._there = torch.from_numpy(mask(e))
        self._is_target = torch.from_numpy(e.field == TARGET)
        self._cross = torch.from_numpy(e.field[:, :, None] != e.field[:, None])
        count = (e.field[:, :, None] == e.field[:, None]) & mask(e)[:, None]
        self._reference = torch.from_numpy(0.25 / np.maximum(count.sum(-1), 1))
        self._root = torch.from_numpy(np.sqrt(e.size)[:, None])
        self._start = torch.from_numpy(e.start)

    def _value(self, name: str, z: Tensor) -> Tensor:
        middle, half = self._bounds[name]
        return torch.exp(middle + half * z)

    def _of_field(self, target: str, source: str, z: Tensor) -> Tensor:
        return torch.where(self._is_target, self._value(target, z), self._value(source, z))

    def numbers(self) -> dict[str, Tensor]:
        """The numbers of _FITTED, from z, as `episodes.draw` makes them."""
        z = self._of_each()
        own = {name: self._value(name, z[name]) for name in OF_RUN}
        knee, power = self._reference * self._value("knee", z["knee"]), self._value("power", z["power"])
        gained = self._of_field("target_gain", "source_gain", z["gained"])
        level = self._of_field("target_level", "level_domain", z["level"])
        level = torch.where(self._is_target, level, level * own["source_level"][:, None])
        rate = own["rate"][:, None] * self._value("rate_domain", z["rate_domain"])
        near = own["company"][:, None, None] * (z["near"] + z["near"].transpose(1, 2)) / (2**0.5 * _DEVIATION)
        chance = own["uneven"][:, None, None] * z["by_chance"] / _DEVIATION
        same = torch.eye(near.shape[-1], dtype=torch.bool)

        def pairs(name: str, differs: Tensor) -> Tensor:
            typical = torch.where(self._cross, own[f"{name}_cross"][:, None, None], own[f"{name}_same"][:, None, None])
            return torch.where(same, torch.ones(()).double(), torch.tanh(typical * torch.exp(differs)))

        numbers = {
            "start": self._start + z["start"] * 0.05, "gain": gained / (1 - (1 + self._reference / knee) ** -power),
            "knee": knee, "power": power, "level": torch.stack([level, own["slow_level"][:, None] * level], -1),
            "rate": torch.stack([rate, own["slow_rate"][:, None] * rate], -1),
            "hold": own["hold"][:, None] * self._root * self._value("hold_domain", z["hold_domain"]),
            "transfer": pairs("transfer", near + chance), "similar": pairs("similar", near),
            "relearn": own["relearn"], "wear": own["wear"],
        }  # fmt: skip
        if self.alone:
            only = same.double().expand_as(numbers["transfer"])
            numbers |= {"transfer": only, "similar": only, "level": torch.zeros_like(numbers["level"])}
            numbers["relearn"] = torch.zeros_like(numbers["relearn"])
        return numbers

    def _of_each(self) -> dict[str, Tensor]:
        """z of every run."""
        return {name: z[self._of_run] for name, z in self.z.items()}

    def predict(self, numbers: dict[str, Tensor]) -> Tensor:
        """The measurements [B, M] of runs with these numbers."""
        return _Measured.apply(self.runs, *(numbers[name].contiguous() for name in _FITTED))

    def result(self) -> Identified:
        numbers, of_each = self.numbers(), self._of_each()
        values = {name: self._value(name, of_each[name]) for name in OF_RUN}
        values |= {name: self._value(name, of_each[name]) for name in ("knee", "power", "rate_domain", "hold_domain")}
        for target, source, z in (
            ("target_gain", "source_gain", of_each["gained"]),
            ("target_level", "level_domain", of_each["level"]),
        ):
            missing = torch.full_like(z, torch.nan)
            values[target] = torch.where(self._is_target, self._value(target, z), missing)
            values[source] = torch.where(self._is_target, missing, self._value(source, z))
        found = {
            name: torch.where(self._there, value, torch.nan) if value.dim() == 2 else value
            for name, value in values.items()
        }
        arrays = {name: number.numpy() for name, number in numbers.items()}
        return Identified(
            {name: value.numpy() for name, value in found.items()},
            self.runs.episodes._replace(**arrays),
            self.predict(numbers).numpy(),
        )
