"""StreamRules: what the token stream is a function of beside data, seed, weights, batch size and seq_len."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np

from mixloader import _core
from mixloader.errors import ConfigError

NO_LIMIT = (1 << 64) - 1
_SAMPLING = {
    "quota": _core.Sampling.QUOTA,
    "multinomial": _core.Sampling.MULTINOMIAL,
    "exact": _core.Sampling.EXACT,
}
_EXHAUSTED = ("repeat", "stop", "redistribute")
_DOCUMENTS = {
    None: _core.Boundaries.NONE,
    "index": _core.Boundaries.INDEX,
    "eot": _core.Boundaries.AFTER_EOT,
    "eot_start": _core.Boundaries.AT_EOT,
}
_PACKING = (None, "best_fit")


@dataclass(frozen=True)
class StreamRules:
    """The rules of one stream; a state is resumed under the rules that it was saved with.

    sampling: how rows are given to domains. "quota": error diffusion, in varied company. "multinomial": each
        row by chance. "exact": Megatron's greedy blend, in its order.
    shuffle: windows are permuted anew in every epoch of a domain; else each domain's come in the order of the
        disk (the rows of a step are in an order of their own all the same, but with sampling="exact").
    shuffle_shards: permute the shards instead, and windows only among so many of them at a time; 0 permutes
        all windows. Remote and compressed shards need it, or every batch would need another few of them.
    exhausted: what happens to a domain that has been read max_epochs times. "repeat": it begins again;
        "stop": the stream ends; "redistribute": the others take its rows.
    max_epochs: one number for all domains or one by name; by default 1 under "stop" and "redistribute".
    documents: where documents begin: "index" (the shards' own tables), "eot" (after each end-of-text token),
        "eot_start" (at each of them), or None (not asked).
    mask_boundaries: targets that begin another document are ignored. packing: None, or "best_fit".
    """

    sampling: str = "quota"
    shuffle: bool = True
    shuffle_shards: int = 0
    exhausted: str = "repeat"
    max_epochs: float | Mapping[str, float] | None = None
    documents: str | None = None
    mask_boundaries: bool = False
    packing: str | None = None

    def __post_init__(self) -> None:
        for key, known in (
            ("sampling", _SAMPLING), ("exhausted", _EXHAUSTED), ("documents", _DOCUMENTS), ("packing", _PACKING),
        ):  # fmt: skip
            value = getattr(self, key)
            if not (value is None or isinstance(value, str)) or value not in known:
                expected = " or ".join(map(repr, known))
                raise ConfigError(f"{key} is {getattr(self, key)!r}; expected {expected}")
        for key in ("shuffle", "mask_boundaries"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} is {getattr(self, key)!r}; expected True or False")
        if type(self.shuffle_shards) is not int or not 0 <= self.shuffle_shards < 1 << 32:
            raise ConfigError(f"shuffle_shards is {self.shuffle_shards!r}; expected a whole number of shards")
        if self.shuffle_shards and not self.shuffle:
            raise ConfigError("shuffle_shards is given with shuffle=False; leave one of them out")
        if self.mask_boundaries and self.documents is None:
            raise ConfigError("mask_boundaries needs to know where documents begin; give documents='index' or 'eot'")
        if self.packing is not None and self.documents is None:
            raise ConfigError("packing needs to know where documents begin; give documents='index' or 'eot'")
        if self.max_epochs is not None:
            if self.exhausted == "repeat":
                raise ConfigError("max_epochs is given, but exhausted='repeat'; say 'stop' or 'redistribute'")
            for epochs in self.max_epochs.values() if isinstance(self.max_epochs, Mapping) else [self.max_epochs]:
                if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 < epochs < float("inf"):
                    raise ConfigError(
                        f"max_epochs is {self.max_epochs!r}; expected numbers above 0, and no entry for no limit"
                    )

    def limits(self, names: Sequence[str], windows: np.ndarray) -> list[int]:
        """The draws that each domain may give in all. Raises ConfigError for a name that is no domain's."""
        if self.exhausted == "repeat":
            return [NO_LIMIT] * len(names)
        epochs = self.max_epochs
        if isinstance(epochs, Mapping):
            unknown = sorted(set(epochs) - set(names))
            if unknown:
                raise ConfigError(f"max_epochs names {unknown[0]!r}; the domains are {', '.join(names)}")
            of = [epochs.get(name) for name in names]
        else:
            of = [1 if epochs is None else epochs] * len(names)
        return [
            # As written: 0.29 of 100 windows are 29, though the float below 0.29 times 100 is less.
            NO_LIMIT if e is None else min(NO_LIMIT, floor(Fraction(str(e)) * int(w)))
            for e, w in zip(of, windows, strict=True)
        ]

    @property
    def boundaries(self) -> _core.Boundaries:
        return _DOCUMENTS[self.documents]

    def plan_for_core(self) -> dict[str, Any]:
        """The core's arguments for the plan, without the limits."""
        return {
            "sampling": _SAMPLING[self.sampling],
            "shuffle": self.shuffle,
            "shuffle_shards": self.shuffle_shards,
            "stop_at_limit": self.exhausted == "stop",
        }

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults; JSON-able. StreamRules(**rules.to_json()) are the same rules."""
        default = asdict(StreamRules())
        return {key: value for key, value in asdict(self).items() if value != default[key]}
