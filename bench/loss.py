"""The loss against torch's cross_entropy, forward and backward, with and without statistics: `python -m bench.loss`.

On CUDA also the bandwidth, counting one read of the logits and one write of the gradient, next to that of a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import arguments, in_turn, ratios, spread, write_json
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats

DOMAINS = 16
BASE = "F.cross_entropy"
COPY = "copy of the logits"


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Of one call. On CUDA between events, so that the time of the launches is hidden as it is in training."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(5):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 5


def verify(losses: dict[str, Callable[[], torch.Tensor]], logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Every mean loss, and its gradient on the first rows, against torch in float64."""
    few = logits.detach()[:64].double().requires_grad_()
    F.cross_entropy(few, targets[:64], reduction="sum").backward()
    assert few.grad is not None
    gradient = few.grad / len(targets)
    chunks = zip(logits.detach().split(64), targets.split(64), strict=True)
    expected = sum(F.cross_entropy(x.double(), y, reduction="sum").item() for x, y in chunks) / len(targets)
    for name, loss in losses.items():
        logits.grad = None
        value = loss()
        value.backward()
        assert logits.grad is not None
        error = (logits.grad[:64].double() - gradient).norm().item() / gradient.norm().item()
        if error > (2**-7 if logits.dtype == torch.bfloat16 else 1e-5):
            raise ValueError(f"the gradient of {name} is off by {error:.1e}")
        error = abs(value.item() / expected - 1)
        if error > (2**-7 if value.dtype == torch.bfloat16 else 1e-5):
            raise ValueError(f"{name} is off by {error:.1e}")


def measure(rows: int, n_classes: int, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, n_classes, generator=generator) * 3).to(dtype).to(device).requires_grad_()
    targets = torch.randint(0, n_classes, (rows,), generator=generator).to(device)
    domain_ids = torch.randint(0, DOMAINS, (rows,), generator=generator).to(device)
    stats = DomainStats(DOMAINS, device)
    losses = {
        BASE: lambda: F.cross_entropy(logits, targets),
        "F.cross_entropy, in float32": lambda: F.cross_entropy(logits.float(), targets),
        "domain_cross_entropy": lambda: domain_cross_entropy(logits, targets, domain_ids),
        "domain_cross_entropy, statistics": lambda: domain_cross_entropy(logits, targets, domain_ids, stats=stats),
    }
    if dtype == torch.float32:
        del losses["F.cross_entropy, in float32"]
    verify(losses, logits, targets)
    stats.snapshot().wait()

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
        def work() -> None:
            logits.grad = None
            loss().backward()

        return lambda: milliseconds(work, device)

    measures = {name: step(loss) for name, loss in losses.items()}
    if device == "cuda":
        out = torch.empty_like(logits, requires_grad=False)
        measures[COPY] = lambda: milliseconds(lambda: out.copy_(logits.detach()), device)
    in_turn(measures, 1)  # warm-up
    results = in_turn(measures, rounds)
    gigabytes = 2 * logits.numel() * logits.element_size() / 1e9
    return [
        {
            "loss": name,
            "rows": rows,
            "classes": n_classes,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": spread(times),
            "speedup": ratios(results[BASE], times),
            "gb_per_s": spread([gigabytes / (ms / 1e3) for ms in times]),
        }
        for name, times in results.items()
    ]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = arguments("Cross-entropy, forward and backward.", "loss")
    parser.add_argument("--rows", type=int, default=16384 if device == "cuda" else 2048, help="tokens in a batch")
    parser.add_argument("--classes", type=int, nargs="+", default=[50304, 128256] if device == "cuda" else [2048, 8192])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    print(f"{device}, {args.rows} rows, {args.threads} threads; losses and gradients verified against float64\n")
    print(f"{'forward and backward':34}{'V':>8}{'dtype':>10}{'ms':>9}{'(min-max)':>16}{'x F.c_e':>9}{'GB/s':>7}")
    for n_classes in args.classes:
        for dtype in (torch.float32, torch.bfloat16):
            for row in measure(args.rows, n_classes, dtype, device, args.rounds):
                ms = row["ms"]
                print(
                    f"{row['loss']:34}{n_classes:8}{row['dtype']:>10}{ms['median']:9.2f}"
                    f"{ms['min']:9.2f}-{ms['max']:<6.2f}{row['speedup']['median']:9.2f}{row['gb_per_s']['median']:7.1f}"
                )
                rows.append(row)
    write_json(args.json, rows, device=device, threads=args.threads)


if __name__ == "__main__":
    main()
