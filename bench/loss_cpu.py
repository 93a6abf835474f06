"""The loss on a CPU against torch's cross_entropy, forward and backward: `python -m bench.loss_cpu`.

Both are measured in turn in one process, the gradient out of place, and in two such processes: one with malloc as it
comes, which takes large tensors from the kernel anew and pays for each page, and one that keeps what was freed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "thresholds raised": KEPT}


def losses(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    ids = torch.arange(len(targets)) % DOMAINS
    sums, every = DomainStats(DOMAINS), DomainStats(DOMAINS, distribution=True)
    return {
        BASE: lambda: F.cross_entropy(logits, targets),
        "domain_cross_entropy": lambda: domain_cross_entropy(logits, targets, ids),
        "domain_cross_entropy, statistics": lambda: domain_cross_entropy(logits, targets, ids, stats=sums),
        "domain_cross_entropy, with entropy, ...": lambda: domain_cross_entropy(logits, targets, ids, stats=every),
    }


def verify(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Every loss, and its gradient, against torch in float64."""
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets)
    expected.backward()
    assert exact.grad is not None
    tolerance = 1e-5 if logits.dtype == torch.float32 else 2.0**-7
    for name, loss in losses(logits, targets).items():
        logits.grad = None
        value = loss()
        value.backward()
        assert logits.grad is not None
        error = (logits.grad.double() - exact.grad).norm().item() / exact.grad.norm().item()
        if max(error, abs(value.item() / expected.item() - 1)) > tolerance:
            raise ValueError(f"{name} of {logits.dtype} is off by {error:.1e}")
    logits.grad = None


def measure(n_tokens: int, n_classes: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(n_tokens, n_classes, generator=generator) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, n_classes, (n_tokens,), generator=generator)
    few = min(n_tokens, 256)
    verify(logits.detach()[:few].clone().requires_grad_(), targets[:few])

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
        def milliseconds() -> float:
            logits.grad = None
            start = time.perf_counter()
            loss().backward()
            return (time.perf_counter() - start) * 1e3

        return milliseconds

    measures = {name: step(loss) for name, loss in losses(logits, targets).items()}
    in_turn(measures, 2)  # warm-up
    results = in_turn(measures, rounds)
    return [
        {
            "loss": name,
            "tokens": n_tokens,
            "classes": n_classes,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": spread(times),
            "speedup": ratios(results[BASE], times),
        }
        for name, times in results.items()
    ]


def main() -> None:
    parser = arguments("Cross-entropy on a CPU, forward and backward, under two settings of malloc.", "loss_cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch (default 4096)")
    parser.add_argument("--classes", type=int, default=8192, help="size of the vocabulary (default 8192)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--one", action="store_true", help="measure in this process as it is, and print JSON")
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        both = (torch.float32, torch.bfloat16)
        print(json.dumps([row for dtype in both for row in measure(args.tokens, args.classes, dtype, args.rounds)]))
        return
    rows: list[dict[str, Any]] = []
    print(f"{args.tokens} tokens, {args.classes} classes, {args.threads} threads; verified against float64\n")
    print(
        f"{'malloc':18}{'forward and backward':40}{'dtype':>9}{'ms':>8}{'(min-max)':>16}{'x F.c_e':>9}{'(min-max)':>14}"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for allocator, settings in ALLOCATORS.items():
        command = [sys.executable, "-m", "bench.loss_cpu", "--one"]
        for option in ("tokens", "classes", "threads", "rounds"):
            command += [f"--{option}", str(getattr(args, option))]
        output = subprocess.run(command, env=plain | settings, stdout=subprocess.PIPE, check=True, text=True).stdout
        for row in json.loads(output):
            ms, speedup = row["ms"], row["speedup"]
            print(
                f"{allocator:18}{row['loss']:40}{row['dtype']:>9}{ms['median']:8.1f}"
                f"{ms['min']:9.1f}-{ms['max']:<6.1f}{speedup['median']:9.2f}{speedup['min']:8.2f}-{speedup['max']:<5.2f}"
            )
            rows.append({"malloc": allocator, **row})
    write_json(args.json, rows, threads=args.threads)


if __name__ == "__main__":
    main()
