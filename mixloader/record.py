"""The run record: JSON lines that log a run, replay its token stream and train the agent.

docs/record.md is the schema. A Recorder writes a record from a thread of its own; read_record reads
one, also while it grows or after its writer was killed. replay.py draws the recorded stream again.
"""

from __future__ import annotations

import bisect
import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mixloader.errors import RecordError
from mixloader.files import sync
from mixloader.mixture import WEIGHT_ONE

VERSION = 1

_RESUME = b'{"type":"event","event":"resume",'
_DOMAINS = b'{"type":"event","event":"domains",'
_EXISTS = "choose another path, move the file away, or load the state of its run to go on with that one"
_CHANGES = ("weights", "domains")  # events that say the weights of their step
_SAME_RUN = ("manifest", "seed", "seq_len", "global_batch", "domains", "rules")


class Recorder:
    """Appends the lines of one run to a record; one writer a file.

    path: the record; its folder is made if need be. header: see docs/record.md, without "type" and
    "version". resume_step: None begins a record, which must not exist yet; a step goes on with an
    existing one of the same run, in which that step and those after are trained again.

    Raises RecordError, at once, if another process writes the file, if it belongs to another run or
    cannot be written. An error while writing in the background is raised by the next call.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], *, resume_step: int | None = None):
        self.path = Path(path)
        self._error: Exception | None = None
        self._told = False
        header = {"type": "header", "version": VERSION, **header}
        try:
            self._file = _open(self.path, new=resume_step is None)
            try:
                _lock(self.path, self._file)
                if resume_step is None:
                    if os.fstat(self._file).st_size > 0:
                        raise RecordError(f"record {self.path} exists already, and this is a new run; {_EXISTS}")
                    self._write_line(header, digits=17)
                else:
                    attempt = _check_continues(self.path, self._file, header, resume_step) + 1
                    self._write_line({"type": "event", "event": "resume", "attempt": attempt, "step": resume_step})
                sync(self.path.parent)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise RecordError(f"cannot write record {self.path}: {error.strerror or error}") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mixloader-record")
        self._closed = False

    def decision(
        self,
        *,
        step: int,
        effect: int,
        tokens: int,
        weights: np.ndarray,
        counts: np.ndarray,
        loss: np.ndarray,
        loss_tokens: np.ndarray,
        feedback: Mapping[str, float] | None = None,
        influence: list[list[float | None]] | None = None,
        requested: np.ndarray | None = None,
        objective: np.ndarray | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue a decision line. The arrays, all [D], must not change any more.

        weights: integer units. counts: rows read since the last decision. loss: nats a token, NaN
        where nothing was read. feedback: what was reported since the last decision. influence: [D][F], if measured.
        requested, objective: integer units, where there are any. detail: more of what the policy saw (docs/record.md).
        """
        line = {
            "type": "decision", "step": step, "effect": effect, "tokens": tokens, "weights": weights,
            "counts": counts, "loss": loss, "loss_tokens": loss_tokens,
        }  # fmt: skip
        more: dict[str, Any] = {"feedback": feedback} if feedback else {}
        more |= {k: v for k, v in (("requested", requested), ("objective", objective)) if v is not None}
        if influence is not None:
            more["influence"] = _short(influence)
        if detail is not None:
            more |= {key: _short(value) if key == "influence_std" else value for key, value in detail.items()}
        self._queue(line | more)

    def event(self, event: str, *, step: int, **values: Any) -> None:
        """Queue an event line. Numbers, strings, None, and lists, arrays and mappings of them."""
        self._queue({"type": "event", "event": event, "step": step, **values})

    def flush(self) -> None:
        """Return when all that was queued is on the disk."""
        self._check()
        self._thread.submit(self._guard, os.fsync, self._file).result()
        self._check()

    def close(self) -> None:
        """Flush, end the thread and release the file. Raises RecordError for an error that no call has raised yet."""
        if self._closed:
            return
        self._closed = True
        self._thread.submit(self._guard, os.fsync, self._file)
        self._thread.shutdown(wait=True)
        # Unlocked by name: a child process forked by the user may still hold the same open file.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)
        if not self._told:
            self._check()

    def _queue(self, line: dict[str, Any]) -> None:
        self._check()
        self._thread.submit(self._guard, self._write_line, line)

    def _check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            reason = getattr(self._error, "strerror", None) or self._error
            self._told = True
            raise RecordError(
                f"cannot write record {self.path}: {reason}; the lines since then are lost: mend this, then go on "
                "from the last checkpoint"
            ) from self._error

    def _guard(self, function: Any, *arguments: Any) -> None:
        """After an error nothing more is written: a torn line must stay the last one."""
        if self._error is None:
            try:
                function(*arguments)
            except Exception as error:
                self._error = error

    def _write_line(self, line: Mapping[str, Any], digits: int = 6) -> None:
        data = _encode(line, digits)
        while data:
            data = data[os.write(self._file, data) :]


def _short(rows: list[list[float | None]]) -> list[list[float | None]]:
    """With 3 significant digits."""
    return [[None if value is None else float(f"{value:.3g}") for value in row] for row in rows]


def _encode(line: Mapping[str, Any], digits: int) -> bytes:
    return json.dumps(_plain(line, digits), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _plain(value: Any, digits: int) -> Any:
    """`value` for JSON: floats of so many significant digits (17 are exact), null for those that are not finite."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    return value if isinstance(value, (int, str)) or value is None else str(value)


def _open(path: Path, *, new: bool) -> int:
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if new else 0), 0o644)
    except FileNotFoundError as error:
        raise RecordError(
            f"record {path} of the run to go on with does not exist; put it back, or go on with record=None"
        ) from error


def _lock(path: Path, file: int) -> None:
    """The kernel releases the lock when the descriptor goes, whatever the process dies of."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RecordError(f"record {path} is being written by another process or Mixer; choose another path") from error


def _check_continues(path: Path, file: int, header: Mapping[str, Any], step: int) -> int:
    """Compare the headers, cut off a torn last line, and return the attempts so far.

    Lines are counted without being parsed, so that a record of 10^6 decisions opens in about a second.
    """
    end, attempts, first = 0, 1, b""
    grown: list[dict[str, Any]] = []
    with open(path, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            first = first or line
            end += len(line)
            attempts += line.startswith(_RESUME)
            if line.startswith(_DOMAINS) and (event := json.loads(line))["step"] <= step:
                grown.append(event)
    if not first:
        raise RecordError(f"record {path} has no whole line; move it away, or go on with record=None")
    old = _parse(path, 1, 0, first[:-1])
    # What is said of `step` itself may have come before or after the checkpoint.
    before = [event for event in grown if event["step"] < step][-1:]
    here = [event for event in grown if event["step"] == step and event["domains"] == header["domains"]][-1:]
    for event in (*before, *here):
        old |= {key: event[key] for key in ("manifest", "domains")}
    for key in _SAME_RUN:
        if old.get(key) != header.get(key):
            raise RecordError(
                f"record {path} belongs to a run with {key} {old.get(key)!r}; this run has {header.get(key)!r}; choose "
                "another path for another run"
            )
    os.ftruncate(file, end)
    return attempts


@dataclass(frozen=True)
class RunRecord:
    """A record as if its run had never been interrupted: what a resume trained again stands once.

    header, decisions, events: lines as docs/record.md has them, decisions in the order of their
    steps, events as they came; resumes are not among them. attempts: 1 + number of resumes.
    changes: (step, units) in the order of their steps; of one step, the last one holds.
    torn: the last line was cut off and is left out.
    """

    header: dict[str, Any]
    decisions: list[dict[str, Any]]
    events: list[dict[str, Any]]
    changes: list[tuple[int, list[int]]]
    attempts: int
    torn: bool

    @property
    def steps(self) -> int:
        """Plan steps that are known to be trained: all of them after a clean end, at least these otherwise."""
        ends = [event["step"] for event in self.events if event["event"] == "end"]
        return max([self.header["step"], *ends, *(decision["step"] + 1 for decision in self.decisions[-1:])])

    def units_at(self, step: int) -> np.ndarray:
        """int64 [D], sums to WEIGHT_ONE: the integer weights that plan step `step` was drawn with."""
        first = self.header["step"]
        if step < first:
            raise RecordError(f"the record begins at step {first}; it does not know the weights of step {step}")
        at = bisect.bisect_right(self._effects, step)
        return np.array(self._in_force[self._effects[at - 1]] if at else self.header["weights"], dtype=np.int64)

    @cached_property
    def _in_force(self) -> dict[int, list[int]]:
        return dict(self.changes)

    @cached_property
    def _effects(self) -> list[int]:
        return sorted(self._in_force)


def read_record(path: str | Path) -> RunRecord:
    """Read a record; see RunRecord.

    Raises RecordError, with line and byte, for anything that is not a line of a record. Only a last
    line without its end is taken for what a killed writer left.
    """
    path = Path(path)
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"cannot read record {path}: {error.strerror}") from error
    if not whole:
        raise RecordError(f"record {path} has no whole line; expected a header")
    lines: list[dict[str, Any]] = []
    offset = 0
    sizes: list[tuple[int, int]] = []  # (step, number of domains from then on)
    for number, text in enumerate(whole, 1):
        line = _parse(path, number, offset, text, domains=sizes[-1][1] if sizes else None)
        if line["type"] == "header" or line.get("event") == "domains":
            sizes.append((line["step"], len(line["domains"])))
        elif line.get("event") == "resume":
            sizes = sizes[:1] + [size for size in sizes[1:] if size[0] < line["step"]]
        lines.append(line)
        offset += len(text) + 1
    return _canonical(lines, torn=bool(rest))


def _canonical(lines: list[dict[str, Any]], torn: bool) -> RunRecord:
    header, attempts = lines[0], 1
    kept: list[dict[str, Any]] = []
    for line in lines[1:]:
        if line.get("event") == "resume":
            attempts += 1
            kept = [earlier for earlier in kept if earlier["step"] < line["step"]]
        else:
            kept.append(line)
    grown = [line for line in kept if line.get("event") == "domains"]
    if grown:
        # Domains only ever come at the end: the run is told as if all had been there, without a weight.
        size = len(grown[-1]["domains"])
        header = _padded(header, size) | {key: grown[-1][key] for key in ("domains", "fields", "manifest")}
        kept = [_padded(line, size) for line in kept]
    # Decisions that were under way at a checkpoint were made and written once more after the resume.
    decisions = {line["step"]: line for line in kept if line["type"] == "decision"}
    changes = [
        (line.get("effect", line["step"]), line["weights"])
        for line in kept
        if (decisions[line["step"]] is line if line["type"] == "decision" else line["event"] in _CHANGES)
    ]
    return RunRecord(
        header=header,
        decisions=[decisions[step] for step in sorted(decisions)],
        events=[line for line in kept if line["type"] == "event"],
        changes=sorted(changes, key=lambda change: change[0]),
        attempts=attempts,
        torn=torn,
    )


def _padded(line: dict[str, Any], size: int) -> dict[str, Any]:
    """A line of a time with fewer domains, for `size` of them."""
    blanks: dict[str, Any] = dict.fromkeys(("weights", "counts", "loss_tokens", "requested", "objective"), 0)
    blanks |= {"loss": None, "loss_std": None, "tokens": 0, "windows": 0, "prior": 0}
    blanks |= {"influence_rows": 0, "influence_step": -1}
    if line["type"] == "decision" and line.get("influence"):
        blanks["influence"] = blanks["influence_std"] = [None] * len(line["influence"][0])
    return line | {
        key: line[key] + [blank] * (size - len(line[key]))
        for key, blank in blanks.items()
        if isinstance(line.get(key), list)
    }


def _parse(path: Path, number: int, offset: int, text: bytes, domains: int | None = None) -> dict[str, Any]:
    """One line, checked. domains: how many the header names; None for the header itself."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        line = json.loads(text.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        byte = offset + getattr(error, "start", getattr(error, "pos", 0))
        raise RecordError(f"record {path} is damaged in line {number}, at byte {byte}: {error}") from error
    problem = _problem(line, domains)
    if problem:
        raise RecordError(f"record {path} is damaged in line {number}, at byte {offset}: {problem}")
    return line


def _problem(line: Any, domains: int | None) -> str | None:
    """What is wrong with a line, if anything."""
    kinds = ("header",) if domains is None else ("decision", "event")
    if not isinstance(line, dict) or line.get("type") not in kinds:
        return f"expected an object with type {' or '.join(map(repr, kinds))}"
    if domains is None:
        if line.get("version") != VERSION:
            return f"its version is {line.get('version')!r}; this mixloader reads version {VERSION}, upgrade it"
        domains = len(line["domains"]) if isinstance(line.get("domains"), list) else 0
    special = line["type"] == "event" and line.get("event") in ("weights", "resume", "domains")
    if line.get("event") == "domains":
        domains = len(line["domains"]) if isinstance(line.get("domains"), list) else 0
    for key, expected in _KEYS[line["event"] if special else line["type"]].items():
        if not _CHECKS[expected](line.get(key), domains):
            return f"its {key!r} is {line.get(key)!r}; expected {expected}"
    return None


def _all_of(value: Any, domains: int, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == domains and all(map(check, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_loss(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_mixture(value: Any, domains: int) -> bool:
    return _all_of(value, domains, _is_count) and sum(value) == WEIGHT_ONE


_UNITS = f"counts, one a domain, that sum to {WEIGHT_ONE}"
_LOSSES = "numbers or null, one a domain"
_MORE_LOSSES = "nothing, or numbers or null, one a domain"
_INFLUENCE = "nothing, or a list of numbers or null for each domain"
_MORE_UNITS = f"nothing, or {_UNITS}"
_CHECKS: dict[str, Callable[[Any, int], bool]] = {
    "a string": lambda value, _: isinstance(value, str),
    "a count": lambda value, _: _is_count(value),
    "a step, or -1": lambda value, _: value == -1 or _is_count(value),
    "rules of a stream, or none": lambda value, _: value is None or isinstance(value, dict),
    "a list of names": lambda value, n: _all_of(value, n, lambda item: isinstance(item, str)),
    "a list, one a domain": lambda value, n: isinstance(value, list) and len(value) == n,
    "counts, one a domain": lambda value, n: _all_of(value, n, _is_count),
    _LOSSES: lambda value, n: _all_of(value, n, _is_loss),
    _MORE_LOSSES: lambda value, n: value is None or _all_of(value, n, _is_loss),
    _INFLUENCE: lambda value, n: (
        value is None or _all_of(value, n, lambda row: isinstance(row, list) and all(map(_is_loss, row)))
    ),
    _UNITS: lambda value, n: _is_mixture(value, n),
    _MORE_UNITS: lambda value, n: value is None or _is_mixture(value, n),
}
_KEYS: dict[str, dict[str, str]] = {
    "header": {
        "manifest": "a string", "seed": "a count", "global_batch": "a count", "batch_size": "a count",
        "seq_len": "a count", "step": "a count", "domains": "a list of names", "weights": _UNITS,
        "rules": "rules of a stream, or none",
    },
    "decision": {
        "step": "a count", "effect": "a count", "tokens": "a count", "weights": _UNITS,
        "counts": "counts, one a domain", "loss": _LOSSES, "loss_tokens": "counts, one a domain",
        "influence": _INFLUENCE, "requested": _MORE_UNITS, "objective": _MORE_UNITS, "loss_std": _MORE_LOSSES,
        "influence_std": _INFLUENCE,
    },
    "event": {"event": "a string", "step": "a step, or -1"},
    "weights": {"step": "a count", "weights": _UNITS},
    "resume": {"step": "a count", "attempt": "a count"},
    "domains": {
        "step": "a count", "manifest": "a string", "domains": "a list of names", "fields": "a list, one a domain",
        "weights": _UNITS,
    },
}  # fmt: skip
