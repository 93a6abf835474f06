"""The loss kernel on the device: against float64, and which block sizes and warps are fastest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import torch
import torch.nn.functional as F

from bench.budgets import Budget
from bench.common import in_turn, spread
from bench.gpu_parts import Report, Settings
from bench.gpu_run import wait_for
from bench.loss_plain import DOMAINS, make_inputs
from bench.timing import milliseconds
from mixloader.loss import domain_cross_entropy
from mixloader.loss_path import LossInputs, LossOptions
from mixloader.stats import DomainStats, StatsTable

TOKENS = 96
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "weighted": True},
}
GRADIENT_ERROR = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5, torch.float16: 2.0**-11}
"""Relative, of a gradient rounded once."""


def check_float64(settings: Settings, report: Report) -> None:
    """Losses, gradients and statistics over vocabularies, dtypes and features, in every reduction's way to them."""
    classes = [7, 1024] if settings.tiny else [257, 1000, 8192, 50257, 50304, 128256]
    worst = 0.0
    for dtype, features, reduction, n_classes in product(GRADIENT_ERROR, FEATURES, ("mean", "none"), classes):
        name = f"{n_classes} {str(dtype).removeprefix('torch.')} {features} {reduction}"
        if settings.left() < 5:
            report.add(skipped={f"float64, {name}": "no time was left"})
            continue
        try:
            errors = _errors(n_classes, dtype, FEATURES[features], reduction, settings.device)
        except Exception as problem:  # the other cases still say something
            print(f"{name}: {type(problem).__name__}: {problem}")
            errors = dict.fromkeys(("loss", "gradient", "statistics"), float("inf"))
        limits = {"loss": 1e-5, "gradient": 2 * GRADIENT_ERROR[dtype], "statistics": 1e-3}
        over = {kind: error / limits[kind] for kind, error in errors.items()}
        worst = max(worst, *over.values())
        report.add(rows=[{"case": name, **errors}])
        if max(over.values()) > 1:
            print(f"{name}: {errors}")
    note = f"{len(report.rows)} cases"
    report.add(
        budgets=[Budget("kernel against float64: worst error by what is allowed", worst, 1.0, "x", note=note)],
    )


def _errors(
    n_classes: int, dtype: torch.dtype, features: dict[str, Any], reduction: str, device: str
) -> dict[str, float]:
    """Relative errors of the loss, of the gradient and of the statistics' sums."""
    options = dict(features)
    weighted = options.pop("weighted", False)
    generator = torch.Generator().manual_seed(n_classes)
    logits = (torch.randn(TOKENS, n_classes, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, n_classes, (TOKENS,), generator=generator)
    targets[::7] = -100
    ids, weights = torch.arange(TOKENS) % 3, torch.rand(3, generator=generator) + 0.5
    x = logits.double().to(device).requires_grad_()
    y, d, w = targets.to(device), ids.to(device), weights.to(device)
    expected, sums = _reference(x, y, d, w.double() if weighted else None, **options)
    if reduction == "mean":
        expected = expected.sum() / (y != -100).sum()
    upstream = torch.linspace(0.5, 1.5, expected.numel(), device=device).view(expected.shape)
    expected.backward(upstream.double())
    stats = DomainStats(3, device, distribution=True)
    leaf = logits.to(device).requires_grad_()
    found = domain_cross_entropy(
        leaf, y, d, stats=stats, reduction=reduction, domain_weights=w if weighted else None, **options
    )
    found.backward(upstream)
    assert leaf.grad is not None
    assert x.grad is not None
    table: StatsTable = stats.snapshot().wait()
    off = max(_relative(torch.from_numpy(table.column(name).copy()), value.cpu()) for name, value in sums.items())
    return {
        "loss": _relative(found.detach(), expected.detach()),
        "gradient": _relative(leaf.grad, x.grad),
        "statistics": off,
    }


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error == error else float("inf")


def _reference(
    x: torch.Tensor,
    targets: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses and sums by domain, written out in float64."""
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    valid = targets != -100
    log_p, lse = torch.log_softmax(x, 1), torch.logsumexp(x, 1)
    nll = -log_p.gather(1, targets.where(valid, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(1) + z_loss * lse.square()
    if weights is not None:
        loss = loss * weights[ids]
    with torch.no_grad():
        p = log_p.exp()
        of_token = {
            "tokens": torch.ones_like(nll),
            "loss": nll,
            "loss_sq": nll.square(),
            "entropy": -(p * log_p).sum(1),
            "el2n": (p - F.one_hot(targets.where(valid, 0), x.shape[1])).norm(dim=1),
        }
        hot = (ids == torch.arange(3, device=ids.device)[:, None]).double() * valid
        sums = {name: hot @ values for name, values in of_token.items()}
    return loss.where(valid, 0.0), sums


def tune(settings: Settings, report: Report) -> None:
    """Milliseconds of the kernel with all statistics for each block size and number of warps; the best by V."""
    if settings.device == "cpu":
        report.add(skipped={"tune": "Triton's kernels need a GPU"})
        return
    for n_classes in (50304, 128256, 50257, 8192):
        if settings.left() < 20:
            report.add(skipped={f"tune, V = {n_classes}": "no time was left"})
            continue
        times = in_turn(_configurations(n_classes, settings), 7)
        rows = [{"classes": n_classes, "block": b, "warps": w, "ms": spread(ms)} for (b, w), ms in times.items()]
        best = min(rows, key=lambda row: row["ms"]["median"])
        report.add(rows=rows, figures={f"best at V = {n_classes}": best})
        print(f"V = {n_classes}: {best}", flush=True)


def _configurations(n_classes: int, settings: Settings, tokens: int = 16384) -> dict[Any, Callable[[], float]]:
    """Milliseconds by (block size, warps). Compiled, and run once; what does not compile is left out."""
    from mixloader.kernels import cross_entropy

    device = settings.device
    sets = [make_inputs(tokens, n_classes, torch.bfloat16, device, seed) for seed in range(3)]
    stats = DomainStats(DOMAINS, device, distribution=True)
    scale = torch.full((1,), 1 / tokens, device=device)
    defaults, turns = cross_entropy.launch_options, cycle(sets)
    out = torch.empty_like(sets[0].logits, requires_grad=False)
    measures: dict[Any, Callable[[], float]] = {}
    for block, warps in product((2048, 4096, 8192, 16384, 32768, 65536), (4, 8, 16, 32)):
        if not 4 <= block // (32 * warps) <= 64 or block >= 4 * n_classes or settings.left() < 10:
            continue

        def work(block: int = block, warps: int = warps) -> None:
            logits, targets, ids = next(turns)
            inputs = LossInputs(logits.detach(), targets, ids)
            cross_entropy.launch_options = lambda *a: {**defaults(*a), "BLOCK": block, "num_warps": warps}
            try:
                cross_entropy.forward(inputs, LossOptions(distribution=True), stats.buffer, scale, out)
            finally:
                cross_entropy.launch_options = defaults

        try:
            work()
            wait_for(device)
        except Exception as error:
            print(f"V = {n_classes}, block {block}, {warps} warps: {type(error).__name__}")
            continue
        measures[block, warps] = lambda work=work: milliseconds(work, device)
    return measures
