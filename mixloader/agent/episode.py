"""Episodes: what each one trains and how, a pure function of the split and the episode's number.

An episode is a cell of a comparison: a continual pre-training run of a small model from a base, whose policy is the
behaviour that was drawn, and which is scored on text that no policy is told of.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.agent.behaviours import Behaviour, draw_behaviour
from mixloader.agent.corpora import WINDOWS, FoldData
from mixloader.agent.split import Fold, Ranges, Split
from mixloader.compare.cache import key_of, parameters_digest
from mixloader.compare.cell import Cell
from mixloader.config import TrainConfig
from mixloader.errors import ConfigError
from mixloader.files import replace
from mixloader.manifest import Manifest
from mixloader.policies import make_policy

POINTS = 4
"""How often a run is scored, after the time before its first step."""

_PAIRS = 1 / 6  # of episodes: one source and one target domain
_WHOLE_CORPORA = 0.25  # of the others: domains are corpora and not topics
_SMALL = 0.2  # of domains
_OTHERS = 0.5  # of episodes with over 3 domains: some have no field
_SCORE_TOKENS = {2: 8192, 6: 4096, 16: 2048}
"""Of each domain, in episodes of up to so many domains."""


@dataclass(frozen=True)
class EpisodeDomain:
    """topics: of the fold's. share: of their training text. probed: whether its held-out loss is feedback."""

    name: str
    topics: list[str]
    field: str | None
    share: float
    probed: bool


@dataclass(frozen=True)
class Episode:
    """What was drawn. prior: "natural", "half" or "uniform". schedule: keys of TrainConfig."""

    number: int
    fold: str
    architecture: str
    base: str
    domains: list[EpisodeDomain]
    preference: float
    prior: str
    schedule: dict[str, Any]
    behaviour: Behaviour

    @property
    def fields(self) -> dict[str, str | None]:
        return {domain.name: domain.field for domain in self.domains}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def draw_episode(split: Split, number: int) -> Episode:
    """Episode `number` of a split; raises ConfigError for one that it does not have."""
    if not 0 <= number < split.episodes:
        raise ConfigError(f"there is no episode {number}; the split has {split.episodes}, from 0")
    return _draw(split, number)


def draw_played(split: Split, number: int) -> Episode:
    """An episode that policies are to play, drawn like those of the split, with the prior "half".

    That is the prior of a comparison: a behaviour begins where it chooses, a policy that is judged where users do. Who
    runs it sets its own behaviour in place of the drawn one. The numbers from the split's end on are for validation;
    a number of the split's own is an episode to learn from, run once more.
    """
    return dataclasses.replace(_draw(split, number), prior="half")


def _draw(split: Split, number: int) -> Episode:
    rng = np.random.default_rng([split.seed, number])
    fold, ranges = split.fold_of(number), split.episode
    architecture = str(rng.choice(sorted(split.architectures)))
    base = str(rng.choice(split.bases["folds"][fold]))
    domains = _draw_domains(split, split.folds[fold], ranges, rng)
    preference = 0.5 if rng.random() < 0.5 else round(float(rng.uniform(*ranges.preference)), 3)
    prior = str(rng.choice(["natural", "half", "uniform"], p=[0.4, 0.35, 0.25]))
    schedule = _draw_schedule(split, ranges, rng) | {"seed": number}
    fields = {domain.name: domain.field for domain in domains}
    behaviour = draw_behaviour(split.seed, split.index_in_fold(number), fields, preference, schedule["steps"], rng)
    return Episode(number, fold, architecture, base, domains, preference, prior, schedule, behaviour)


def _draw_domains(split: Split, fold: Fold, ranges: Ranges, rng: np.random.Generator) -> list[EpisodeDomain]:
    least, most = ranges.domains
    if rng.random() < _PAIRS:
        return [
            _domain(f"{field}s", [t for corpus in _some(rng, corpora) for t in split.topics_of(corpus)], field, rng)
            for field, corpora in (("source", fold.source), ("target", fold.target))
        ]
    count = int(np.exp(rng.uniform(np.log(max(3, least)), np.log(most + 0.99))))
    targets = int(np.clip(round(count * rng.uniform(0.15, 0.5)), 1, count - 1))
    others = int(rng.integers(1, count // 4 + 1)) if count > 3 and rng.random() < _OTHERS else 0
    others = min(others, count - targets - 1)
    whole = rng.random() < _WHOLE_CORPORA

    def pool(corpora: list[str]) -> list[list[str]]:
        """The topics of each domain that there may be."""
        each = [split.topics_of(corpus) for corpus in corpora]
        return each if whole else [[topic] for topics in each for topic in topics]

    drawn: list[EpisodeDomain] = []
    unused = pool(fold.other)
    for field, corpora, wanted in (
        ("source", fold.source, count - targets - others),
        ("target", fold.target, targets),
    ):
        candidates = pool(corpora)
        order = [candidates[i] for i in rng.permutation(len(candidates))]
        chosen, left = order[:wanted], order[wanted:]
        drawn += [_domain(_name(topics), topics, field, rng) for topics in chosen]
        # A domain without a field may help nothing, or what another of its kind is probed for.
        unused += left[:2]
    order = [unused[i] for i in rng.permutation(len(unused))]
    drawn += [_domain(_name(topics), topics, None, rng) for topics in order[:others]]
    return _draw_probed(drawn, rng)


def _domain(name: str, topics: list[str], field: str | None, rng: np.random.Generator) -> EpisodeDomain:
    share = rng.uniform(0.02, 0.08) if rng.random() < _SMALL else rng.uniform(0.3, 1.0)
    return EpisodeDomain(name, topics, field, round(float(share), 3), probed=field is not None)


def _draw_probed(domains: list[EpisodeDomain], rng: np.random.Generator) -> list[EpisodeDomain]:
    """Probes cover all domains of a field in a third of the cases, else only some."""
    probed: set[str] = set()
    for field in ("source", "target"):
        names = [domain.name for domain in domains if domain.field == field]
        covered = len(names) if rng.random() < 1 / 3 else int(rng.integers(1, max(2, len(names))))
        probed |= {names[i] for i in rng.permutation(len(names))[:covered]}
    return [dataclasses.replace(domain, probed=domain.name in probed) for domain in domains]


def _name(topics: list[str]) -> str:
    return topics[0] if len(topics) == 1 else topics[0].rpartition("-")[0]


def _some(rng: np.random.Generator, items: list[str]) -> list[str]:
    count = int(rng.integers(1, len(items) + 1))
    return [items[i] for i in sorted(rng.permutation(len(items))[:count])]


def _draw_schedule(split: Split, ranges: Ranges, rng: np.random.Generator) -> dict[str, Any]:
    batch = int(rng.choice(ranges.batch_size))
    tokens = math.exp(rng.uniform(*np.log(ranges.tokens)))
    feedbacks = int(rng.integers(ranges.feedbacks[0], ranges.feedbacks[1] + 1))
    between = batch * split.seq_len * feedbacks
    eval_every = max(round(tokens / between), math.ceil(ranges.tokens[0] / between))
    steps = eval_every * feedbacks
    peak = float(f"{math.exp(rng.uniform(*np.log(ranges.learning_rate))):.3g}")
    least = float(rng.choice([0.0, 0.1, 1.0], p=[0.4, 0.4, 0.2]))
    wanted = int(rng.choice(ranges.decide_every))
    probe_every = max(1, round(steps / math.exp(rng.uniform(math.log(12), math.log(48)))))
    return {
        "steps": steps,
        "batch_size": batch,
        "seq_len": split.seq_len,
        "learning_rate": peak,
        "min_lr": float(f"{least * peak:.3g}"),
        "warmup_steps": int(rng.uniform(0, 0.1) * steps),
        # As many decisions as feedbacks at least, where batches are large.
        "decide_every": max((n for n in ranges.decide_every if n <= min(wanted, eval_every)), default=1),
        "eval_every": eval_every,
        "influence": {**ranges.influence, "probe_every": probe_every, "stride": max(1, round(steps / 128))},
    }


def base_folder(fold: str, architecture: str, kind: str, out: Path) -> Path:
    """Where the base model of that kind lies."""
    return out / "bases" / f"{fold}-{architecture}-{kind}"


def base_cell(split: Split, fold: str, architecture: str, kind: str, data: FoldData, out: Path) -> Cell:
    """The run that makes a base model: on the source topics of a fold, and a part of its target."""
    seed = [split.seed, *(f"{fold} {architecture} {kind}".encode())]
    rng = np.random.default_rng(seed)
    sources = [t for corpus in split.folds[fold].source for t in split.topics_of(corpus)]
    targets = [t for corpus in split.folds[fold].target for t in split.topics_of(corpus)]
    share = float(split.bases.get("target_share", {}).get(kind, 0.0))
    tokens = np.array([data.training.domain(name).tokens for name in (*sources, *targets)], dtype=np.float64)
    weights = tokens / tokens.sum() if kind == "natural" else rng.dirichlet(np.full(len(tokens), 0.7))
    of_target = np.arange(len(tokens)) >= len(sources)
    for part, mask in ((1 - share, ~of_target), (share, of_target)):
        weights[mask] *= part / weights[mask].sum()
    folder = base_folder(fold, architecture, kind, out)
    read = {n: round(float(w), 6) for n, w in zip((*sources, *targets), weights, strict=True) if w > 0}
    names = list(read)
    config = _config(split, architecture, folder, split.bases["train"]) | {
        "policy": "fixed",
        "policy_options": {"weights": read},
        "eval_windows": WINDOWS,
    }
    training = dataclasses.replace(data.training, domains=tuple(map(data.training.domain, names)))
    scored = dataclasses.replace(data.scored, domains=tuple(map(data.scored.domain, names)))
    return _cell(f"base {folder.name}", config, training, scored, folder, WINDOWS, None)


def episode_cell(split: Split, episode: Episode, data: FoldData, base: Cell, folder: Path) -> Cell:
    """The run of an episode. `folder` gets the manifests, and what was drawn as episode.json."""
    training, scored, windows = _manifests(split, episode, data)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "episode.json", json.dumps(episode.to_json(), indent=1) + "\n")
    config = _episode_config(split, episode, training, base, folder)
    return _cell(f"episode {episode.number}", config, training, scored, folder, windows, base)


def episode_key(split: Split, episode: Episode, data: FoldData, base: Cell) -> str:
    """Names all that the result of an episode depends on, as in a comparison (cache.py): also the source of its
    behaviour, the content of files that its options name, and the parameters of the base, which have to be there."""
    training, scored, windows = _manifests(split, episode, data)
    config = TrainConfig.from_dict(_episode_config(split, episode, training, base, Path("out")))
    return key_of(config, training, scored, parameters_digest(base.out), windows=windows, points=POINTS)


def _episode_config(split: Split, episode: Episode, training: Manifest, base: Cell, folder: Path) -> dict[str, Any]:
    prior = _prior(training, episode)
    return _config(split, episode.architecture, folder, episode.schedule) | {
        "policy": episode.behaviour.policy,
        "policy_options": episode.behaviour.options,
        "weights": {name: round(float(weight), 6) for name, weight in prior.items()},
        "feedback": True,
        "eval_windows": 64,  # more than there are: the shards were chosen for their number
        "init_from": str(base.out),
        "record_detail": True,
    }


def _manifests(split: Split, episode: Episode, data: FoldData) -> tuple[Manifest, Manifest, int]:
    """What is trained with, what is scored, and the windows of a domain that are."""
    windows = split.episode.feedback_tokens // split.seq_len
    score = next(n for most, n in _SCORE_TOKENS.items() if len(episode.domains) <= most) // split.seq_len
    pairs = []
    for domain in episode.domains:
        sharing = sum(other.probed and other.field == domain.field for other in episode.domains)
        told = round(windows / sharing) if domain.probed else 0
        pairs.append(data.domain(domain.name, domain.topics, domain.field, domain.share, feedback=told, score=score))
    training = dataclasses.replace(data.training, domains=tuple(pair[0] for pair in pairs))
    scored = dataclasses.replace(data.scored, domains=tuple(pair[1] for pair in pairs))
    return training, scored, score


def _prior(training: Manifest, episode: Episode) -> Mapping[str, float]:
    """The mixture that a run begins with, if its policy has none of its own; nothing is left out of it."""
    table = training.table()
    weights = make_policy("uniform" if episode.prior == "uniform" else "natural").reset(table)
    assert weights is not None
    if episode.prior == "half":
        halves = make_policy("fields", source=0.5).reset(table)
        assert halves is not None
        others = np.array([field is None for field in table.fields])
        weights = np.where(others, weights, halves * (1 - weights[others].sum()))
    return dict(zip(table.names, weights / weights.sum(), strict=True))


def _config(split: Split, architecture: str, folder: Path, train: Mapping[str, Any]) -> dict[str, Any]:
    model = split.architectures[architecture]["model"]
    return {**train, "data": str(folder / "training.json"), "out": str(folder), "model": model, "device": "cpu",
            "threads": 1, "seq_len": split.seq_len}  # fmt: skip


def _cell(
    title: str,
    values: dict[str, Any],
    training: Manifest,
    scored: Manifest,
    folder: Path,
    windows: int,
    base: Cell | None,
) -> Cell:
    """Write the manifests of a run, and say how it is run."""
    folder.mkdir(parents=True, exist_ok=True)
    training.save(folder / "training.json")
    scored.save(folder / "scored.json")
    config = TrainConfig.from_dict(values)
    every = max(1, -(-config.steps // POINTS))
    config = dataclasses.replace(
        config,
        roots=training.roots_outside(folder / "training.json"),
        checkpoint_every=every,
        keep_checkpoints=POINTS + 2,
        log_every=every,
    )
    return Cell(
        key=folder.name,
        title=title,
        config=config.to_dict(),
        score=str(folder / "scored.json"),
        score_roots=scored.roots_outside(folder / "scored.json"),
        score_windows=windows,
        base=base,
        keep=base is None,
    )
