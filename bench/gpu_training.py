"""Whole training steps: nothing in them waits for the device, a graph of them counts, and what mixing costs."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bench.budgets import Budget
from bench.common import in_turn, ratios, spread
from bench.gpu_parts import Report, Settings
from bench.gpu_run import (
    DOMAINS,
    Side,
    Sizes,
    Training,
    domains,
    mark,
    open_loader,
    open_mixer,
    seconds_between,
    wait_for,
)
from bench.timing import milliseconds, no_waiting
from mixloader.device import DevicePrefetcher
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats

BLOCK = 25
"""Steps of one side before the other's turn."""
SMALL_BUDGET, LARGE_BUDGET = 0.3, 0.1  # per cent of a step


def check_training(settings: Settings, report: Report) -> None:
    for check in (check_batches, check_waiting, check_graph):
        try:
            check(settings, report)
        except Exception as error:  # the other checks still say something
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{check.__name__}: {problem}")
            report.add(budgets=[Budget(f"{check.__name__}: failures", 1.0, 0.0, "", note=problem)])


def check_batches(settings: Settings, report: Report) -> None:
    """What the prefetcher puts on the device is what the loader gives, whatever becomes of the weights."""
    sizes, wrong = Sizes(settings), 0
    with domains(sizes) as (_, data), ExitStack() as stack:
        narrow = stack.enter_context(open_loader(data, sizes, settings.device, dtype=torch.uint16))
        plain = stack.enter_context(open_loader(data, sizes, "cpu"))
        batches, rng = DevicePrefetcher(narrow, settings.device), np.random.default_rng(0)
        for step in range(6 if settings.tiny else 60):
            found, expected = next(batches), next(plain)
            wrong += any(not torch.equal(found[k].cpu(), expected[k]) for k in ("input_ids", "targets", "domain_ids"))
            if step % 3 == 0:
                weights = rng.dirichlet(np.ones(DOMAINS))
                narrow.set_weights(weights)
                plain.set_weights(weights)
    report.add(budgets=[Budget("batches on the device that are not the loader's", wrong, 0.0, "")])


def check_waiting(settings: Settings, report: Report) -> None:
    """Loss, statistics, mixer.step() and the prefetcher from pinned memory, while waiting for the device raises."""
    sizes, steps = Sizes(settings), 3 if settings.tiny else 20
    training = Training(sizes, settings.device)
    with domains(sizes) as (folder, data), ExitStack() as stack:
        loader = stack.enter_context(open_loader(data, sizes, settings.device))
        mixer = stack.enter_context(open_mixer(loader, folder, settings.device))
        side = Side(training, loader, mixer)
        for _ in range(3):
            side.step()  # compiles
        wait_for(settings.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="policy")  # a policy that fails costs a warning only
            with no_waiting(settings.device):
                for _ in range(steps):
                    side.step()
        wait_for(settings.device)
    if settings.tiny:
        report.add(skipped={"waits for the device": "there is none; the steps ran"})
        return
    report.add(budgets=[Budget(f"waits for the device in {steps} training steps with mixing", 0.0, 0.0, "")])


def check_graph(settings: Settings, report: Report) -> None:
    """A captured step counts its tokens at every replay, and its losses are those of the step that was not captured."""
    sizes = Sizes(settings)
    training, stats = Training(sizes, settings.device), DomainStats(DOMAINS, settings.device)
    rows = torch.randint(0, sizes.ids, (sizes.rows, sizes.seq_len), device=settings.device)
    ids = torch.arange(sizes.rows, device=settings.device) % DOMAINS

    def step() -> None:
        with training.autocast(cache_enabled=False):
            logits = training.model(rows)
        domain_cross_entropy(logits, rows, ids, stats=stats).backward()

    if settings.device == "cpu":
        step()
        report.add(skipped={"CUDA graph": "there is no CUDA device; the step ran"})
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
            training.optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    once = stats.snapshot().wait().sums
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    replayed = stats.snapshot().wait().sums
    wrong = int((replayed[:, 0] != once[:, 0]).sum())
    off = float(np.abs(replayed[:, 1] / np.maximum(once[:, 1], 1) - (once[:, 1] > 0)).max())
    report.add(
        budgets=[
            Budget("domains with a wrong count of tokens after replays of a CUDA graph", wrong, 0.0, ""),
            Budget("losses of a replayed CUDA graph, relative error", off, 1e-3, ""),
        ]
    )


def compare(settings: Settings, report: Report) -> None:
    """Mixing (statistics, the agent's decisions, loader) against the same loss without statistics and a fixed mixture.

    One model trains on blocks of steps of either side in alternating order; a block's time is between two events on
    the device. The interval is a bootstrap over pairs of neighbouring blocks.
    """
    sizes, device = Sizes(settings), settings.device
    block = 2 if settings.tiny else BLOCK
    wanted = 3 if settings.tiny else -(-2000 // BLOCK)
    training = Training(sizes, device)
    with domains(sizes) as (folder, data), ExitStack() as stack:
        mixed_loader = stack.enter_context(open_loader(data, sizes, device))
        mixer = stack.enter_context(open_mixer(mixed_loader, folder, device))
        fixed_loader = stack.enter_context(open_loader(data, sizes, device, weights=[1.0] * DOMAINS))
        sides = {"mixing": Side(training, mixed_loader, mixer), "fixed": Side(training, fixed_loader, None)}
        for side in sides.values():
            for _ in range(block):
                side.step()
            side.waits.clear()
        mixer.waits = 0
        wait_for(device)
        begin, pairs = time.perf_counter(), 0
        times: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
        # Parts of the cost are measured after this, for which some time is left.
        while pairs < wanted and settings.left() > (0 if settings.tiny else 25):
            marks = [mark(device)]
            order = list(sides) if pairs % 2 == 0 else list(sides)[::-1]
            for name in order:
                for _ in range(block):
                    sides[name].step()
                marks.append(mark(device))
            for name, (start, end) in zip(order, pairwise(marks), strict=True):
                times[name].append((start, end))
            pairs += 1
        ms = {n: np.array([seconds_between(*b) for b in blocks]) / block * 1e3 for n, blocks in times.items()}
        wall, pairs_done = time.perf_counter() - begin, pairs
        over, low, high = interval(ms["mixing"], ms["fixed"])
        waits = np.array(sides["mixing"].waits)
        report.add(
            rows=[{"side": name, "ms": spread(list(values)), "blocks": list(values)} for name, values in ms.items()],
            figures={
                "steps a side": pairs_done * block,
                "ms of a step, fixed mixture": float(np.median(ms["fixed"])),
                "mixing costs, % of a step": over,
                "95 % interval, %": [low, high],
                "share of the time in next(), %": waits.sum() / (wall / 2) * 100,
                "next() p50 and p99, us": [float(np.percentile(waits, q) * 1e6) for q in (50, 99)],
                "decisions that were waited for": mixer.waits,
            },
            budgets=[
                Budget(
                    f"mixing, {sizes.rows} x {sizes.seq_len} tokens a step: upper end of the 95 % interval",
                    high if pairs_done * block >= 2000 or settings.tiny else None, SMALL_BUDGET, "%",
                    note=f"{over:.3f} [{low:.3f}, {high:.3f}] over {pairs_done * block} steps a side",
                )
            ],
        )  # fmt: skip
        sum_of_parts(sizes, settings, report, sides["mixing"], float(np.median(ms["fixed"])))


def interval(values: np.ndarray, base: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """By how many per cent the mean of `values` [pairs] is above that of `base`, and a 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(base), (draws, len(base)))
    over = (values[picks].mean(1) / base[picks].mean(1) - 1) * 100
    low, high = np.percentile(over, [2.5, 97.5])
    return float((values.mean() / base.mean() - 1) * 100), float(low), float(high)


def sum_of_parts(sizes: Sizes, settings: Settings, report: Report, side: Side, step_ms: float) -> None:
    """What statistics add to the loss of a micro-batch, and mixer.step() to the host's work, with nothing hidden."""
    device, mixer = settings.device, side.mixer
    assert mixer is not None
    inputs = [
        torch.randn(sizes.rows, sizes.seq_len, sizes.vocab_size, device=device).to(torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    targets = torch.randint(0, sizes.ids, (sizes.rows, sizes.seq_len), device=device)
    ids = torch.arange(sizes.rows, device=device) % DOMAINS
    stats = DomainStats(DOMAINS, device)

    def loss(counted: DomainStats | None) -> None:
        for logits in inputs:
            logits.grad = None
            domain_cross_entropy(logits, targets, None if counted is None else ids, stats=counted).backward()

    works = {"with": partial(loss, stats), "without": partial(loss, None)}
    measures = {name: partial(milliseconds, work, device, 10) for name, work in works.items()}
    in_turn(measures, 1)
    times = in_turn(measures, 3 if settings.tiny else 30)
    more = [(a - b) / len(inputs) for a, b in zip(times["with"], times["without"], strict=True)]
    host = []
    for _ in range(3 if settings.tiny else 60):
        side.training.backward(next(side.batches), mixer.stats)
        side.training.update()
        wait_for(device)
        time.sleep(0.002)  # in which the policy decides, as in the rest of a step
        begin = time.perf_counter()
        mixer.step()
        host.append((time.perf_counter() - begin) * 1e3)
    statistics, mixer_ms, n = float(np.median(more)), float(np.median(host)), sizes.large_step
    cost = (max(statistics, 0.0) * n + mixer_ms) / (step_ms * n) * 100
    found: dict[str, Any] = {
        "statistics, ms a micro-batch": spread(more),
        "statistics, ratio of the loss": ratios(times["with"], times["without"]),
        "mixer.step() with nothing hidden, ms": spread(host),
        "micro-batches in a step of 0.5M tokens": n,
    }
    note = "by the sum of its parts, none of them hidden"
    report.add(figures=found, budgets=[Budget("mixing, 0.5M tokens a step", cost, LARGE_BUDGET, "%", note=note)])
