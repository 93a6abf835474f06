"""What influence costs at its defaults, from the times of plain steps, steps with sketches and probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.budgets import Budget
from bench.common import in_turn, spread
from bench.gpu_parts import Report, Settings
from bench.gpu_run import DOMAINS, Sizes, Training, mark, seconds_between
from bench.influence_cost import defaults
from bench.timing import no_waiting
from mixloader import Influence
from mixloader.stats import DomainStats

BUDGET = 0.5  # per cent of a step
NEVER = 10**9
KINDS: dict[str, dict[str, int] | None] = {
    "plain": None,
    "hooks that rest": {"stride": NEVER, "probe_every": NEVER},
    "sketches": {"stride": 1, "probe_every": NEVER},
    "probe": {"stride": NEVER, "probe_every": 1},
}


def measure_influence(settings: Settings, report: Report) -> None:
    sizes, device = Sizes(settings), settings.device
    steps, rounds = (1, 3) if settings.tiny else (5, 25)
    rows = torch.randint(0, sizes.ids, (sizes.rows, sizes.seq_len), device=device)
    batch = {"input_ids": rows, "targets": rows, "domain_ids": torch.arange(sizes.rows, device=device) % DOMAINS}
    measures: dict[str, Callable[[], float]] = {
        kind: _stepper(options, batch, sizes, steps, device) for kind, options in KINDS.items()
    }
    measures["plain, without the update"] = _stepper(None, batch, sizes, steps, device, update=False)
    in_turn(measures, 2)
    times = in_turn(measures, rounds)
    report.add(rows=[{"step": kind, "ms": spread(values)} for kind, values in times.items()])
    _check_waiting(measures, settings, report)
    medians = {kind: spread(values)["median"] for kind, values in times.items()}
    more = {kind: spread([t - plain for t, plain in zip(times[kind], times["plain"], strict=True)]) for kind in KINDS}
    plain, sketch, probe = medians["plain"], more["sketches"]["median"], more["probe"]["median"]
    n = sizes.large_step
    small, large = defaults(sizes.rows), defaults(sizes.rows * n)
    update = max(0.0, plain - medians["plain, without the update"])
    of_sketches = sketch / small["stride"] / plain * 100
    of_probes = probe / small["probe_every"] / plain * 100
    large_ms = n * (plain - update) + update
    at_large = (n * sketch / large["stride"] + probe / large["probe_every"]) / large_ms * 100
    report.add(
        figures={
            "ms of a plain step": plain,
            "a step with sketches takes more, ms": more["sketches"],
            "a step with a probe takes more, ms": more["probe"],
            "hooks that rest take, ms": more["hooks that rest"],
            "steps from one probe to the next, small and large step": [s["probe_every"] for s in (small, large)],
            "of the cost at the small step, sketches and probes, %": [of_sketches, of_probes],
        },
        budgets=[
            Budget(
                f"influence at its defaults, {sizes.rows} x {sizes.seq_len} tokens a step",
                of_sketches + of_probes,
                BUDGET,
                "%",
            ),
            Budget("influence at its defaults, 0.5M tokens a step, by the sum of parts", at_large, BUDGET, "%"),
        ],
    )


def _check_waiting(measures: dict[str, Callable[[], float]], settings: Settings, report: Report) -> None:
    """Steps with sketches and with probes, while waiting for the device raises (the clock's events do not count)."""
    waits, problem = 0, ""
    try:
        with no_waiting(settings.device):
            measures["sketches"]()
            measures["probe"]()
    except RuntimeError as error:
        waits, problem = 1, str(error).splitlines()[0]
    if settings.tiny:
        report.add(skipped={"waits for the device": "there is none; the steps ran"})
        return
    report.add(budgets=[Budget("waits for the device in training steps with influence", waits, 0.0, "", note=problem)])


def _stepper(
    options: dict[str, int] | None, batch: dict[str, Any], sizes: Sizes, steps: int, device: str, *, update: bool = True
) -> Callable[[], float]:
    """Takes some steps of a model of its own, and says how many milliseconds one takes."""
    training, stats, influence = Training(sizes, device), DomainStats(DOMAINS, device), None
    if options is not None:
        # The rows of a probe are the same whatever field they stand for.
        rows = batch["input_ids"][:1].repeat(64, 1).cpu()
        probes = {field: [{"input_ids": rows, "targets": rows}] for field in ("source", "target")}
        dtype = torch.bfloat16 if device == "cuda" else None
        size = {key: defaults(sizes.rows)[key] for key in ("rank", "probe_rows")}
        stats.influence = influence = Influence(training.model, probes, dtype=dtype, **size, **options)
        influence.begin([f"domain-{d}" for d in range(DOMAINS)], sizes.rows)

    def step() -> None:
        training.backward(batch, stats)
        if update:
            training.update()
        else:
            training.optimizer.zero_grad(set_to_none=True)
        if influence is not None:
            influence.end_step()

    def milliseconds() -> float:
        begin = mark(device)
        for _ in range(steps):
            step()
        return seconds_between(begin, mark(device)) / steps * 1e3

    return milliseconds
