"""The folder of a run: who may write to it, what run it belongs to, its metrics and its result."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from mixloader.errors import ConfigError, StateError
from mixloader.files import replace
from mixloader.train.checkpoint import latest_checkpoint, read_state

FREE_KEYS = frozenset(
    {
        "data",
        "out",
        "init_from",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "trackers",
        "device",
        "threads",
        "record_detail",
    }
)
"""Keys that may change when a run is resumed: they do not change what it computes, or what they name is
compared by its contents instead (`data`) or is in the checkpoint already (`init_from`)."""


class RunFolder:
    """`out` of one run, held by one process at a time (a lock that the kernel releases when the process ends).

    writes: False on ranks that leave all writing to another one: they take no lock and write nothing.
    Entering it raises ConfigError if the folder cannot be written to, StateError if another process trains into it.
    """

    def __init__(self, out: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(out), writes
        self.record = self.path / "record.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"

    def __enter__(self) -> RunFolder:
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise ConfigError(f"cannot write to out = {self.path}: {error.strerror}; choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateError(f"another process trains into {self.path}; wait for it or choose another out") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self._lock.close()

    def find(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint to go on from, and the result if the run is finished; None for what is not there."""
        path = self.checkpoint_of(identity)
        finished = path is not None and self.result.exists()
        return {
            "checkpoint": None if path is None else str(path),
            "result": json.loads(self.result.read_text(encoding="utf-8")) if finished else None,
        }

    def checkpoint_of(self, identity: dict[str, Any]) -> Path | None:
        """The checkpoint to go on from, None for a fresh start.

        identity: the config as plain values, with the fingerprint of the data as "manifest".
        Raises StateError if the folder holds another run, naming the first key that differs, or the remains
        of a run that cannot be gone on with.
        """
        path = latest_checkpoint(self.path)
        if path is not None:
            self._compare(flatten(read_state(path)["config"]), flatten(identity))
            return path
        if self._has_trained():
            raise StateError(
                f"{self.path} holds a run that has trained, but no checkpoint to go on from; "
                "choose another out, or move its files away"
            )
        self.record.unlink(missing_ok=True)
        self.metrics.unlink(missing_ok=True)
        return None

    def _has_trained(self) -> bool:
        """Whether the files show more than a run killed before its first step."""
        decided = self.record.exists() and b'"type":"decision"' in self.record.read_bytes()
        return decided or self.result.exists() or any(line["step"] > 0 for line in self._read_metrics())

    def _compare(self, saved: dict[str, Any], given: dict[str, Any]) -> None:
        for key in sorted(saved.keys() | given.keys()):
            if key.split(".")[0] in FREE_KEYS or saved.get(key) == given.get(key):
                continue
            name = "data (by fingerprint)" if key == "manifest" else key
            raise StateError(
                f"{self.path} holds a run with {name} = {saved.get(key)!r}, but now it is {given.get(key)!r}; "
                "go on with the former value, or choose another out for a new run"
            )

    def append_metrics(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(_compact(line))

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which will be trained again."""
        if not self.writes:
            return
        kept = [line for line in self._read_metrics() if line["step"] <= step]
        replace(self.metrics, "".join(_compact(line) for line in kept))

    def _read_metrics(self) -> list[dict[str, Any]]:
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.exists() else []
        # A kill may leave the last line without its end.
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _compact(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
