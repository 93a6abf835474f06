"""`python -m mixloader.agent.validate`: policies in episodes that nothing was learned from, to choose among agents.

Validation episodes are drawn like those of the split, from the numbers after its last, with the prior "half" as in a
comparison. So a choice among agents is made on the corpora of a fold, and never on the scoreboard. With --first,
episodes of the split are played again: these are runs to learn from, which `collect --pack` packs with the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.agent.behaviours import Behaviour
from mixloader.agent.collect import Bases, Progress, run_job
from mixloader.agent.collection import Collection
from mixloader.agent.episode import Episode, base_folder, draw_played, episode_cell, episode_key
from mixloader.agent.split import SHIPPED, Split
from mixloader.agent.trajectory import Trajectory
from mixloader.compare.cell import RESULT, Cell, is_startable
from mixloader.compare.suite import Entry, make_entries
from mixloader.compare.table import markdown
from mixloader.config import read_yaml
from mixloader.errors import ConfigError
from mixloader.files import replace, sole_user
from mixloader.policies import make_policy
from mixloader.policies.base import signals_of
from mixloader.workers import Engine, make_workers


@dataclass(frozen=True)
class Played:
    """What came of a policy in an episode, whose run lies in `folder`.

    fall: by how much preference * source + (1 - preference) * target fell on the score text, each the mean over all
    domains of the field, nats a token.
    source_read: the share of tokens that were of the source field. source_change, target_change: of the mean loss on
    the score text, nats a token; below zero is better. policy_errors: decisions that the policy failed to make.
    """

    folder: str
    number: int
    fall: float
    source_read: float
    source_change: float
    target_change: float
    policy_errors: int

    @classmethod
    def read(cls, folder: Path) -> Played:
        """From the folder of an episode that has ended."""
        trajectory = Trajectory.from_episode(folder)
        fields = np.array(trajectory.table.fields, dtype=object)
        read = json.loads((folder / RESULT).read_text(encoding="utf-8"))["read"]
        tokens = np.array([read[name] for name in trajectory.table.names], dtype=np.float64)
        change = trajectory.held_out[-1] - trajectory.held_out[0]
        return cls(
            folder=str(folder),
            number=trajectory.meta["number"],
            fall=trajectory.gain(),
            source_read=float(tokens[fields == "source"].sum() / tokens.sum()),
            source_change=float(change[fields == "source"].mean()),
            target_change=float(change[fields == "target"].mean()),
            policy_errors=trajectory.meta["policy_errors"],
        )


def read_policies(path: Path) -> dict[str, Entry]:
    """The policies of a YAML file, in the form of those of a comparison's suite; raises ConfigError for others, and for
    entries that say more than policy and options."""
    entries = make_entries(read_yaml(path))
    if not entries:
        raise ConfigError(f"{path} names no policy; expected `name: {{policy: ..., options: ...}}` pairs")
    for name, entry in entries.items():
        for key in ("prepare", "train", "feedback"):
            if getattr(entry, key) not in (None, {}):
                raise ConfigError(f"policies.{name} has {key}; validation takes policy and options alone, leave it out")
        make_policy(entry.policy or name, **entry.options)
    return entries


def validation_numbers(split: Split, fold: str, count: int, first: int | None = None) -> list[int]:
    """The first `count` episodes of a fold from number `first` on, by default after those of the split."""
    first = split.episodes if first is None else first
    if fold not in split.pattern:
        raise ConfigError(f"no episode is of fold {fold!r}; expected one of {', '.join(sorted(set(split.pattern)))}")
    if count < 1:
        raise ConfigError(f"{count} episodes are asked for; expected 1 or more")
    after = range(first, first + len(split.pattern) * (count + 1))
    return [number for number in after if split.fold_of(number) == fold][:count]


def validate(
    split: Split,
    corpora: Path,
    out: Path,
    policies: Mapping[str, Entry],
    numbers: Sequence[int],
    *,
    workers: int = 1,
    engine: Engine = "local",
    show: bool = True,
) -> tuple[dict[str, list[Played]], list[str]]:
    """Play each policy in each of the episodes, as far as `out` has not what comes of it. Returns that, by policy, and
    what failed, a sentence each.

    `out` is the folder of a collection, whose text and base models are used, and made as far as they are missing. Runs
    lie in out/validation, each in a folder that is named by all it depends on; killed at any moment, the same call goes
    on. Raises a MixLoaderError as `collect` does. show: a line an episode.
    """
    Collection(split, out).begin()
    drawn = [draw_played(split, number) for number in numbers]
    # A collection that is under way may go on, unless it makes what is missing here.
    lacking = any(not (base_folder(e.fold, e.architecture, e.base, out) / RESULT).exists() for e in drawn)
    with make_workers(run_job, workers, engine) as pool:
        with sole_user(out, "collection") if lacking else nullcontext():
            bases = Bases(split, drawn, corpora, out, show)
            failed = bases.train(pool)
        folders = _folders([e for e in drawn if is_startable(bases.of(e))], policies, bases, out)
        # Episode by episode, so that what is there of a validation that was stopped can be compared.
        asked = {
            folder: episode for of_episode in zip(*folders.values(), strict=True) for folder, episode in of_episode
        }
        cells = [_cell(folder, e, bases) for folder, e in asked.items() if not (folder / RESULT).exists()]
        failed += Progress("episodes", show, len(asked) - len(cells)).watch(cells, pool.run(cells))
    played = {
        name: [Played.read(folder) for folder, _ in own if (folder / RESULT).exists()] for name, own in folders.items()
    }
    return played, failed


def _folders(
    episodes: Sequence[Episode], policies: Mapping[str, Entry], bases: Bases, out: Path
) -> dict[str, list[tuple[Path, Episode]]]:
    """Of each policy, where its runs lie and what they are, an episode after the other."""
    folders: dict[str, list[tuple[Path, Episode]]] = {name: [] for name in policies}
    for episode in episodes:
        for name, entry in policies.items():
            own = _with_policy(episode, name, entry)
            key = episode_key(bases.split, own, bases.data_of(own), bases.of(own))
            folders[name].append((out / "validation" / key, own))
    return folders


def _with_policy(episode: Episode, name: str, entry: Entry) -> Episode:
    """The episode with the behaviour of an entry. Influence is measured if the policy has a use for it."""
    policy = entry.policy or name
    options = entry.options_for(policy, episode.preference, {})
    schedule = dict(episode.schedule)
    if "influence" not in signals_of(make_policy(policy, **options)):
        del schedule["influence"]
    return dataclasses.replace(episode, schedule=schedule, behaviour=Behaviour(name, policy, options))


def _cell(folder: Path, episode: Episode, bases: Bases) -> Cell:
    cell = episode_cell(bases.split, episode, bases.data_of(episode), bases.of(episode), folder)
    return dataclasses.replace(cell, title=f"{cell.title} with {episode.behaviour.label}")


def summary(played: Mapping[str, Sequence[Played]]) -> dict[str, dict[str, Any]]:
    """Of each policy: means over its episodes, and its differences from the first policy in those that both have.

    difference: {"mean", "error" (the mean's standard error), "worst", "worst_number"}, of `fall`, above zero where the
    policy is better; empty for the first policy.
    """
    first = next(iter(played.values()))
    result = {}
    for name, own in played.items():
        means = {
            key: float(np.mean([getattr(one, key) for one in own])) if own else math.nan
            for key in ("fall", "source_read", "source_change", "target_change")
        }
        result[name] = {
            "episodes": len(own),
            **means,
            "policy_errors": sum(one.policy_errors for one in own),
            "difference": {} if own is first else _difference(own, first),
        }
    return result


def _difference(own: Sequence[Played], first: Sequence[Played]) -> dict[str, float]:
    theirs = {one.number: one.fall for one in first}
    by_number = {one.number: one.fall - theirs[one.number] for one in own if one.number in theirs}
    if not by_number:
        return {}
    values = np.array(list(by_number.values()))
    worst = min(by_number, key=lambda number: by_number[number])
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "error": error, "worst": by_number[worst], "worst_number": worst}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a row a policy, and what its columns mean."""
    first = next(iter(summaries))
    rows = [
        ["policy", "episodes", "fall", f"minus {first}", "worst (episode)", "source read", "source change",
         "target change"]
    ]  # fmt: skip
    for name, own in summaries.items():
        if not own["episodes"]:
            rows.append([name, "0", *[""] * (len(rows[0]) - 2)])
            continue
        worst = own["difference"]
        rows.append(
            [name + (f" ‡{own['policy_errors']}" if own["policy_errors"] else ""), str(own["episodes"]),
             f"{own['fall']:.4f}", _with_error(worst),
             f"{worst['worst']:+.4f} ({worst['worst_number']})" if worst else "",
             f"{own['source_read']:.0%}", f"{own['source_change']:+.4f}", f"{own['target_change']:+.4f}"]
        )  # fmt: skip
    return (
        f"{markdown(rows)}\n\nFall of preference * source + (1 - preference) * target on the score text, nats a token, "
        "more is better; fields are means over all their domains, probed or not. ± standard error of the mean of "
        "paired differences. Changes are of the loss: below zero is better. Every run begins at the prior "
        '"half", as on the scoreboard. ‡ decisions that failed.'
    )


def _with_error(difference: Mapping[str, float]) -> str:
    return f"{difference['mean']:+.4f} ± {difference['error']:.4f}" if difference else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Play policies in validation episodes and compare them with the first. Stopped, the same command goes on."""
    parser = argparse.ArgumentParser(prog="python -m mixloader.agent.validate", description=main.__doc__)
    parser.add_argument("split", nargs="?", type=Path, default=SHIPPED, help="a YAML file; by default the shipped one")
    parser.add_argument("--policies", type=Path, required=True, help="YAML: {name: {policy: NAME, options: {...}}}")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of NAME.jsonl or NAME.jsonl.gz, as collect")
    parser.add_argument("--out", type=Path, default=Path("runs/collect"), help="folder of the collection")
    parser.add_argument("--episodes", type=int, default=24, metavar="N", help="how many (default 24)")
    parser.add_argument(
        "--first", type=int, metavar="N", help="number of the first episode; by default that after the split's last"
    )
    parser.add_argument("--fold", help="by default that of the shipped agent")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"runs at a time, one core each (default {cores})")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="processes here, or Ray")
    args = parser.parse_args(argv)
    split, policies = Split.load(args.split), read_policies(args.policies)
    fold = args.fold or split.shipped
    numbers = validation_numbers(split, fold, args.episodes, args.first)
    with sole_user(args.out / "validation", "validation"):
        played, failed = validate(
            split, args.corpora, args.out, policies, numbers, workers=args.workers, engine=args.engine
        )
        summaries = summary(played)
        for name, own in played.items():
            summaries[name]["played"] = [{k: v for k, v in asdict(one).items() if k != "folder"} for one in own]
        content = {"split": split.digest, "fold": fold, "numbers": numbers, "policies": summaries}
        path = args.out / "validation" / "table.json"
        replace(path, json.dumps(content, indent=1) + "\n")
    print(f"{table(summaries)}\n\ntable {path}")
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
