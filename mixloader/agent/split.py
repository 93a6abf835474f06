"""The split: which corpora, models and ranges the episodes of the agent's training are drawn from, and which never."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixloader.config import ModelConfig, TrainConfig, check_types, read_yaml
from mixloader.errors import ConfigError

SHIPPED = Path(__file__).with_name("split.yaml")
"""The split that the shipped agent was trained with."""


@dataclass(frozen=True)
class Fold:
    """Corpora of one kind of episode: to keep, to learn, and others that may be read and that no score counts."""

    source: list[str]
    target: list[str]
    other: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.source or not self.target:
            raise ConfigError("a fold has no source or no target corpus; expected at least one of each")

    @property
    def corpora(self) -> list[str]:
        return [*self.source, *self.target, *self.other]


@dataclass(frozen=True)
class Corpus:
    """How a corpus is cut. topics: clusters of its documents; None takes the split's. licence: for the data card."""

    topics: int | None = None
    licence: str = "not stated"

    def __post_init__(self) -> None:
        check_types(self)
        if self.topics is not None and self.topics < 1:
            raise ConfigError(f"a corpus has {self.topics} topics; expected at least 1")


@dataclass(frozen=True)
class Ranges:
    """What is drawn for an episode: [least, most], or a list of which one is taken.

    tokens, learning_rate and domains are drawn evenly in the logarithm. feedbacks: how many evaluations;
    feedback_tokens: of each field in each. preference: where it is not 0.5. influence: options of Influence.
    """

    domains: tuple[int, int] = (2, 16)
    tokens: tuple[int, int] = (200_000, 400_000)
    batch_size: list[int] = field(default_factory=lambda: [8, 16, 32])
    learning_rate: tuple[float, float] = (3e-4, 3e-3)
    decide_every: list[int] = field(default_factory=lambda: [1, 2, 4])
    feedbacks: tuple[int, int] = (40, 80)
    feedback_tokens: int = 4096
    preference: tuple[float, float] = (0.1, 0.9)
    influence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        for key in ("domains", "tokens", "learning_rate", "feedbacks", "preference"):
            least, most = getattr(self, key)
            if not 0 < least <= most:
                raise ConfigError(f"episode.{key} is {[least, most]}; expected [least, most], above 0")
        if self.domains[0] < 2:
            raise ConfigError(f"episode.domains is {list(self.domains)}; an episode has at least 2")


@dataclass(frozen=True)
class Split:
    """See split.yaml, which says what each key means. Raises ConfigError for what does not fit together."""

    name: str
    seed: int
    episodes: int
    pattern: list[str]
    folds: dict[str, Any]
    architectures: dict[str, Any]
    bases: dict[str, Any]
    episode: Any
    shipped: str
    scoreboard: list[str] = field(default_factory=list)
    corpora: dict[str, Any] = field(default_factory=dict)
    text_bytes: int = 2_400_000
    topics: int = 3
    held_out: float = 0.12
    seq_len: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        _set(self, "folds", {name: Fold(**values) for name, values in self.folds.items()})
        _set(self, "corpora", {name: Corpus(**values) for name, values in self.corpora.items()})
        _set(self, "episode", Ranges(**self.episode))
        for name in [*self.pattern, self.shipped, *self.bases["folds"]]:
            if name not in self.folds:
                raise ConfigError(f"the split names a fold {name!r}; its folds are {', '.join(self.folds)}")
        for entry in self.architectures.values():
            ModelConfig(**entry["model"])
        TrainConfig(data="data", out="out", **self.bases["train"])
        taken: dict[str, str] = dict.fromkeys(self.scoreboard, "the scoreboard")
        for name, fold in self.folds.items():
            for corpus in fold.corpora:
                if corpus in taken:
                    raise ConfigError(
                        f"corpus {corpus!r} is of fold {name!r} and of {taken[corpus]}; keep it in one of them"
                    )
                taken[corpus] = f"fold {name!r}"

    @classmethod
    def load(cls, path: str | Path = SHIPPED) -> Split:
        """Read a YAML file; raises ConfigError for what is missing, unknown or out of range."""
        try:
            return cls(**read_yaml(path))
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{path} is no split: {error}") from error

    @property
    def digest(self) -> str:
        """Of all that decides what an episode is."""
        content = {**vars(self), "folds": {n: vars(f) for n, f in self.folds.items()}, "episode": vars(self.episode)}
        content["corpora"] = {name: corpus.topics for name, corpus in self.corpora.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def fold_of(self, number: int) -> str:
        return self.pattern[number % len(self.pattern)]

    def index_in_fold(self, number: int) -> int:
        """How many episodes before this one are of its fold."""
        fold, cycle = self.fold_of(number), len(self.pattern)
        return number // cycle * self.pattern.count(fold) + self.pattern[: number % cycle].count(fold)

    def topics_of(self, corpus: str) -> list[str]:
        """The names of a corpus's topics."""
        count = self.corpora.get(corpus, Corpus()).topics or self.topics
        return [f"{corpus}-{k}" for k in range(count)]

    def check_scoreboard(self, domains: Mapping[str, list[str]]) -> None:
        """Raise ConfigError if a scenario of a scoreboard, by name, names a corpus or topic that the agent has seen."""
        seen = set(self.folds[self.shipped].corpora)
        for scenario, names in domains.items():
            for name in names:
                if name in seen or name.rpartition("-")[0] in seen:
                    raise ConfigError(f"scenario {scenario!r} has domain {name!r}, which the agent was trained on")


def _set(split: Split, key: str, value: Any) -> None:
    object.__setattr__(split, key, value)
