"""How well sketches agree with full gradients: over rank, layers, rows and projections, on the demo's base model."""

from __future__ import annotations

import fnmatch
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.influence_data import Task
from mixloader import MixLoader
from mixloader.sketch import Sketcher

RANKS = (4, 8, 16, 32, 64)
LAYERS = {
    "all linear layers of the blocks": ["h.*"],
    "and the head": ["*"],
    "every other block": ["h.0.*", "h.2.*"],
    "MLPs": ["*.mlp.*"],
    "attention": ["*.attn.*"],
    "c_attn": ["*.c_attn"],
    "mlp.c_proj": ["*.mlp.c_proj"],
}
ROWS, PROBE_ROWS = 16, 16


def curve_rows(task: Task, seeds: int = 3) -> list[dict[str, Any]]:
    """Pearson correlation of the [D, F] inner products, over all domains and fields, with those of full gradients.

    blocks, with head: the full gradients of the same rows in all linear layers of the blocks, or in the head, too. So
    rank shows the noise of the sketch, and layers what is lost with the others. The last rows: of fewer rows a domain,
    against the full gradients of ROWS, which is what a longer stride costs. Mean and least over seeds.
    """
    model = task.fresh_model()
    rows = _rows(task)
    widths = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = list(widths)
    exact = _gradients(model, rows, names)
    full = {
        title: _alignment(*_means(_columns(exact, names, widths, LAYERS[layers])))
        for title, layers in (("blocks", "all linear layers of the blocks"), ("with head", "and the head"))
    }
    found: list[dict[str, Any]] = []
    for rank in RANKS:
        # A layer's projections do not depend on the other layers, so all choices are parts of one sketch.
        sketches = [_sketches(model, rows, Sketcher(model, rank, "*", seed)) for seed in range(seeds)]
        sizes = dict.fromkeys(names, rank * rank)
        for title, patterns in LAYERS.items():
            tables = [_alignment(*_means(_columns(each, names, sizes, patterns))) for each in sketches]
            found.append({"layers": title, "rank": rank})
            for name, reference in full.items():
                found[-1][name] = _spread([np.corrcoef(t.ravel(), reference.ravel())[0, 1] for t in tables])
            print(found[-1], flush=True)
        if rank == 32:
            some = {"sketch r=32": sketches[0], "full gradients": exact}
            parts = {
                n: _columns(p, names, sizes if n != "full gradients" else widths, ["h.*"]) for n, p in some.items()
            }
    for count in (1, 2, 4, 8, 16):
        found.append({"rows a domain": count})
        for name, part in parts.items():
            tables = [_alignment(*_means(part, range(begin, begin + count))) for begin in range(0, ROWS, count)]
            found[-1][name] = _spread([np.corrcoef(t.ravel(), full["blocks"].ravel())[0, 1] for t in tables])
        print(found[-1], flush=True)
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 4), "min": round(float(min(values)), 4)}


def _columns(groups: list[Tensor], names: list[str], sizes: dict[str, int], patterns: list[str]) -> list[Tensor]:
    """[rows, ...] of each group: of the layers that a pattern matches."""
    wanted = [any(fnmatch.fnmatchcase(name, p) for p in patterns) for name in names]
    return [
        torch.cat([c for c, want in zip(g.split([sizes[n] for n in names], 1), wanted, strict=True) if want], 1)
        for g in groups
    ]


def _rows(task: Task) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of ROWS training rows a domain, then PROBE_ROWS held-out rows a field."""
    with MixLoader(task.train, 1, task.seq_len, num_workers=0) as loader:
        drawn = [next(loader.probe(name, ROWS)) for name in loader.names]
        for field in ("source", "target"):
            names = [d.name for d in task.train.domains if d.field == field]
            held_out = list(loader.held_out(64, windows_per_domain=PROBE_ROWS // len(names), domains=names))
            drawn.append({key: torch.cat([b[key] for b in held_out]) for key in ("input_ids", "targets")})
    return [(batch["input_ids"], batch["targets"]) for batch in drawn]


def _gradients(model: nn.Module, rows: list[tuple[Tensor, Tensor]], layers: list[str]) -> list[Tensor]:
    """[rows, parameters] of each group."""
    modules = dict(model.named_modules())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        modules[name].register_forward_hook(lambda m, a, o, name=name: seen.__setitem__(name, (a[0][0], o)))
        for name in layers
    ]
    found = []
    for inputs, targets in rows:
        each = []
        for x, y in zip(inputs, targets, strict=True):
            loss = nn.functional.cross_entropy(model(x[None])[0], y, reduction="sum")
            outer = torch.autograd.grad(loss, [seen[name][1] for name in layers])
            # Not the gradient of the weight: a head that is tied to the embedding has a part of that.
            each.append(torch.cat([(d[0].T @ seen[n][0]).flatten() for n, d in zip(layers, outer, strict=True)]))
        found.append(torch.stack(each).detach())
    for handle in handles:
        handle.remove()
    return found


def _sketches(model: nn.Module, rows: list[tuple[Tensor, Tensor]], sketcher: Sketcher) -> list[Tensor]:
    """[rows, size] of each group."""
    found = []
    sketcher.enabled = True
    for x, y in rows:
        sketcher.prepare(len(x), torch.device("cpu"))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        found.append(sketcher.rows_of(torch.autograd.grad(loss, sketcher.zeros)))
    sketcher.close()
    return found


def _means(groups: list[Tensor], some: range | None = None) -> tuple[Tensor, Tensor]:
    """[D, ...] and [F, ...]: means over rows; `some`: of those rows of the domains alone."""
    domains = [group if some is None else group[some.start : some.stop] for group in groups[:-2]]
    return torch.stack([g.mean(0) for g in domains]), torch.stack([g.mean(0) for g in groups[-2:]])


def _alignment(domains: Tensor, fields: Tensor) -> np.ndarray:
    """[D, F]; each field in units of its root mean square, so that both weigh the same."""
    product = (domains @ fields.T).double().numpy()
    return product / np.sqrt((product**2).mean(0))
