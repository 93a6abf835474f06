"""The data of the scoreboard (bench/scoreboard.yaml): corpora that the shipped agent has not seen, cut and packed.

    python -m bench.scoreboard_data --corpora DIR

DIR holds NAME.jsonl or NAME.jsonl.gz for the corpora of the split's fold "code", those kept for the scoreboard, and,
for the agent that was trained on code, those of fold "maths". Data that are there are not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mixloader.agent.corpora import FoldData, open_fold
from mixloader.agent.split import Split
from mixloader.documents import Documents
from mixloader.domains import Domain
from mixloader.manifest import Manifest

OUT = Path("runs/scoreboard/data")
CELLS = 26
"""Topics of each field, in the scenario with the domain space of the paper (arXiv 2507.15640)."""


def open_board(
    split: Split,
    name: str,
    source: Sequence[str],
    target: Sequence[str],
    vocab: int,
    corpora: Path,
    topics: int = 1,
    **other: Any,
) -> FoldData:
    """Corpora that are cut into so many topics each, packed as a fold of their own. other: keys of the split."""
    own = Split(**{
        **asdict(split), **other,
        "scoreboard": [], "pattern": [name], "shipped": name, "bases": {**split.bases, "folds": {}},
        "folds": {name: {"source": list(source), "target": list(target)}},
        "corpora": {corpus: {"topics": topics} for corpus in (*source, *target)},
    })  # fmt: skip
    return open_fold(own, name, vocab, corpora, OUT / "packed")


def save(name: str, data: FoldData, domains: dict[str, list[str]] | None = None) -> None:
    """A manifest OUT/NAME.json with all held-out text, which the comparison deals out.

    domains: topics by domain; by default a domain a topic, and of the corpus's name if it is the only one.
    """
    topics = data.training.names
    alone = {name: name.removesuffix("-0") for name in topics if name.removesuffix("-0") + "-1" not in topics}
    names = {alone.get(topic, topic): [topic] for topic in topics} if domains is None else domains
    found = tuple(_domain(data, name, topics) for name, topics in names.items())
    replace(data.training, domains=found).save(OUT / f"{name}.json")


def _domain(data: FoldData, name: str, topics: list[str]) -> Domain:
    told, kept = data.domain(name, topics, None, 1.0, feedback=10**6, score=10**6)
    return replace(told, name=name, validation=(*told.validation, *kept.validation))


def merged(corpora: Path, names: Sequence[str], path: Path) -> None:
    """One corpus of several, a document of each in turn."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    readers = [iter(Documents(next(corpora.glob(f"{name}.jsonl*")))) for name in names]
    part = path.with_suffix(".part")
    with gzip.open(part, "wt", encoding="utf-8", compresslevel=1) as file:
        while readers:
            for reader in list(readers):
                document = next(reader, None)
                if document is None:
                    readers.remove(reader)
                else:
                    file.write(json.dumps({"text": document}) + "\n")
    part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scoreboard_data", description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True, help="folder of NAME.jsonl or NAME.jsonl.gz")
    corpora = parser.parse_args().corpora
    split = Split.load()
    OUT.mkdir(parents=True, exist_ok=True)
    code, maths, kept = split.folds["code"], split.folds["maths"], split.scoreboard
    small = open_board(split, "board", code.source, [*code.target, *kept], 2048, corpora)
    save("board", small)
    save(
        "two", small, {"source": [f"{name}-0" for name in code.source], "target": [f"{name}-0" for name in code.target]}
    )
    save("vocabulary", open_board(split, "board", code.source, code.target, 4096, corpora))
    save("topics", open_fold(split, "code", 2048, corpora, OUT / "packed"))
    merged(corpora, code.source, OUT / "merged" / "general.jsonl.gz")
    merged(corpora, code.target, OUT / "merged" / "code.jsonl.gz")
    merges = OUT / "merged"
    save("cells", open_board(split, "cells", ["general"], ["code"], 2048, merges, CELLS, text_bytes=12_000_000))
    save("maths", open_board(split, "reverse", maths.source, [*maths.target, *maths.other], 2048, corpora))
    for path in sorted(OUT.glob("*.json")):
        manifest = Manifest.open(path)
        tokens = sum(domain.tokens for domain in manifest.domains)
        print(f"{path}: {len(manifest.domains)} domains, {tokens / 1e6:.2f}M tokens")


if __name__ == "__main__":
    main()
