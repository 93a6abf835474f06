"""The folder of a collection: which split its episodes are of, and which of them are finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mixloader.agent.split import Split
from mixloader.compare.cell import RESULT
from mixloader.errors import StateError
from mixloader.files import replace


@dataclass(frozen=True)
class Collection:
    """The folder of a collection: its data, base models and episodes. Raises StateError for that of another split."""

    split: Split
    out: Path

    def begin(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        mark = self.out / "split.json"
        content = json.dumps({"name": self.split.name, "digest": self.split.digest}) + "\n"
        if mark.exists() and mark.read_text(encoding="utf-8") != content:
            raise StateError(
                f"{self.out} holds episodes of another split; choose another --out, or go on with the split they are of"
            )
        replace(mark, content)

    def folder(self, number: int) -> Path:
        return self.out / "episodes" / f"{number:04d}"

    def is_done(self, number: int) -> bool:
        return (self.folder(number) / RESULT).exists()

    def finished(self) -> list[int]:
        return [number for number in range(self.split.episodes) if self.is_done(number)]

    def played_again(self) -> list[Path]:
        """Finished runs of episodes of the split with other policies (validate.py), in order of their numbers.

        Those of later episodes are there to validate with, and not to learn from.
        """
        numbers = {}
        for path in sorted(self.out.glob(f"validation/*/{RESULT}")):
            number = json.loads((path.parent / "episode.json").read_text(encoding="utf-8"))["number"]
            if number < self.split.episodes:
                numbers[path.parent] = number
        return sorted(numbers, key=lambda folder: numbers[folder])
