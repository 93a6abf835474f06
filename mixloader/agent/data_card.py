"""A collection's episodes as one file of trajectories, and the card that says what is in it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mixloader import files
from mixloader.agent.collection import Collection
from mixloader.agent.split import Corpus, Split
from mixloader.agent.trajectories import DIGITS, Trajectory, write_trajectories
from mixloader.config import ModelConfig
from mixloader.errors import StateError
from mixloader.train.model import build_model

CARD = "DATA.md"


def pack_collection(collection: Collection, path: Path) -> Path:
    """Write all finished episodes to `path`, those played again last, and DATA.md beside it, which is returned.

    Raises StateError if there are none, RecordError for a record that is damaged.
    """
    again = collection.played_again()
    folders = [*map(collection.folder, collection.finished()), *again]
    if not folders:
        raise StateError(f"{collection.out} has no finished episode to pack; run some with --corpora DIR")
    split = collection.split
    sizes = {name: _parameters(split, name) for name in split.architectures}
    trajectories = []
    for folder in folders:
        one = Trajectory.from_episode(folder)
        about = {"split": split.name, "split_digest": split.digest, "model_size": sizes[one.meta["architecture"]]}
        trajectories.append(replace(one, meta=one.meta | about))
    write_trajectories(path, trajectories)
    card = path.with_name(CARD)
    files.replace(card, data_card(split, trajectories, path, len(again)))
    return card


def _parameters(split: Split, architecture: str) -> int:
    entry = split.architectures[architecture]
    with torch.random.fork_rng(devices=[]):
        model = build_model(ModelConfig(**{**entry["model"], "vocab_size": entry["vocab"], "seq_len": split.seq_len}))
    return model.num_params()


def data_card(split: Split, trajectories: Sequence[Trajectory], path: Path, again: int = 0) -> str:
    """Markdown. again: how many of them are of episodes that were played again."""
    decisions, feedbacks = sum(map(len, trajectories)), sum(len(t.feedback_step) for t in trajectories)
    runs = [t.steps * t.tokens_per_step for t in trajectories]
    sizes = [t.meta["model_size"] for t in trajectories]
    base = split.bases["train"]["steps"] * split.bases["train"]["batch_size"] * split.seq_len
    folds = {t.meta["fold"] for t in trajectories}
    corpora = sorted({corpus for name in folds for corpus in split.folds[name].corpora})
    return f"""# The trajectories that the agent is trained on

Written by `python -m mixloader collect --pack {path.name}` from the runs themselves. Each trajectory is one continual
pre-training run of a small language model: all that its policy saw, what it answered, and what became of the losses
(docs/agent_data.md).

- {len(trajectories)} trajectories, {decisions:,} decisions, {feedbacks:,} feedbacks of each field
- {again} of them are of episodes that were played again with another policy
- {sum(runs) / 1e6:.1f}M tokens of training, bases not counted
- {path.stat().st_size / 1e6:.1f} MB: columns, {DIGITS} significant digits, Zstandard
- split `{split.name}`, digest `{split.digest}`; of the shipped agent: fold `{split.shipped}` alone
- decisions in which the policy failed: {sum(t.meta["policy_errors"] for t in trajectories)}

{_table("fold", trajectories, lambda t: t.meta["fold"])}
{_table("architecture", trajectories, lambda t: f"{t.meta['architecture']} ({t.meta['model_size']:,} parameters)")}
{_table("base", trajectories, lambda t: t.meta["base"])}
{_table("domains", trajectories, lambda t: _range(len(t.table), (2, 4, 8, 16)))}
{_table("behaviour", trajectories, lambda t: t.meta["behaviour"])}
Gain: how far preference * source + (1 - preference) * target has fallen, over all domains with a field, on text that no
policy was told of; nats a token, mean ± standard deviation. Episodes differ in far more than their behaviour, so these
means do not compare policies. Rewards (feedback, and the score text for domains that no probe covers) add up to
{_spread(float(t.rewards().sum()) for t in trajectories)} a run.

## Text

Losses of models trained on these corpora are what the set holds; it holds none of their text.

| corpus | licence |
|---|---|
{_lines(f"| {name} | {split.corpora.get(name, Corpus()).licence} |" for name in corpora)}

## Limits

- models of {min(sizes):,} to {max(sizes):,} parameters, on rows of {split.seq_len} tokens of English text and code
- runs of {min(runs):,} to {max(runs):,} tokens, from bases that have read {base:,}
- domains are clusters of a corpus's documents by their words, cut to similar sizes, or whole corpora
- feedback comes from the same windows of text throughout a run
"""


def _table(title: str, trajectories: Sequence[Trajectory], key: Callable[[Trajectory], str]) -> str:
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(key(trajectory), []).append(trajectory)
    rows = [
        f"| {name} | {len(group)} | {sum(map(len, group)):,} | {_spread([t.gain() for t in group])} |"
        for name, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return f"| {title} | trajectories | decisions | gain |\n|---|---|---|---|\n{_lines(rows)}\n"


def _range(value: int, bounds: Sequence[int]) -> str:
    least = 2
    for most in bounds:
        if value <= most:
            return f"{least}" if least == most else f"{least} to {most}"
        least = most + 1
    return f"over {bounds[-1]}"


def _spread(values: Iterable[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "not known"
    return f"{statistics.fmean(known):.2f} ± {statistics.pstdev(known):.2f}"


def _lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)
