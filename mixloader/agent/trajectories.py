"""Trajectories in one file: columns of all of them, numbers of 5 significant digits, compressed with Zstandard.

The content is a line of JSON with the shapes of each trajectory's columns and all that is no array, then the columns,
one after the other, each of all trajectories: float32 or little-endian integers, their first bytes before their second
ones, and so on, which compresses best.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.agent.trajectory import Trajectory
from mixloader.errors import ConfigError, RecordError
from mixloader.files import replace
from mixloader.observation import DomainTable

__all__ = ["Trajectory", "read_trajectories", "rounded", "write_trajectories"]

VERSION = 1
DIGITS = 5
_LEVEL = 19
_MOST = 1 << 31  # bytes of content that are read
_FLOATS = ("weights", "loss", "loss_std", "feedback", "influence", "influence_std", "held_out")
_COUNTS = (
    "windows", "step", "effect", "tokens", "counts", "loss_tokens", "feedback_step", "influence_at", "influence_rows",
    "influence_step", "probe_step", "held_out_tokens", "probed",
)  # fmt: skip
_PLAIN = (
    "rows_per_step", "seq_len", "token_budget", "feedback_names", "influence_fields", "preference", "meta",
)  # fmt: skip


def write_trajectories(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write a file, atomically. Floats keep DIGITS significant digits. Raises ConfigError without zstandard."""
    entries: list[dict[str, Any]] = []
    for each in trajectories:
        table = {
            "names": each.table.names,
            "fields": each.table.fields,
            "groups": each.table.groups,
            "tokens": each.table.tokens.tolist(),
            "prior": rounded(each.table.prior).tolist(),
        }
        shapes = {key: list(getattr(each, key).shape) for key in (*_FLOATS, *_COUNTS)}
        entries.append({"table": table, "shapes": shapes, **{key: getattr(each, key) for key in _PLAIN}})
    columns, dtypes = [], {}
    for key in (*_FLOATS, *_COUNTS):
        values = np.concatenate([np.asarray(getattr(each, key)).ravel() for each in trajectories] or [np.zeros(0)])
        packed = rounded(values).astype("<f4") if key in _FLOATS else _smallest(values)
        dtypes[key] = packed.dtype.str
        columns.append(packed.view(np.uint8).reshape(len(packed), packed.itemsize).T.tobytes())
    head = json.dumps({"mixloader_trajectories": VERSION, "dtypes": dtypes, "trajectories": entries})
    content = b"".join([head.encode(), b"\n", *columns])
    replace(Path(path), _zstandard().ZstdCompressor(level=_LEVEL, write_checksum=True).compress(content))


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """The trajectories of a file. Raises RecordError if it is none, ConfigError without zstandard."""
    zstandard = _zstandard()
    try:
        packed = Path(path).read_bytes()
        content = zstandard.ZstdDecompressor().decompress(packed, max_output_size=_MOST)
        head, _, columns = content.partition(b"\n")
        known = json.loads(head)
        if known["mixloader_trajectories"] != VERSION:
            raise RecordError(
                f"{path} has version {known['mixloader_trajectories']!r}; this mixloader reads version {VERSION}"
            )
        parts = _columns(columns, known["dtypes"], [entry["shapes"] for entry in known["trajectories"]])
        return [_trajectory(entry, arrays) for entry, arrays in zip(known["trajectories"], parts, strict=True)]
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path} is no file of trajectories, or damaged: {error}") from error


def rounded(values: np.ndarray) -> np.ndarray:
    """float64, to DIGITS significant digits."""
    values = np.asarray(values, dtype=np.float64)
    usable = np.isfinite(values) & (values != 0)
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.where(usable, np.abs(values), 1.0))))
    return np.where(usable, np.round(values * scale) / scale, values)


def _columns(content: bytes, dtypes: dict[str, str], shapes: list[dict[str, list[int]]]) -> list[dict[str, np.ndarray]]:
    """The columns of each trajectory, by name."""
    parts: list[dict[str, np.ndarray]] = [{} for _ in shapes]
    start = 0
    for key in (*_FLOATS, *_COUNTS):
        dtype = np.dtype(dtypes[key])
        sizes = [int(np.prod(shape[key])) for shape in shapes]
        end = start + sum(sizes) * dtype.itemsize
        planes = np.frombuffer(content[start:end], dtype=np.uint8).reshape(dtype.itemsize, -1)
        column = np.ascontiguousarray(planes.T).view(dtype).ravel()
        values = rounded(column) if key in _FLOATS else column.astype(bool if key == "probed" else np.int64)
        for part, shape, piece in zip(parts, shapes, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            part[key] = piece.reshape(shape[key])
        start = end
    if start != len(content):
        raise ValueError(f"{len(content) - start} bytes are left over")
    return parts


def _trajectory(entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    names, fields, groups = (tuple(entry["table"][key]) for key in ("names", "fields", "groups"))
    tokens, prior = np.array(entry["table"]["tokens"], dtype=np.int64), np.array(entry["table"]["prior"])
    values: dict[str, Any] = {**arrays}
    values |= {key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in _PLAIN}
    made = Trajectory(table=DomainTable(names, fields, groups, tokens, prior), **values)
    # Five digits of a mixture need not add up to one.
    return dataclasses.replace(made, weights=made.weights / made.weights.sum(axis=1, keepdims=True))


def _smallest(values: np.ndarray) -> np.ndarray:
    """Integers in the narrowest type that holds them, -1 included."""
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    kind = next(k for k in ("<i1", "<i2", "<i4", "<i8") if least >= np.iinfo(k).min and most <= np.iinfo(k).max)
    return np.ascontiguousarray(values.astype(kind))


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            "a file of trajectories is compressed with zstandard; pip install zstandard, or 'mixloader[remote]'"
        ) from error
    return zstandard
