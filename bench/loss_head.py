"""Cross-entropy from hidden states and a head's weight: what is measured, and that it is right before it is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.common import in_turn, ratios, spread
from bench.loss_plain import DOMAINS
from bench.timing import milliseconds, no_waiting, peak_megabytes
from mixloader.linear_chunks import chunk_rows, logits_row_bytes
from mixloader.linear_loss import default_chunk_bytes, linear_domain_cross_entropy
from mixloader.stats import DomainStats

BASE = "F.linear, F.cross_entropy"
OURS = "linear_domain_cross_entropy"
ALL = f"{OURS}, all statistics"
TORCH = "F.linear_cross_entropy, our chunks"
LIGER = "Liger fused linear cross entropy"


class Inputs(NamedTuple):
    """hidden: [N, H], weight: [V, H], leaves of one dtype. targets, domain_ids: [N]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    domain_ids: torch.Tensor


Loss = Callable[[Inputs], torch.Tensor]


def make_inputs(tokens: int, width: int, n_classes: int, dtype: torch.dtype, device: str, sets: int) -> list[Inputs]:
    """The weight is the same in all of them."""
    generator = torch.Generator(device).manual_seed(0)

    def leaf(rows: int, std: float) -> torch.Tensor:
        values = torch.empty(rows, width, dtype=dtype, device=device).normal_(0, std, generator=generator)
        return values.requires_grad_()

    weight, ids = leaf(n_classes, 2 / width**0.5), torch.arange(tokens, device=device) % DOMAINS
    return [
        Inputs(leaf(tokens, 1), weight, torch.randint(0, n_classes, (tokens,), generator=generator, device=device), ids)
        for _ in range(sets)
    ]


def losses(inputs: Inputs) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses by name, and of those that cannot be measured here the reason."""
    device = inputs.hidden.device.type
    every = DomainStats(DOMAINS, device, distribution=True)
    found: dict[str, Loss] = {
        BASE: lambda x: F.cross_entropy(F.linear(x.hidden, x.weight), x.targets),
        OURS: lambda x: linear_domain_cross_entropy(x.hidden, x.weight, x.targets),
        ALL: lambda x: linear_domain_cross_entropy(*x, stats=every),
    }
    missing = {}
    if hasattr(F, "linear_cross_entropy"):
        # With chunks of its own choice, a few rows each, it took 6 times as long at V = 8,192 on a CPU.
        row = len(inputs.weight), inputs.weight.element_size()
        chunk = chunk_rows(len(inputs.targets), logits_row_bytes(*row), default_chunk_bytes(*row, device))
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        found[TORCH] = lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.targets, options=options)
    else:
        missing[TORCH] = f"torch {torch.__version__} has none (2.13 has)"
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        missing[LIGER] = "it needs a GPU" if device == "cpu" else "liger_kernel is not installed"
    else:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found[LIGER] = lambda x: liger(x.weight, x.hidden, x.targets)
        wide = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        found[f"{LIGER}, sums in float32"] = lambda x: wide(x.weight, x.hidden, x.targets)
    return found, missing


def exact(inputs: Inputs) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The mean loss and its gradients by hidden and weight, in float64, some rows at a time."""
    hidden, weight, targets = inputs.hidden.detach(), inputs.weight.detach().double(), inputs.targets
    total, by_hidden, by_weight = 0.0, [], torch.zeros_like(weight)
    for rows, y in zip(hidden.split(1024), targets.split(1024), strict=True):
        x = rows.double()
        log_p = torch.log_softmax(x @ weight.T, dim=1)
        total -= log_p.gather(1, y[:, None]).sum().item()
        gradient = log_p.exp_()
        gradient[torch.arange(len(y), device=y.device), y] -= 1
        gradient /= len(targets)
        by_hidden.append(gradient @ weight)
        by_weight += gradient.T @ x
    return total / len(targets), torch.cat(by_hidden), by_weight


def verify(found: dict[str, Loss], missing: dict[str, str], inputs: Inputs) -> None:
    """Losses and gradients against float64. A peer that does not run is moved to `missing`."""
    expected, *gradients = exact(inputs)
    # Of the logits, of their gradient and of the result: all three are rounded by those who take bfloat16.
    tolerance = 2.0**-6 if inputs.hidden.dtype == torch.bfloat16 else 1e-4
    for name, loss in list(found.items()):
        inputs.hidden.grad = inputs.weight.grad = None
        try:
            value = loss(inputs)
            value.backward()
        except Exception as error:  # a peer that does not work here costs its own row
            if name == BASE or name.startswith(OURS):
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del found[name]
            continue
        errors = [abs(value.item() / expected - 1)]
        for leaf, gradient in zip((inputs.hidden, inputs.weight), gradients, strict=True):
            assert leaf.grad is not None
            errors.append(((leaf.grad.double() - gradient).norm() / gradient.norm()).item())
        if not max(errors) <= tolerance:
            raise ValueError(f"{name} and its gradients are off by {errors}")
    inputs.hidden.grad = inputs.weight.grad = None


def measure(
    tokens: int, width: int, n_classes: int, dtype: torch.dtype, device: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each loss that could be measured, and the reasons of the others."""
    sets = make_inputs(tokens, width, n_classes, dtype, device, 3 if device == "cuda" else 1)
    found, missing = losses(sets[0])
    verify(found, missing, sets[0])

    def step(loss: Loss) -> Callable[[], None]:
        turns = cycle(sets)

        def work() -> None:
            inputs = next(turns)
            inputs.hidden.grad = inputs.weight.grad = None
            loss(inputs).backward()

        return work

    steps = {name: step(loss) for name, loss in found.items()}
    memory = {}
    for name, work in steps.items():
        work()
        for inputs in sets:
            inputs.hidden.grad = inputs.weight.grad = None
        memory[name] = peak_megabytes(work, device)
    with no_waiting(device):
        steps[ALL]()
    measures = {name: (lambda work=work: milliseconds(work, device, calls=3)) for name, work in steps.items()}
    in_turn(measures, 1)  # warm-up
    results = in_turn(measures, rounds)
    rows = [
        {
            "loss": name,
            "tokens": tokens,
            "width": width,
            "classes": n_classes,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": spread(times),
            "speedup": ratios(results[BASE], times),
            "peak_mb": memory[name],
        }
        for name, times in results.items()
    ]
    return rows, missing
