"""Where the tokens of a row stand: for a look at what a model was given when its loss jumped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixloader import _core
from mixloader.errors import StateError

if TYPE_CHECKING:
    from mixloader.loader import MixLoader


@dataclass(frozen=True)
class Place:
    """Where row `row` of plan step `step` was, or will be, read.

    domain: its name. shard: the path or URL of the file. token: of the row's first token, counted within the shard.
    document, offset: which document of the shard this token belongs to, and how far into it; None where the shard
    has no table of documents. epoch: of the domain, from 0. pieces: (token, count) of each piece of documents
    in a packed row, of which the first is at `token`; else empty.
    """

    step: int
    row: int
    domain: str
    shard: str
    token: int
    document: int | None
    offset: int | None
    epoch: int
    pieces: tuple[tuple[int, int], ...] = ()


def locate(loader: MixLoader, step: int, row: int) -> Place:
    """The place of a row of a step that is not over, as things stand; see MixLoader.locate."""
    if not 0 <= row < loader.global_batch:
        raise ValueError(f"row is {row}; a step has rows 0 to {loader.global_batch - 1}")
    loader.units_at(step)  # refuses a step that is over
    state = loader.engine.core.state()
    changes = {start: units for start, _, units in state["weights"]}
    planner = loader.engine.planner(changes[max(start for start in changes if start <= state["step"])])
    planner.load_state({key: state[key] for key in ("step", "cursors", "residuals")})
    at = state["step"]
    for start in sorted(start for start in changes if at < start <= step):
        planner.skip(start - at)
        planner.set_weights(np.array(changes[start], dtype=np.int64))
        at = start
    planner.skip(step - at)
    domains, draws, windows = planner.plan(1)
    if len(domains) == 0:
        raise StateError(f"the stream ends before step {step}, because a domain has reached its limit of epochs")
    domain, draw, window = int(domains[0, row]), int(draws[0, row]), int(windows[0, row])
    index, token, document, begin = loader.engine.core.locate(domain, window)
    shard = loader.manifest.domains[domain].shards[index]
    pieces = _pieces(loader, domain, index, window)
    if pieces:
        token = pieces[0][0]
    return Place(
        step=step,
        row=row,
        domain=loader.names[domain],
        shard=shard.path,
        token=token,
        document=document,
        offset=None if begin is None else token - begin,
        epoch=draw // int(loader.windows[domain]),
        pieces=pieces,
    )


def _pieces(loader: MixLoader, domain: int, index: int, window: int) -> tuple[tuple[int, int], ...]:
    shards = loader.engine.domains[domain][1]
    if "packing" not in shards[index]:
        return ()
    before = sum(shard["windows"] for shard in shards[:index])
    return tuple(_core.PackedRows(shards[index]["packing"]).row(window - before))
