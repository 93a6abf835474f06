"""A recorded stream again: drawn, or only planned to find out what stood where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.errors import RecordError
from mixloader.loader import MixLoader
from mixloader.manifest import Manifest
from mixloader.place import Place
from mixloader.record import RunRecord, read_record


def replay(record: RunRecord | str | Path, data: Any, *, batch_size: int | None = None, **options: Any) -> MixLoader:
    """A loader that draws exactly the recorded stream (guarantee G1), from step 0.

    data: as for MixLoader; it must be the data of the run. batch_size: rows of a micro-batch, by
    default that of the run; any that divides the global batch gives the same rows in the same order.
    options: of MixLoader; the record sets weights, seed, seq_len and global_batch.
    Raises RecordError if the data are others, or if the record does not begin at step 0.
    """
    run = record if isinstance(record, RunRecord) else read_record(record)
    header, manifest = run.header, Manifest.open(data, roots=options.pop("roots", ()))
    if manifest.fingerprint != header["manifest"]:
        raise RecordError(
            f"the record belongs to data with fingerprint {header['manifest']} ({', '.join(header['domains'])}), but "
            f"the given data have {manifest.fingerprint} ({', '.join(manifest.names)}); give the data of that run"
        )
    if header["step"] != 0:
        raise RecordError(
            f"the record begins at step {header['step']}, where its Mixer was attached; a replay needs one from step 0"
        )
    loader = MixLoader(
        manifest,
        header["batch_size"] if batch_size is None else batch_size,
        header["seq_len"],
        weights=np.array(header["weights"], dtype=np.int64),
        global_batch=header["global_batch"],
        seed=header["seed"],
        **(header.get("rules") or {}),
        **options,
    )
    for step, units in run.changes:
        loader.set_weights(np.array(units, dtype=np.int64), step=step)
    return loader


def locate(record: RunRecord | str | Path, data: Any, step: int, rows: Iterable[int], **options: Any) -> list[Place]:
    """Where rows (of the global batch) of plan step `step` of a recorded run stood; no tokens are read for it.

    data: the data of that run. options: of MixLoader. Raises RecordError as replay does, and for a step that the
    record does not reach.
    """
    run = record if isinstance(record, RunRecord) else read_record(record)
    if not 0 <= step < run.steps:
        raise RecordError(f"the record knows of steps 0 to {run.steps - 1}; step {step} is none of them")
    with replay(run, data, num_workers=0, **options) as loader:
        loader.skip(step)
        return [loader.locate(step, row) for row in rows]
