"""One function over many jobs, each worker a process with one torch thread, here or on a Ray cluster.

A job that raises, and a process that dies of its job, end that job alone: the others go on. Processes here
die with the one that started them, so what was killed leaves nobody behind who writes into its folders.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol, TypeVar

from mixloader.errors import ConfigError, MixLoaderError

Job = TypeVar("Job")
Contra = TypeVar("Contra", contravariant=True)
Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Outcome:
    """What became of jobs[index]: the function's value, or in `error` a sentence that says why there is none."""

    index: int
    value: Any = None
    error: str | None = None


class Workers(Protocol[Contra]):
    """So many workers that apply one function to jobs; a context manager, which ends them.

    function, jobs and values are pickled on their way to and from the workers.
    """

    def run(self, jobs: Sequence[Contra]) -> Iterator[Outcome]:
        """Outcomes in the order in which they end; jobs begin in their order."""

    def __enter__(self) -> Workers[Contra]: ...

    def __exit__(self, *exception: object) -> None: ...


def make_workers(function: Callable[[Job], Any], count: int, engine: Engine = "local") -> Workers[Job]:
    """Workers of an engine: processes here, or on Ray. Raises ConfigError for "ray" where ray is not installed."""
    if engine not in _ENGINES:
        raise ConfigError(f"engine is {engine!r}; expected one of {', '.join(map(repr, _ENGINES))}")
    if count < 1:
        raise ConfigError(f"workers is {count}; expected 1 or more")
    return _ENGINES[engine](function, count)


def attempt(function: Callable[[Job], Any], index: int, job: Job) -> Outcome:
    """Run one job; an error that is not one of ours is a bug and shows its traceback."""
    try:
        return Outcome(index, function(job))
    except MixLoaderError as error:
        return Outcome(index, error=str(error))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Outcome(index, error=f"{type(error).__name__}: {error}")


def die_with_parent() -> None:
    """End this process, from a thread, when the process that started it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@dataclass
class _Process:
    """A process, our end of the pipe to it, and the number of the job it is at."""

    process: Any
    pipe: Connection
    index: int = -1


class LocalWorkers:
    """Processes on this machine, started when they are first needed."""

    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        self.function, self.count = function, count
        self._idle: list[_Process] = []
        self._busy: dict[Connection, _Process] = {}

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._idle:
            worker.pipe.close()  # which ends it
        for worker in self._busy.values():
            worker.process.terminate()
        for worker in (*self._idle, *self._busy.values()):
            worker.process.join()
            worker.pipe.close()

    def run(self, jobs: Sequence[Any]) -> Iterator[Outcome]:
        waiting = deque(enumerate(jobs))
        while waiting or self._busy:
            while waiting and len(self._busy) < self.count:
                self._hand_in(*waiting.popleft())
            for pipe in wait(list(self._busy)):
                assert isinstance(pipe, Connection)
                worker = self._busy.pop(pipe)
                outcome = _receive(worker)
                if worker.process.is_alive():
                    self._idle.append(worker)
                else:
                    pipe.close()
                yield outcome

    def _hand_in(self, index: int, job: Any) -> None:
        worker = self._idle.pop() if self._idle else self._start()
        worker.index = index
        self._busy[worker.pipe] = worker
        with suppress(BrokenPipeError):  # of a process that has just died, which _receive tells
            worker.pipe.send((index, job))

    def _start(self) -> _Process:
        # spawn: a fork would copy torch's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(self.function, theirs), daemon=True)
        process.start()
        theirs.close()  # ours then tells of the end of the process
        return _Process(process, ours)


def _receive(worker: _Process) -> Outcome:
    try:
        outcome: Outcome = worker.pipe.recv()
        return outcome
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Outcome(worker.index, error=f"its process {how}")


def _work(function: Callable[[Job], Any], pipe: Connection) -> None:
    """A worker's life: a job after the other until it is ended."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            index, job = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(function, index, job))


class RayWorkers:
    """Tasks on the cluster that RAY_ADDRESS names, else on one of `count` cores here. All see the same folders."""

    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError('engine "ray" needs ray; pip install "mixloader[ray]", or use engine "local"') from error
        self.ray, self.function, self.count = ray, function, count
        self._busy: dict[Any, int] = {}
        self._is_ours = not ray.is_initialized()

    def __enter__(self) -> RayWorkers:
        if self._is_ours:
            here = {"num_cpus": self.count, "include_dashboard": False}
            self.ray.init(**({} if os.environ.get("RAY_ADDRESS") else here))
        return self

    def __exit__(self, *exception: object) -> None:
        for task in self._busy:
            self.ray.cancel(task, force=True)
        if self._is_ours:
            self.ray.shutdown()

    def run(self, jobs: Sequence[Any]) -> Iterator[Outcome]:
        remote = self.ray.remote(num_cpus=1, max_retries=0)(attempt)
        waiting = deque(enumerate(jobs))
        while waiting or self._busy:
            while waiting and len(self._busy) < self.count:
                index, job = waiting.popleft()
                self._busy[remote.remote(self.function, index, job)] = index
            for done in self.ray.wait(list(self._busy))[0]:
                index = self._busy.pop(done)
                try:
                    yield self.ray.get(done)
                except self.ray.exceptions.RayError as error:
                    yield Outcome(index, error=f"its Ray worker failed: {str(error).splitlines()[0]}")


_ENGINES: dict[str, Callable[[Callable[[Any], Any], int], Any]] = {"local": LocalWorkers, "ray": RayWorkers}
