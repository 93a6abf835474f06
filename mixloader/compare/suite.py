"""The suite: which policies are compared, in which scenarios, with which seeds; read from YAML or JSON.

What is shared stands once at the top, and a scenario says what differs. Everything is checked before anything
is trained: unknown keys, policies and domains are refused with what is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mixloader.compare.preparations import Preparation, make_preparation
from mixloader.config import TrainConfig, check_types, merge, read_yaml
from mixloader.errors import ConfigError
from mixloader.policies import make_policy

Made = TypeVar("Made")

OWN_KEYS = frozenset(
    {"data", "roots", "out", "seed", "policy", "policy_options", "weights", "feedback", "eval_every", "eval_windows",
     "checkpoint_every", "keep_checkpoints", "init_from", "log_every", "threads"}
)  # fmt: skip
"""Keys of TrainConfig that the comparison sets itself, so that they cannot stand under `train`."""


@dataclass(frozen=True)
class Entry:
    """A policy of the suite, or the same one again with other options.

    policy: its registered name; None takes the name of the entry. options: as `make_policy` takes them; an option
        `preference` that is not given is that of the scenario.
    prepare: what has to be trained before it, {"by": name, ...} (see preparations.py), counted as its cost.
    feedback: whether it is told the losses on the probes; None: if it needs or uses them.
    train: keys of TrainConfig that differ for this entry.
    """

    policy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] | None = None
    feedback: bool | None = None
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        _check_train(self.train)

    def options_for(self, policy: str, preference: float, prepared: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the policy is made with in a scenario. prepared: what its preparation found."""
        options = {**self.options, **prepared}
        if "preference" in inspect.signature(type(make_policy(policy, **options))).parameters:
            options.setdefault("preference", preference)
        return options


@dataclass(frozen=True)
class Scenario:
    """A base model that is to learn something new without losing what it knows.

    data: what Manifest.open takes, or "demo" for the demo's corpus. roots: as in TrainConfig.
    source, target: domains to keep and to learn; the score counts all of them. other: domains that may be read
        and that no score counts.
    probes: the domains among source and target whose held-out loss is feedback; None: all of them.
    preference: weight of the source field in the score, in [0, 1]; the target field has the rest.
    base: parameters to start from (a path, as TrainConfig.init_from), or the keys of TrainConfig with which a base is
        pre-trained on the source domains; None: random parameters.
    prior: the mixture that policies without one of their own begin with, as {"policy": name, "options": {...}}.
    train: keys of TrainConfig.
    """

    name: str
    data: Any
    source: list[str]
    target: list[str]
    other: list[str] = field(default_factory=list)
    probes: list[str] | None = None
    preference: float = 0.5
    roots: list[str] = field(default_factory=list)
    base: Any = None
    prior: dict[str, Any] = field(default_factory=lambda: {"policy": "fields"})
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if self.name in ("", "..") or self.name != Path(self.name).name:
            raise ConfigError(f"a scenario is called {self.name!r}; expected a name that a folder may have")
        for key in ("source", "target"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; expected at least one domain")
        names = [*self.source, *self.target, *self.other]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"domain {name!r} stands twice in source, target and other; keep one")
        for name in self.probes or ():
            if name not in (*self.source, *self.target):
                known = ", ".join((*self.source, *self.target))
                raise ConfigError(f"probe {name!r} is no domain of source or target; those are {known}")
        if not 0 <= self.preference <= 1:
            raise ConfigError(f"preference is {self.preference}; expected a number from 0 to 1")
        if not isinstance(self.base, (str, Path, Mapping, type(None))):
            raise ConfigError(f"base is {self.base!r}; expected a path, keys of the trainer or none")
        _check_train(self.train)
        if isinstance(self.base, Mapping):
            _check_train(self.base)
        _known(self.prior, ("policy", "options"))

    @property
    def probed(self) -> list[str]:
        """Domains whose held-out loss is feedback, in the order of source and target."""
        names = [*self.source, *self.target]
        return names if self.probes is None else [name for name in names if name in self.probes]

    @property
    def fields(self) -> dict[str, str | None]:
        """Domain to field, in the order of source, target and other."""
        by_field = (("source", self.source), ("target", self.target), (None, self.other))
        return {name: own for own, names in by_field for name in names}


@dataclass(frozen=True)
class Suite:
    """What is compared.

    scenarios, policies: by name. seeds: every policy runs with each, in each scenario.
    against: the policy that the others are compared with, seed by seed.
    points: how often on the way, at equal distances, a run is scored; the last time at its end.
    score_windows, feedback_windows: held-out windows a domain, of texts that have no document in common.
    feedback_every: steps between reports to a policy that is given feedback; None: forty a run.
    """

    scenarios: dict[str, Scenario]
    policies: dict[str, Entry]
    seeds: list[int]
    against: str
    points: int = 4
    score_windows: int = 32
    feedback_windows: int = 8
    feedback_every: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for key in ("points", "score_windows", "feedback_windows", "feedback_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} is {value}; expected 1 or more")
        for key in ("scenarios", "policies", "seeds"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; expected at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}; expected each once")
        if self.against not in self.policies:
            raise ConfigError(f"against is {self.against!r}; the policies are {', '.join(self.policies)}")
        for name, entry in self.policies.items():
            _within(f"policies.{name}", self._check_entry, name, entry)

    def preparation(self, name: str) -> Preparation | None:
        """How an entry is prepared, None if it is not."""
        prepare = self.policies[name].prepare
        return None if prepare is None else make_preparation(**prepare)

    def _check_entry(self, name: str, entry: Entry) -> None:
        policy, preparation = entry.policy or name, self.preparation(name)
        if preparation is None:
            make_policy(policy, **entry.options)
            return
        if preparation.policy is None:
            make_policy(policy, **{**entry.options, **preparation.placeholder})
        elif entry.policy is not None or entry.options:
            raise ConfigError(f"prepare {entry.prepare} decides the policy; leave out policy and options")
        if scored := sorted(set(preparation.seeds) & set(self.seeds)):
            raise ConfigError(f"seed {scored[0]} is scored, and prepare.seeds has it too; prepare with other seeds")

    @classmethod
    def load(cls, path: str | Path) -> Suite:
        """A suite from a YAML or JSON file; raises ConfigError, which says where in the file."""
        return cls.from_dict(read_yaml(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Suite:
        """A suite from plain values. The keys that scenarios share may stand at the top: see SHARED."""
        _known(values, [*(f.name for f in dataclasses.fields(cls)), *SHARED])
        for key in ("scenarios", "policies", "seeds", "against"):
            if key not in values:
                raise ConfigError(f"{key} is missing from the suite")
        for key in ("scenarios", "policies"):
            if not isinstance(values[key], Mapping):
                raise ConfigError(f"{key} is {values[key]!r}; expected `name: ...` pairs")
        shared = {key: values[key] for key in SHARED if key in values}
        scenarios = {
            str(name): _within(f"scenarios.{name}", _scenario, str(name), own, shared)
            for name, own in values["scenarios"].items()
        }
        policies = make_entries(values["policies"])
        rest = {key: value for key, value in values.items() if key not in SHARED}
        return cls(**{**rest, "scenarios": scenarios, "policies": policies})


SHARED = ("data", "roots", "source", "target", "other", "probes", "preference", "base", "prior", "train")
"""Keys of Scenario that may stand at the top of a suite; `train` of a scenario goes over it key by key."""


def _scenario(name: str, own: Any, shared: Mapping[str, Any]) -> Scenario:
    own = _known(own or {}, SHARED)
    values = {**shared, **own, "train": merge(shared.get("train") or {}, own.get("train") or {})}
    for key in ("data", "source", "target"):
        if key not in values:
            raise ConfigError(f"{key} is missing, here and at the top of the suite")
    return Scenario(name=name, **values)


def make_entries(values: Mapping[str, Any]) -> dict[str, Entry]:
    """The policies of a suite by name, from plain values; raises ConfigError, which says where in them."""
    return {str(name): _within(f"policies.{name}", _entry, own) for name, own in values.items()}


def _entry(own: Any) -> Entry:
    return Entry(**_known(own or {}, _names(Entry)))


def _check_train(values: Mapping[str, Any]) -> None:
    for key in sorted(OWN_KEYS & set(values)):
        raise ConfigError(f"train has {key}, which the comparison sets itself; leave it out")
    TrainConfig.from_dict({**values, "data": "data", "out": "out"})


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _known(values: Any, names: Any) -> dict[str, Any]:
    """`values` as a dict; raises ConfigError for a key that is not among `names`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{values!r} stands where `key: value` pairs were expected")
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0)
            raise ConfigError(f"unknown key {key}; the nearest known key is {near[0]}")
    return dict(values)


def _within(where: str, make: Callable[..., Made], *values: Any) -> Made:
    """make(*values); a ConfigError of it says where it was."""
    try:
        return make(*values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
