"""The state of a loader: what it must hold, whose it is, and how it fits a loader that has changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixloader.errors import StateError
from mixloader.mixture import WEIGHT_ONE

if TYPE_CHECKING:
    from mixloader.loader import MixLoader

STATE_VERSION = 2


def check_state(state: Mapping[str, Any], loader: MixLoader) -> None:
    """Raise StateError unless `state` is of the data, seed and rules of `loader`, and sound.

    The loader may have domains appended since. Another global batch is fine between steps, another
    seq_len always.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"the loader state is {state!r}; expected what state_dict() gave")
    own = loader.state_dict()
    missing = sorted(set(own) - set(state))
    if missing:
        raise StateError(f"the loader state has no {missing[0]!r}; it is damaged or was not saved by a MixLoader")
    if state["version"] != STATE_VERSION:
        raise StateError(
            f"the loader state has version {state['version']}; this mixloader reads version {STATE_VERSION}"
        )
    names = state["domains"]
    if not isinstance(names, list) or list(loader.names[: len(names)]) != names:
        raise StateError(
            f"the loader state was saved with other domains: {names!r}; this loader has {list(loader.names)!r}, "
            "and may only have more at the end"
        )
    expected = {
        "fingerprint": ("data", loader.manifest.prefix_fingerprint(len(names))),
        "seed": ("seed", loader.seed),
        "rules": ("rules", own["rules"]),
    }
    for key, (what, value) in expected.items():
        if state[key] != value:
            raise StateError(f"the loader state was saved with other {what}: {state[key]!r}; this loader has {value!r}")
    _check_numbers(state, len(names))
    if state["seq_len"] != loader.seq_len and loader.rules.exhausted != "repeat":
        raise StateError(
            f"the loader state was saved with seq_len {state['seq_len']}; under exhausted={loader.rules.exhausted!r} "
            f"limits are counted in windows of one length, so it cannot go on with {loader.seq_len}"
        )
    _check_schedule(state["schedule"], loader)
    if state["global_batch"] != loader.global_batch and state["rows"]:
        raise StateError(
            f"the loader state was saved {state['rows']} rows into a step of {state['global_batch']} rows; "
            f"a change to a global batch of {loader.global_batch} is possible between steps only"
        )


def _check_schedule(saved: Any, loader: MixLoader) -> None:
    """Refuse a state that follows a schedule which the loader does not have."""
    if saved is None:
        return
    own = loader.schedule_digest
    if not isinstance(saved, Mapping) or saved.get("is") != own:
        raise StateError(
            f"the loader state was saved with the schedule {saved!r}; this loader has "
            f"{'none' if own is None else own!r}: give the schedule of that run as weights="
        )


def _check_numbers(state: Mapping[str, Any], domains: int) -> None:
    """Refuse numbers that cannot be those of a stream over so many domains."""

    def integer(value: Any, least: int = 0) -> bool:
        return type(value) is int and least <= value < 1 << 63

    def integers(values: Any, least: int) -> bool:
        return isinstance(values, (list, tuple)) and len(values) == domains and all(integer(v, least) for v in values)

    def units(values: Any) -> bool:
        return integers(values, 0) and sum(values) == WEIGHT_ONE

    try:
        steps = [step for step, _, _ in state["weights"]]
        sound = (
            all(integer(state[key]) for key in ("step", "rows", "weights_version", "seq_len", "global_batch"))
            and state["seq_len"] > 0
            and state["rows"] < state["global_batch"]
            and integers(state["cursors"], 0)
            and integers(state["residuals"], -(1 << 62))
            and integers(state["tokens_before"], -(1 << 63))
            and sum(state["residuals"]) == 0
            and all(integer(step) and integer(version) and units(of) for step, version, of in state["weights"])
            and steps == sorted(set(steps))
            and steps[0] <= state["step"]
            and isinstance(state["removed"], (list, tuple))
            and all(name in state["domains"] for name in state["removed"])
            and (state["prior"] is None or units(state["prior"]))
        )
    except (TypeError, ValueError, IndexError):
        sound = False
    if not sound:
        raise StateError(
            f"the loader state is damaged: {dict(state)!r} is no position in a stream of {domains} domains"
        )


def append_domains(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same position for a stream with the further domains of `names`, of which nothing was read.

    A domain of weight zero changes nothing in the plan of the others, so this is the stream that would
    have been if they had been there from the start.
    """
    more = [0] * (len(names) - len(state["cursors"]))
    return {
        **state,
        "domains": list(names),
        "weights": [[step, version, [*units, *more]] for step, version, units in state["weights"]],
        "prior": None if state["prior"] is None else [*state["prior"], *more],
        **{key: [*state[key], *more] for key in ("cursors", "residuals", "tokens_before")},
    }


def change_seq_len(
    state: Mapping[str, Any], seq_len: int, old_windows: np.ndarray, windows: np.ndarray
) -> dict[str, Any]:
    """The same position for rows of another length: each domain begins its next epoch.

    old_windows, windows: int64 [D], of one epoch, before and after.
    """
    epochs = [-(-cursor // int(n)) for cursor, n in zip(state["cursors"], old_windows, strict=True)]
    cursors = [epoch * int(n) for epoch, n in zip(epochs, windows, strict=True)]
    tokens_before = [
        before + old * state["seq_len"] - new * seq_len
        for before, old, new in zip(state["tokens_before"], state["cursors"], cursors, strict=True)
    ]
    return {**state, "seq_len": seq_len, "cursors": cursors, "tokens_before": tokens_before}
