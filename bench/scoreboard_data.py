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

from mixloader.agent.corpora import FoldData, open_fold
from mixloader.agent.split import Split
from mixloader.agent.topics import cut_into_topics
from mixloader.documents import Documents
from mixloader.domains import Domain
from mixloader.manifest import Manifest

OUT = Path("runs/scoreboard/data")
CELLS = 26
"""Topics of each field, in the scenario with the domain space of the paper (arXiv 2507.15640)."""

CLUSTERS = 34
PART = 8000  # characters of a document that are looked at together


def open_board(
    split: Split, name: str, source: Sequence[str], target: Sequence[str], vocab: int, corpora: Path
) -> FoldData:
    """Corpora that are a domain each, packed as a fold of their own."""
    own = Split(**{
        **asdict(split), "scoreboard": [], "pattern": [name], "shipped": name, "bases": {**split.bases, "folds": {}},
        "folds": {name: {"source": list(source), "target": list(target)}},
        "corpora": {corpus: {"topics": 1} for corpus in (*source, *target)},
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


def cut_cells(corpora: Path, names: Sequence[str], field: str, folder: Path) -> list[str]:
    """The corpora of a field as one, cut anew into CELLS topics: corpora FIELD-k of `folder`. Returns their names.

    Of CLUSTERS clusters those with the most text: some are of a few short documents.
    """
    cells = [f"{field}-{k}" for k in range(CELLS)]
    if (folder / f"{cells[-1]}.jsonl.gz").exists():
        return cells
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for name in names for text in Documents(next(corpora.glob(f"{name}.jsonl*")))]
    parts = [text[i : i + PART] for text in texts for i in range(0, len(text), PART)]
    topics = cut_into_topics(parts, CLUSTERS, seed=0)
    largest = sorted(topics, key=lambda topic: -sum(map(len, topic)))[:CELLS]
    for cell, topic in zip(cells, largest, strict=True):
        with gzip.open(folder / f"{cell}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as file:
            file.writelines(json.dumps({"text": part}) + "\n" for part in topic)
    return cells


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
    topics = OUT / "topics"
    general = cut_cells(corpora, code.source, "general", topics)
    save("cells", open_board(split, "cells", general, cut_cells(corpora, code.target, "code", topics), 2048, topics))
    save("maths", open_board(split, "reverse", maths.source, [*maths.target, *maths.other], 2048, corpora))
    for path in sorted(OUT.glob("*.json")):
        manifest = Manifest.open(path)
        tokens = sum(domain.tokens for domain in manifest.domains)
        print(f"{path}: {len(manifest.domains)} domains, {tokens / 1e6:.2f}M tokens")


if __name__ == "__main__":
    main()
