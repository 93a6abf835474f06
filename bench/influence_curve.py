"""How well sketches agree with full gradients: over rank, layers, rows and projections, on the demo's base model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.influence_data import Task
from mixloader import MixLoader
from mixloader.sketch import Sketcher

RANKS = (4, 8, 16, 32, 64)
LAYERS = {
    "all linear layers of the blocks": None,
    "and the head": "*",
    "every other block": ["h.0.*", "h.2.*"],
    "MLPs": "*.mlp.*",
    "attention": "*.attn.*",
    "c_attn": "*.c_attn",
    "mlp.c_proj": "*.mlp.c_proj",
}
ROWS, PROBE_ROWS = 16, 16


def curve_rows(task: Task, seeds: int = 5) -> list[dict[str, Any]]:
    """Pearson correlation of the [D, F] inner products, over all domains and fields, with those of full gradients.

    ref: full gradients in all linear layers of the blocks and the head, of the same rows; so rank shows the noise of
    the sketch, and layers what is lost with the others. rows: the same with fewer rows a domain, against the full
    gradients of ROWS, which is what a longer stride costs. Mean and lowest over the seeds of the projections.
    """
    model = task.fresh_model()
    rows = _rows(task)
    everything = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    blocks = [name for name in everything if name.startswith("h.")]
    full = {name: _alignment(*_means(_gradients(model, rows, names))) for name, names in
            (("with head", everything), ("blocks", blocks))}  # fmt: skip
    found = []
    for title, patterns in LAYERS.items():
        for rank in RANKS:
            tables = []
            for seed in range(seeds):
                sketches = _sketches(model, rows, Sketcher(model, rank, patterns, seed))
                tables.append(_alignment(*_means(sketches)))
            row: dict[str, Any] = {"layers": title, "rank": rank}
            for name, reference in full.items():
                values = [float(np.corrcoef(t.ravel(), reference.ravel())[0, 1]) for t in tables]
                row[name] = {"mean": float(np.mean(values)), "min": min(values)}
            found.append(row)
            print(f"{title:34} r={rank:<3} blocks {row['blocks']['mean']:.3f} ({row['blocks']['min']:.3f})  "
                  f"with head {row['with head']['mean']:.3f}", flush=True)  # fmt: skip
    sketches = _sketches(model, rows, Sketcher(model, 32, None, 0))
    exact = _gradients(model, rows, blocks)
    for count in (1, 2, 4, 8, 16):
        row = {"rows a domain": count}
        for name, parts in (("sketch r=32", sketches), ("full gradients", exact)):
            tables = [_alignment(*_means(parts, range(begin, begin + count))) for begin in range(0, ROWS, count)]
            some = [np.corrcoef(t.ravel(), full["blocks"].ravel())[0, 1] for t in tables]
            row[name] = {"mean": float(np.mean(some)), "min": float(min(some))}
        found.append(row)
        print(row, flush=True)
    return found


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
    found = []
    for x, y in rows:
        each = []
        for i in range(len(x)):
            # A head that is tied to the embedding: its part of the gradient alone, as the sketch has it.
            outputs: dict[str, tuple[Tensor, Tensor]] = {}
            handles = [
                modules[name].register_forward_hook(lambda m, a, o, name=name: outputs.__setitem__(name, (a[0], o)))
                for name in layers
            ]
            loss = nn.functional.cross_entropy(model(x[i : i + 1])[0], y[i], reduction="sum")
            for handle in handles:
                handle.remove()
            deltas = torch.autograd.grad(loss, [outputs[name][1] for name in layers])
            each.append(torch.cat([(d[0].T @ outputs[n][0][0]).flatten() for n, d in zip(layers, deltas, strict=True)]))
        found.append(torch.stack(each).detach())
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
