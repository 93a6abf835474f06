"""What a Mixer writes to the record of its run: when it begins, goes on and ends, and which lines."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixloader.decision import Decision
from mixloader.loader import MixLoader
from mixloader.mixture import quantize
from mixloader.record import Recorder


def make_header(loader: MixLoader, step: int, weights: list[int], **of_the_mixer: Any) -> dict[str, Any]:
    """The header of a record that begins at plan step `step` with integer `weights`; docs/record.md."""
    return {
        "mixloader": version("mixloader"),
        "manifest": loader.manifest.fingerprint,
        "seed": loader.seed,
        "global_batch": loader.global_batch,
        "batch_size": loader.batch_size,
        "seq_len": loader.seq_len,
        "rules": loader.rules.to_json(),
        "step": step,
        "domains": list(loader.names),
        "fields": list(loader.table.fields),
        "tokens": loader.table.tokens,
        "windows": loader.windows,
        "prior": quantize(loader.table.prior),
        "weights": weights,
        **of_the_mixer,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": str(torch.__version__)},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class RunLog:
    """The record of one run, begun with its first line or continued by resume(); with path None, none."""

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]):
        self._path = None if path is None else Path(path)
        self._header = header
        self._record: Recorder | None = None

    def begin(self) -> None:
        """Make the record, unless it was begun or continued."""
        if self._record is None and self._path is not None:
            self._record = Recorder(self._path, self._header)

    def resume(self, step: int) -> None:
        """Go on with the record, where plan step `step` is trained next, perhaps again."""
        self.close()
        if self._path is not None:
            self._record = Recorder(self._path, self._header, resume_step=step)

    def event(self, event: str, step: int, **values: Any) -> None:
        self.begin()
        if self._record is not None:
            self._record.event(event, step=step, **values)

    def decision(self, decision: Decision, weights: list[int], at: int, objective: np.ndarray | None = None) -> None:
        """weights: integer units of decision.effect. at: the plan step that has just ended. objective: units, too."""
        self.begin()
        if self._record is None:
            return
        self._record.decision(
            step=decision.step,
            effect=decision.effect,
            tokens=decision.tokens,
            weights=np.array(weights, dtype=np.int64),
            counts=decision.counts,
            loss=decision.loss,
            loss_tokens=decision.loss_tokens,
            feedback=decision.feedback,
            influence=decision.influence,
            requested=decision.requested,
            objective=objective,
            detail=decision.detail,
        )
        if decision.error is not None:
            self._record.event("policy_error", step=at, source=decision.step, error=decision.error)

    def end(self, step: int) -> None:
        """The line of a run that ended well, if anything was written."""
        if self._record is not None:
            self._record.event("end", step=step)

    def flush(self) -> None:
        """Return when all lines are on the disk.

        A record that is there and was not begun here is left alone: whoever asks may be about to resume it.
        """
        if self._path is not None and not (self._path.exists() and self._path.stat().st_size):
            self.begin()
        if self._record is not None:
            self._record.flush()

    def close(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None
