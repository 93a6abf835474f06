"""What a run is watched with: JSON lines, TensorBoard, Weights & Biases; and what is told of each decision of a Mixer.

    with MixtureTracker(mixer, [TensorBoard("runs/1"), JsonLines("runs/1/mixture.jsonl")]) as tracker:
        for batch in tracker.timed(loader):
            ...
            mixer.step()
            tracker.log(loader.step, {"train/loss": loss})  # whatever else the user wants to see

The record (docs/record.md) is what a run is replayed from; this is for looking at it. docs/trackers.md has the names.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mixloader.decision import Decision
from mixloader.errors import ConfigError
from mixloader.files import replace
from mixloader.mixture import as_fractions

if TYPE_CHECKING:
    from mixloader.mixer import Mixer


class Tracker(Protocol):
    """Where numbers of a run go. Nothing is opened before the first log(), so that other ranks open nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, at a plan step that is not below those before, save where a run is resumed."""

    def close(self) -> None: ...


class JsonLines:
    """A JSON object a call, {"step": ..., name: number, ...}, appended to `path`.

    A resumed run goes on with the file: the lines of the steps that it logs again are dropped.
    """

    def __init__(self, path: str | Path):
        self.path, self._begun = Path(path), False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._begun:
            self._begin(step)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, separators=(",", ":"), allow_nan=False) + "\n")

    def close(self) -> None:
        pass

    def _begin(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A kill may leave the last line without its end.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
            replace(self.path, "".join(kept))
        self._begun = True


class TensorBoard:
    """Event files in `folder`, through torch.utils.tensorboard, which needs the package tensorboard.

    What an earlier process of a resumed run wrote for steps that are logged again is hidden by TensorBoard.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        _require("tensorboard", "TensorBoard")
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases. options: of wandb.init: project, name, dir, mode="offline", id and resume, ...

    It takes no numbers of steps that are over: those that a resumed run logs again stay as they were.
    """

    def __init__(self, **options: Any):
        self.options = options
        _require("wandb", "Weights & Biases")
        self._run: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is None:
            import wandb

            self._run = wandb.init(**self.options)
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def open_trackers(names: Sequence[str], folder: Path) -> list[Tracker]:
    """Trackers by name, "jsonl", "tensorboard" or "wandb", that write to `folder`.

    What else Weights & Biases wants to know it takes from its environment (WANDB_PROJECT, WANDB_MODE, ...).
    """
    made: list[Tracker] = []
    for name in names:
        if name == "jsonl":
            made.append(JsonLines(folder / "mixture.jsonl"))
        elif name == "tensorboard":
            made.append(TensorBoard(folder / "tensorboard"))
        elif name == "wandb":
            made.append(WandB(name=folder.name, dir=str(folder)))
        else:
            raise ConfigError(f"trackers has {name!r}; expected 'jsonl', 'tensorboard' or 'wandb'")
    return made


class MixtureTracker:
    """Tells trackers of every decision of a Mixer as it takes effect, on rank 0; on other ranks it does nothing.

    It stands at the plan step from which the decision holds: the weights from there on, the losses that it was decided
    by, tokens and epochs read before. A tracker that fails costs a warning and is told nothing more. It takes the
    place of `mixer.on_decision`. Close it after the mixer, which tells of its last decisions when it closes.
    """

    def __init__(self, mixer: Mixer, trackers: Iterable[Tracker]):
        self.mixer, self.loader = mixer, mixer.loader
        self._trackers = list(trackers) if self.loader.rank == 0 else []
        self._waited, self._batches, self._since = 0.0, 0, time.perf_counter()
        mixer.on_decision = self.decision

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of the user's own, by name. Those that are not finite, which no tracker shows, are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in tuple(self._trackers) if finite else ():
            try:
                tracker.log(step, finite)
            except Exception as error:
                self._trackers.remove(tracker)
                warnings.warn(
                    f"{type(tracker).__name__} failed at plan step {step} and is told nothing more: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def decision(self, decision: Decision, units: Sequence[int]) -> None:
        """What Mixer calls: the decision, and the integer weights that hold from `decision.effect` on."""
        if not self._trackers:
            return
        weights, values = as_fractions(np.asarray(units)), dict[str, float]()
        for d, (name, account) in enumerate(self.loader.accounts().items()):
            values[f"mix/weight/{name}"] = float(weights[d])
            values[f"mix/loss/{name}"] = float(decision.loss[d])
            values[f"mix/tokens/{name}"] = account.tokens
            values[f"mix/epochs/{name}"] = account.epochs
        values |= {f"mix/feedback/{name}": value for name, value in decision.feedback.items()}
        if decision.influence is not None and self.mixer.influence is not None:
            for name, row in zip(self.loader.names, decision.influence, strict=True):
                for field, value in zip(self.mixer.influence.fields, row, strict=True):
                    values[f"mix/influence/{field}/{name}"] = math.nan if value is None else value
        values["mix/policy_ms"] = self.mixer.policy_seconds * 1e3
        self.log(decision.effect, values | self._of_the_loader())

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, while the time that each is waited for is taken: for `loader/wait_ms` and `loader/tok_per_s`."""
        source = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            self._batches += 1
            yield batch

    def _of_the_loader(self) -> dict[str, float]:
        """Since the last decision: milliseconds waited for a batch, tokens a second on all ranks."""
        now, loader = time.perf_counter(), self.loader
        values = {"loader/queue_depth": float(loader.queue_depth)}
        if self._batches:
            tokens = self._batches * loader.batch_size * loader.seq_len * loader.world_size
            values["loader/wait_ms"] = self._waited / self._batches * 1e3
            values["loader/tok_per_s"] = tokens / (now - self._since)
        self._waited, self._batches, self._since = 0.0, 0, now
        return values

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> MixtureTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require(package: str, what: str) -> None:
    """Told before a run begins, not at its first step."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs the package {package}; pip install 'mixloader[track]'")
