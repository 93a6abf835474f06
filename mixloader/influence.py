"""Influence: by how much reading each domain lowers the loss on each evaluation field, from ordinary training steps.

To first order, a step of SGD on a row lowers a field's loss by the inner product of the row's gradient with the
field's. Both are sketched (sketch.py): of training rows on every `stride`-th plan step, without a pass of their own;
of the fields by a small probe batch of held-out rows on every `probe_every`-th. Their decayed means (row_sums.py)
give a D x F matrix with standard errors, and the inner products of the domains with each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixloader.batch import IGNORED
from mixloader.errors import ConfigError, StateError
from mixloader.evaluate import logits_of
from mixloader.influence_table import InfluenceSnapshot
from mixloader.probe_rows import ProbeRows, Probes, field_probes
from mixloader.row_sums import RowSums
from mixloader.sketch import Pass, Sketcher, plain_name
from mixloader.stats import recomputing

if TYPE_CHECKING:
    from mixloader.loader import MixLoader

_PROBE_SHARE = 0.0025  # of the arithmetic of training, by default
_STRIDE = 20  # plan steps
_LEAST_SKETCHED, _LEAST_PROBES = 32, 16  # plan steps of a run whose length is known


class Influence:
    """Measures influence while a model trains. Give it to Mixer(influence=...), which drives it.

    model: before or after DDP, FSDP or torch.compile wrap it, but before its first compiled call. probes: batches by
        field (probe_rows.py); by default the held-out windows of the loader's domains, by field.
    rank, layers: of the sketches, see Sketcher. stride: plan steps from one with sketches to the next, by default 20.
    probe_every, probe_rows: plan steps between probes, and rows a field in each. By default as many steps as keep the
        probes within 0.25 % of the arithmetic of training, and not less than `stride`.
    half_life: plan steps after which a row's or a probe's weight has halved; by default twice `probe_every`.
    logits: from (model, input_ids [n, T]) to logits [n, T, V]; by default model(input_ids), its `.logits` or its
        first part. dtype: autocast of the probe, torch.bfloat16 where training uses it. seed: of the projections.

    A row's gradient is that of the sum of its token losses, whatever the loss was divided by or scaled with. Rows whose
    gradient is not finite (as under GradScaler, now and then) are left out. Memory: (D + F) x layers x r² floats.
    The defaults cost 0.3 to 0.5 % of a step (GPT-2 124M, estimated), except in short runs: where the loader's max_steps
    is known, there are 32 steps with sketches and 16 probes at least.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Probes | None = None,
        *,
        rank: int = 32,
        layers: str | Sequence[str] | None = None,
        stride: int | None = None,
        probe_every: int | None = None,
        probe_rows: int = 8,
        half_life: float | None = None,
        seed: int = 0,
        logits: Callable[[nn.Module, Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        counts = {"rank": rank, "stride": stride, "probe_every": probe_every, "probe_rows": probe_rows}
        for name, value in counts.items():
            if (type(value) is not int or value < 1) and (value is not None or name not in ("stride", "probe_every")):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
        if half_life is not None and not 0 < half_life < float("inf"):
            raise ConfigError(f"half_life is {half_life!r}; expected plan steps above 0")
        self.model, self._probes = model, probes
        self.rank, self.probe_rows, self.seed, self.dtype = rank, probe_rows, seed, dtype
        self._stride, self._probe_every, self._half_life = stride, probe_every, half_life
        self._logits = logits_of if logits is None else logits
        self._sketcher = Sketcher(model, rank, layers, seed)
        self.layers = self._sketcher.names
        self._by_backward = False
        self._passes: list[Pass] = []
        self._told = False  # whether a loss of this plan step has said whose its rows are
        self.step = 0  # the plan step that comes next

    def begin(
        self,
        names: Sequence[str],
        batch_size: int,
        rows: ProbeRows | None = None,
        *,
        step_rows: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Begin a run on domains `names`, in micro-batches of `batch_size` rows. A Mixer calls it.

        step_rows: rows of a plan step over all ranks, by default `batch_size`. steps: of the run, if that is known.
        """
        self.names, self.batch_size = tuple(names), batch_size
        if rows is None:
            if self._probes is None:
                raise ConfigError("influence has no probes; give Influence `probes`, or use it with a Mixer")
            rows = ProbeRows(self._probes)
        self._rows, self.fields = rows, rows.fields
        self.stride = self._stride or _at_most(_STRIDE, steps, _LEAST_SKETCHED)
        affordable = affordable_probe_every(len(self.fields) * self.probe_rows, step_rows or batch_size)
        self.probe_every = self._probe_every or _at_most(max(self.stride, affordable), steps, _LEAST_PROBES)
        self.half_life = float(self._half_life or 2 * self.probe_every)
        self._device = self._sketcher.device()
        if self._device.type == "meta":
            raise ConfigError("the model has no parameters yet (they are on 'meta'); make them before the Mixer")
        sides = (len(self.names), len(self.fields))
        size, device = self._sketcher.size, self._device
        self._domain_sums = RowSums(sides[0], size, sides[1], self.half_life, device)
        self._field_sums = RowSums(sides[1], size, sides[0], self.half_life, device)
        self._latest: InfluenceSnapshot | None = None
        self._sketched = self._probed = False  # whether the sums hold rows
        self.at(0)

    def begin_with(self, loader: MixLoader) -> None:
        """begin() on the domains of a loader; its held-out windows are the probes, if none were given."""
        probes = field_probes(loader) if self._probes is None else self._probes
        rows = ProbeRows(probes, loader.vocab_size)
        self.begin(loader.names, loader.batch_size, rows, step_rows=loader.global_batch, steps=loader.max_steps)
        self.at(loader.step)

    @property
    def sketching(self) -> bool:
        """True if the plan step that comes next, or is under way, is one with sketches."""
        return self._sketcher.enabled

    def at(self, step: int) -> None:
        """Plan step `step` comes next."""
        self.step, self._passes, self._told = step, [], False
        self._sketcher.enabled = (step + 1) % self.stride == 0
        if self._sketcher.enabled:
            self._sketcher.prepare(self.batch_size, self._device)

    # In a training step

    def rows(
        self,
        loss: Tensor,
        domain_ids: Tensor,
        divisor: Tensor | float | None = None,
        domain_weights: Tensor | None = None,
    ) -> None:
        """Say whose the rows of the forward pass were that `loss` came of, before its backward pass.

        domain_cross_entropy does it by itself for the statistics of a Mixer. loss: the sum of the token losses over
        `divisor` (None: 1), or the token losses; what it is multiplied with on the way to backward() is noticed.
        domain_ids: [B], or one a token, the same within a row; -1 counts nowhere. domain_weights: [D], factors of
        the token losses, which are divided out again.
        """
        if not self._sketcher.enabled or not loss.requires_grad or recomputing():
            return
        self._collect()
        self._sketcher.running = None
        now = Pass(self._sketcher, domain_ids, divisor, domain_weights)
        loss.register_hook(now.begin)
        self._passes.append(now)
        self._told = True
        self._sketcher.prepare(self.batch_size, self._device)

    def _collect(self) -> None:
        """Add the rows of the passes that have been through backward."""
        done = [each for each in self._passes if each.scale is not None]
        self._passes = [each for each in self._passes if each.scale is None]
        if done:
            self._settle()
        for each in done:
            sketches, groups, units = each.rows()
            self._domain_sums.add(sketches, groups, units, self._field_sums.means() if self._probed else None)

    # Between steps

    def end_step(self, group: dist.ProcessGroup | None = None) -> None:
        """End plan step `step`: add its sketches, and probe if it is time. All ranks of a `group` call it.

        Nothing waits for the device. With a group the sums are over its ranks, each of which takes its share of the
        probe; they are on their way while training goes on.
        """
        sketched, probe = self._sketcher.enabled, (self.step + 1) % self.probe_every == 0
        if sketched and not self._told:
            raise ConfigError(
                f"plan step {self.step} is one with sketches, but no loss said whose its rows are; compute it with "
                "domain_cross_entropy(..., domain_ids, stats=mixer.stats), outside of torch.compile, or call "
                "influence.rows(loss, domain_ids, divisor) before its backward pass"
            )
        self._collect()
        self._passes = []
        if sketched or probe:
            self._settle()
            if probe:
                self._probe(group)
            self._latest = InfluenceSnapshot(
                self.step, self.fields, self.names, self._domain_sums, self._field_sums, (sketched, probe), group
            )
            self._sketched, self._probed = self._sketched or sketched, self._probed or probe
        self.at(self.step + 1)

    def snapshot(self) -> InfluenceSnapshot | None:
        """What is known now, on its way to the host; None before the first sketch."""
        return self._latest

    def _settle(self) -> None:
        """Finish what is under way with the sums: on a CPU, the sum over ranks that the last step began."""
        if self._latest is not None:
            self._latest.fold()

    def _probe(self, group: dist.ProcessGroup | None) -> None:
        """Sketch the probe rows of this rank, and add them to the sums of the fields."""
        inputs, targets, fields = self._rows.take(self.step // self.probe_every, self.probe_rows)
        mine, counted = _share(len(inputs), group)
        fields = torch.where(counted, fields[mine], -1)
        means = self._domain_sums.means() if self._sketched else None
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        enabled, self._sketcher.enabled = self._sketcher.enabled, True
        try:
            for rows, groups in zip(mine.split(self.batch_size), fields.split(self.batch_size), strict=True):
                x, y, ids = (t.to(self._device, non_blocking=True) for t in (inputs[rows], targets[rows], groups))
                self._field_sums.add(self._probe_sketches(x, y), ids, (y != IGNORED).sum(1).float(), means)
        finally:
            self._sketcher.enabled = enabled
            for module, training in modes:
                module.training = training

    def _probe_sketches(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """float32 [n, size]. Gradients of parameters are not changed and, but for one variant of checkpointing, not
        computed."""
        if not self._by_backward:
            sketches = self._run_probe(inputs, targets)
            if all(sketch is not None for sketch in sketches):
                return self._sketcher.rows_of(sketches)
            # The reentrant variant of activation checkpointing hides its layers from autograd.grad().
            self._by_backward = True
        kept = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        try:
            return self._sketcher.rows_of(self._run_probe(inputs, targets))
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    def _run_probe(self, inputs: Tensor, targets: Tensor) -> Sequence[Tensor | None]:
        self._sketcher.prepare(len(inputs), self._device)
        zeros = self._sketcher.running = self._sketcher.zeros
        autocast = nullcontext() if self.dtype is None else torch.autocast(self._device.type, dtype=self.dtype)
        with torch.enable_grad():
            with autocast:
                logits = self._logits(_unwrapped(self.model), inputs)
            if logits.shape[:2] != targets.shape:
                raise ConfigError(
                    f"the model gave logits of shape {list(logits.shape)} for probe rows {list(targets.shape)}; "
                    "expected [rows, tokens, V]; say how to get them with Influence(logits=...)"
                )
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        if not self._by_backward:
            return torch.autograd.grad(loss, zeros, allow_unused=True)
        loss.backward()
        return [zero.grad for zero in zeros]

    # Domains that come, and state

    def grow(self, names: Sequence[str]) -> None:
        """Go on with more domains at the end, of which nothing is known."""
        self._settle()
        self.names = tuple(names)
        self._domain_sums = self._domain_sums.grow(len(names), len(self.fields))
        self._field_sums = self._field_sums.grow(len(self.fields), len(names))
        self._restate()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors, (D + F) x layers x r² floats and a few more: too many for JSON, so they go beside the model's."""
        self._settle()
        own = {"step": torch.tensor(self.step), "settings": self._settings()}
        sides = {"domains": self._domain_sums, "fields": self._field_sums}
        return own | {f"{side}.{name}": t.clone() for side, sums in sides.items() for name, t in sums.state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, at any number of ranks. Raises StateError if it is of another run."""
        if not torch.equal(state["settings"], self._settings()):
            raise StateError(
                "the state of influence was saved with other settings (rank, layers, seed, half_life or fields) or for "
                f"another model; this one has rank {self.rank}, {len(self.layers)} layers and fields {self.fields}"
            )
        rows = len(state["domains.steps"])
        if rows != len(self.names):
            raise StateError(f"the state of influence is of {rows} domains; this run has {len(self.names)}")
        self._settle()
        for side, sums in (("domains", self._domain_sums), ("fields", self._field_sums)):
            sums.load({name: state[f"{side}.{name}"] for name in sums.state()})
        self._sketched, self._probed = (bool((state[f"{side}.steps"] >= 0).any()) for side in ("domains", "fields"))
        self.at(int(state["step"]))
        self._restate()

    def _restate(self) -> None:
        """What is known now, without anything new."""
        self._latest = None
        if self._sketched or self._probed:
            self._latest = InfluenceSnapshot(
                self.step - 1, self.fields, self.names, self._domain_sums, self._field_sums, (False, False), None
            )

    def _settings(self) -> Tensor:
        """uint8 [32]: a digest of what the sums mean."""
        settings = json.dumps([self.rank, self.seed, self.half_life, self.fields, list(map(plain_name, self.layers))])
        return torch.tensor(list(hashlib.sha256(settings.encode()).digest()), dtype=torch.uint8)

    def settings(self) -> dict[str, Any]:
        """What a run record says of it. JSON-able."""
        return {
            "fields": list(self.fields),
            "layers": len(self.layers),
            **{key: getattr(self, key) for key in ("rank", "stride", "probe_every", "probe_rows", "half_life", "seed")},
        }

    def close(self) -> None:
        """Take the hooks away from the model. A Mixer that is closed calls it."""
        self._sketcher.close()
        self._passes = []


def affordable_probe_every(probed_rows: int, step_rows: int) -> int:
    """Plan steps of `step_rows` rows to a probe of so many: a forward pass and, of the backward, the half without
    parameters."""
    return math.ceil(probed_rows * 2 / 3 / (_PROBE_SHARE * step_rows))


def _at_most(every: int, steps: int | None, times: int) -> int:
    """`every` steps, or as few as happen so many times in a run."""
    return every if steps is None else max(1, min(every, steps // times))


def _share(rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Which rows this rank takes, int64 [n], and which of them count; n is the same on all ranks."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    each = -(-rows // ranks)
    mine = rank * each + torch.arange(each)
    return mine % rows, mine < rows


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without DDP, which wants a backward pass over all parameters after each forward pass, and without compile."""
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner = getattr(model, "_orig_mod", inner)
        if inner is None:
            return model
        model = inner
