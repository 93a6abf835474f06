"""What influence costs: arithmetic and bytes of GPT-2 124M, counted, and milliseconds on this machine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from bench.common import in_turn, spread
from mixloader import Influence
from mixloader.config import ModelConfig
from mixloader.loss import domain_cross_entropy
from mixloader.stats import DomainStats
from mixloader.train.model import build_model

DEFAULTS = {"rank": 32, "stride": 20, "probe_every": 20, "probe_rows": 8}


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


def measured(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of processor time of a step of 4 x 256 tokens of a GPT of width 384, in turn: plain, with sketches, and a probe."""
    torch.manual_seed(0)
    size = {"vocab_size": 2048, "seq_len": 256, "n_layer": 4, "n_head": 6, "n_embd": 384}
    model = build_model(ModelConfig(**size))
    x = torch.randint(0, 2048, (4, 256))
    ids, names = torch.arange(4), tuple("abcd")
    probes = {"source": [{"input_ids": x, "targets": x}], "target": [{"input_ids": x, "targets": x}]}
    found = []

    def step(stats: DomainStats, end) -> float:
        begin = time.process_time()  # one thread: a busy machine does no harm
        domain_cross_entropy(model(x), x, ids, stats=stats).backward()
        end()
        seconds = time.process_time() - begin
        model.zero_grad()
        return seconds

    for rank in (8, 16, 32):
        sketching = Influence(model, probes, rank=rank, stride=1, probe_every=10**9)
        probing = Influence(model, probes, rank=rank, stride=10**9, probe_every=1, probe_rows=2)
        stats = {}
        for name, influence in (("sketch", sketching), ("probe of 4 rows", probing)):
            influence.begin(names, 4)
            stats[name] = DomainStats(4)
            stats[name].influence = influence
        measures = {
            "plain": lambda: step(DomainStats(4), lambda: None),
            "sketch": lambda stats=stats: step(stats["sketch"], sketching.end_step),
            "probe of 4 rows": lambda stats=stats: step(stats["probe of 4 rows"], probing.end_step),
        }
        sketching.at(1)  # without sketches while the others are measured
        for measure in measures.values():
            measure()
        times: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(rounds):
            for name, measure in measures.items():
                sketching._sketcher.enabled = name == "sketch"
                if name == "sketch":
                    sketching.at(0)
                times[name] += in_turn({name: measure}, 1)[name]
                sketching._sketcher.enabled = False
        extra = {
            name: spread([t / p - 1 for t, p in zip(times[name], times["plain"], strict=True)])
            for name in ("sketch", "probe of 4 rows")
        }
        found.append({"rank": rank, "plain ms": float(np.median(times["plain"])) * 1e3, "more than plain": extra})
        print(found[-1], flush=True)
        for influence in (sketching, probing):
            influence.close()
    return found


def cost_rows(rounds: int) -> list[dict[str, Any]]:
    table = [counted(**DEFAULTS), counted(**DEFAULTS | {"rank": 16}), counted(**DEFAULTS | {"stride": 1})]
    table.append(counted(**DEFAULTS, rows=12))
    for row in table:
        print(row, flush=True)
    return [*table, *measured(rounds)]
