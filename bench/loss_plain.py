"""Cross-entropy of logits that are there: what is measured, and that it is right before it is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.budgets import Budget
from bench.common import in_turn, ratios, spread
from bench.timing import milliseconds, no_waiting, peak_megabytes
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats

DOMAINS = 16
BASE = "F.cross_entropy"
COPY = "copy of the logits"
OURS = "domain_cross_entropy"
ALL = f"{OURS}, all statistics"
LIGER = "Liger cross entropy"
COMPILED = "torch.compile, in float32"
SHARE_OF_COPY = {50304: 0.85, 128256: 0.65}


class Inputs(NamedTuple):
    """logits: [N, V], a leaf. targets, domain_ids: [N]."""

    logits: torch.Tensor
    targets: torch.Tensor
    domain_ids: torch.Tensor


Loss = Callable[[Inputs], torch.Tensor]


def make_inputs(tokens: int, n_classes: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(tokens, n_classes, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    targets = torch.randint(0, n_classes, (tokens,), generator=generator, device=device)
    return Inputs(logits.requires_grad_(), targets, torch.arange(tokens, device=device) % DOMAINS)


def losses(dtype: torch.dtype, device: str, compiled: bool) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses by name, and of those that cannot be measured here the reason."""
    sums, every = DomainStats(DOMAINS, device), DomainStats(DOMAINS, device, distribution=True)
    found: dict[str, Loss] = {
        BASE: lambda x: F.cross_entropy(x.logits, x.targets),
        OURS: lambda x: domain_cross_entropy(x.logits, x.targets),
        f"{OURS}, statistics": lambda x: domain_cross_entropy(*x, stats=sums),
        ALL: lambda x: domain_cross_entropy(*x, stats=every),
    }
    missing = {}
    if dtype != torch.float32:
        found["F.cross_entropy, in float32"] = lambda x: F.cross_entropy(x.logits.float(), x.targets)
    if compiled:
        torch._dynamo.reset()  # or the shapes of earlier sizes count towards its limit
        function = torch.compile(lambda logits, y: F.cross_entropy(logits.float(), y), dynamic=False)
        found[COMPILED] = lambda x: function(x.logits, x.targets)
    else:
        missing[COMPILED] = "left out by --no-compile"
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        missing[LIGER] = "it needs a GPU" if device == "cpu" else "liger_kernel is not installed"
    else:
        from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()
        found[LIGER] = lambda x: liger(x.logits, x.targets)
    return found, missing


def verify(name: str, loss: Loss, inputs: Inputs) -> None:
    """The mean loss, and its gradient on the first rows, against torch in float64."""
    logits, targets = inputs.logits.detach().clone(), inputs.targets
    few = logits[:64].double().requires_grad_()
    F.cross_entropy(few, targets[:64], reduction="sum").backward()
    assert few.grad is not None
    gradient = few.grad / len(targets)
    chunks = zip(logits.split(256), targets.split(256), strict=True)
    expected = sum(F.cross_entropy(x.double(), y, reduction="sum").item() for x, y in chunks) / len(targets)
    leaf = logits.requires_grad_()  # a copy: Liger writes over its logits
    value = loss(inputs._replace(logits=leaf))
    value.backward()
    assert leaf.grad is not None
    tolerance = 2.0**-7 if logits.dtype == torch.bfloat16 else 1e-5
    error = (leaf.grad[:64].double() - gradient).norm().item() / gradient.norm().item()
    if not error <= tolerance:
        raise ValueError(f"the gradient of {name} is off by {error:.1e}")
    error = abs(value.item() / expected - 1)
    if not error <= (2.0**-7 if value.dtype == torch.bfloat16 else 1e-5):
        raise ValueError(f"{name} is off by {error:.1e}")


def measure(
    tokens: int, n_classes: int, dtype: torch.dtype, device: str, rounds: int, *, compiled: bool = True
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each loss that could be measured, and the reasons of the others."""
    found, missing = losses(dtype, device, compiled)
    sets = [make_inputs(tokens, n_classes, dtype, device, seed) for seed in range(3 if device == "cuda" else 1)]
    for name, loss in list(found.items()):
        try:
            verify(name, loss, sets[0])
        except ValueError:
            raise
        except Exception as error:  # a peer that does not work here costs its own row
            if name == BASE or name.startswith(OURS):
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del found[name]

    def step(name: str, loss: Loss) -> Callable[[], None]:
        own = sets
        if name == LIGER:  # which writes its gradient over the logits
            own = [x._replace(logits=x.logits.detach().clone().requires_grad_()) for x in sets]
        turns = cycle(own)

        def work() -> None:
            inputs = next(turns)
            inputs.logits.grad = None
            loss(inputs).backward()

        return work

    steps = {name: step(name, loss) for name, loss in found.items()}
    memory = {}
    for name, work in steps.items():
        work()
        for inputs in sets:
            inputs.logits.grad = None
        memory[name] = peak_megabytes(work, device)
    with no_waiting(device):
        steps[ALL]()
    out, turns = torch.empty_like(sets[0].logits, requires_grad=False), cycle(sets)
    steps[COPY] = lambda: out.copy_(next(turns).logits.detach())
    measures = {name: (lambda work=work: milliseconds(work, device)) for name, work in steps.items()}
    in_turn(measures, 1)  # warm-up
    results = in_turn(measures, rounds)
    gigabytes = 2 * out.numel() * out.element_size() / 1e9
    rows = [
        {
            "loss": name,
            "tokens": tokens,
            "classes": n_classes,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": spread(times),
            "speedup": ratios(results[BASE], times),
            "gb_per_s": spread([gigabytes / (ms / 1e3) for ms in times]),
            "share_of_copy": ratios(results[COPY], times),
            "peak_mb": memory.get(name),
            **({"over_liger": ratios(times, results[LIGER])} if LIGER in results else {}),
        }
        for name, times in results.items()
    ]
    return rows, missing


def budgets(rows: list[dict[str, Any]]) -> list[Budget]:
    """Of what was measured in bfloat16 on a GPU. A wait for the device would have ended the measurement."""
    found = []
    for row in rows:
        if row["loss"] != ALL or row["dtype"] != "bfloat16":
            continue
        name = f"loss, all statistics, {row['tokens']:,} x {row['classes']:,} bf16"
        share = row["share_of_copy"]["median"] * 100
        if row["classes"] in SHARE_OF_COPY:
            limit = SHARE_OF_COPY[row["classes"]] * 100
            found.append(Budget(f"{name}: share of a copy's bandwidth", share, limit, "%", at_least=True))
        over = row.get("over_liger")
        note = "" if over else "Liger was not measured"
        found.append(Budget(f"{name}: time over Liger's", over["median"] if over else None, 1.0, "x", note=note))
        found.append(Budget(f"{name}: waits for the device", 0.0, 0.0, ""))
    return found
