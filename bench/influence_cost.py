"""What influence costs: arithmetic and bytes of GPT-2 124M, counted, and milliseconds on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.common import in_turn, spread
from mixloader import Influence
from mixloader.config import ModelConfig
from mixloader.influence import affordable_probe_every
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats
from mixloader.train.model import build_model


def defaults(rows: int, fields: int = 2) -> dict[str, Any]:
    """Of Influence, in a long run of `rows` rows a step."""
    probe_every = max(20, affordable_probe_every(8 * fields, rows))
    return {"rank": 32, "stride": 20, "probe_every": probe_every, "probe_rows": 8, "rows": rows}


def counted(
    rank: int, stride: int, probe_every: int, probe_rows: int, rows: int = 480, fields: int = 2
) -> dict[str, Any]:
    """Of GPT-2 124M, 12 blocks of width 768, T = 1,024, `rows` rows a step (480: 0.5 million tokens).

    A training token costs 6 FLOP a parameter of a matrix and 12 x blocks x width x T of attention (causal: half), a
    probe's token two thirds of that, as no weight gradient is computed. Of a sketch's two products with the projections
    2 r (in + out) a layer, of their product 2 r². The time is that of the bytes: inputs and output gradients are read
    once more in bfloat16 and what is projected is written and read, at 4.3 TB/s, against 45 % of 989 TFLOP/s.
    """
    width, blocks, vocab, tokens = 768, 12, 50304, 1024
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    matrices = blocks * sum(i * o for i, o in shapes) + vocab * width
    token = 6 * matrices + 6 * blocks * width * tokens
    sketch = blocks * sum(2 * rank * (i + o) + 2 * rank * rank for i, o in shapes)
    moved = blocks * sum(2 * (i + o) + 3 * 2 * 2 * rank for i, o in shapes)
    probe = fields * probe_rows / (rows * probe_every) * (2 / 3 + sketch / token)
    seconds_token = token / (0.45 * 989e12)
    return {
        "rank": rank, "stride": stride, "probe_every": probe_every, "probe_rows": probe_rows, "rows a step": rows,
        "sketch FLOP": sketch / token / stride, "probe FLOP": probe, "FLOP": sketch / token / stride + probe,
        "time on an H200, estimated": moved / 4.3e12 / seconds_token / stride + probe,
        "launches a sketched micro-batch": 5 * len(shapes) * blocks,
        "state MB, 16 domains": (16 + fields) * blocks * len(shapes) * rank**2 * 4 / 1e6,
    }  # fmt: skip


KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "sketch": {"stride": 1, "probe_every": 10**9},
    "probe of 4 rows": {"stride": 10**9, "probe_every": 1, "probe_rows": 2},
}


def stepper(options: dict[str, Any] | None, rank: int) -> Callable[[], float]:
    """Takes a step of 4 x 256 tokens of a GPT of width 384 and says its seconds of processor time, in one thread."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(vocab_size=2048, seq_len=256, n_layer=4, n_head=6, n_embd=384))
    x = torch.randint(0, 2048, (4, 256))
    stats, influence = DomainStats(4), None
    if options is not None:
        probes = {field: [{"input_ids": x, "targets": x}] for field in ("source", "target")}
        stats.influence = influence = Influence(model, probes, rank=rank, **options)
        influence.begin(tuple("abcd"), 4)

    def step() -> float:
        begin = time.process_time()
        domain_cross_entropy(model(x), x, torch.arange(4), stats=stats).backward()
        if influence is not None:
            influence.end_step()
        seconds = time.process_time() - begin
        model.zero_grad()
        return seconds

    step()
    return step


def measured(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a plain step, and what a step with sketches or with a probe takes more, in turn."""
    found = []
    for rank in (8, 16, 32):
        times = in_turn({kind: stepper(options, rank) for kind, options in KINDS.items()}, rounds)
        more = {
            kind: spread([t / plain - 1 for t, plain in zip(times[kind], times["plain"], strict=True)])
            for kind in list(KINDS)[1:]
        }
        found.append({"rank": rank, "plain ms": float(np.median(times["plain"])) * 1e3, "more than plain": more})
        print(found[-1], flush=True)
    return found


def cost_rows(rounds: int) -> list[dict[str, Any]]:
    long = defaults(480)
    table = [counted(**long), counted(**long | {"rank": 16}), counted(**long | {"stride": 1}), counted(**defaults(12))]
    for row in table:
        print(row, flush=True)
    return [*table, *measured(rounds)]
