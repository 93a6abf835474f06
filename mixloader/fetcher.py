"""Brings the shards that the plan needs next to this machine while training runs, and takes away those it needs last.

The core says which shards its readers wait for and which the plan comes to next; the cache (cache.py) holds the copies.
What is fetched never changes the stream, only when a batch is ready.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol

from mixloader.cache import NotNowError, ShardCache, known
from mixloader.errors import ShardError
from mixloader.formats import Shard
from mixloader.remote import Cancelled

_ROUND_MS = 50  # between two looks at the plan while nobody waits
_LOOK_SHARE = 0.05  # of the time is spent on looking at most
_TRY_AGAIN_S = 5.0  # after a fetch ahead failed
_FULL_S = 0.2  # after other processes left no room, or were at the same shard
_JOIN_S = 10.0  # a request that cannot be given up is waited for so long at close


class Core(Protocol):
    """The part of _core.Streamer that concerns where shards lie; a shard is its number over all domains."""

    def wanted(self, timeout_ms: int) -> list[int]: ...
    def upcoming(self, limit: int) -> list[tuple[float, int]]: ...
    def provide(self, shard: int, path: str) -> None: ...
    def fail(self, shard: int, message: str) -> None: ...
    def withdraw(self, shard: int) -> None: ...


class Fetcher:
    """Threads that keep a core provided with its shards, until close() or until this object is gone.

    shards: of all domains, in the core's order; those that are ready where they lie are left alone. What a reader
    waits for comes first, then what the plan needs soonest, as far as the cache's limit goes. To make room, the shard
    is withdrawn that the plan needs last. A shard that cannot be fetched is an error for the readers that wait for
    it; fetched ahead, it is tried again later.
    """

    def __init__(self, core: Core, shards: Sequence[Shard], cache: ShardCache):
        # The threads know the work but not this object, so that a loader that is dropped without close() ends them.
        work = _Work(core, {i: shard for i, shard in enumerate(shards) if not shard.is_ready}, cache)
        self._end = weakref.finalize(self, work.close)

    def close(self) -> None:
        """End the threads and release the shards. The core is not used any more afterwards."""
        self._end()


class _Work:
    def __init__(self, core: Core, shards: dict[int, Shard], cache: ShardCache):
        self.core, self.shards, self.cache = core, shards, cache
        self.stop = threading.Event()
        self.changed = threading.Condition()
        # All below are used with `changed` held.
        self.here: dict[int, str] = {}  # provided: the paths of their copies
        self.under_way: set[int] = set()
        self.wanted: set[int] = set()  # readers wait for them
        self.queue: list[int] = []  # to be fetched ahead, soonest first
        self.need: dict[int, float] = {}  # rows until a shard is needed, as far as the plan was looked at
        self.failed: dict[int, float] = {}  # when, last
        self.not_before: dict[int, float] = {}
        self.threads = [threading.Thread(target=self.look, name="mixloader-plan", daemon=True)]
        for number in range(cache.workers + 1):  # one more for what is waited for
            name, ahead = f"mixloader-fetch-{number}", number < cache.workers
            self.threads.append(threading.Thread(target=self.work, args=(ahead,), name=name, daemon=True))
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        self.stop.set()
        with self.changed:
            self.changed.notify_all()
        for thread in self.threads:
            if thread is not threading.current_thread():  # garbage may be collected in one of them
                thread.join(_JOIN_S)
        with self.changed:
            for path in self.here.values():
                self.cache.release(path)
            self.here.clear()

    # What to fetch

    def look(self) -> None:
        next_look = -math.inf
        while not self.stop.wait(0.001):
            wanted: set[int] = set()
            try:
                began = time.monotonic()
                wanted = set(self.core.wanted(_ROUND_MS)) & self.shards.keys()
                complete, limit = self.note_wanted(wanted, began)
                began = time.monotonic()
                if not complete and began >= next_look:
                    self.look_ahead(limit)
                    next_look = began + (time.monotonic() - began) / _LOOK_SHARE
            except Exception as error:  # a reader would wait for ever for a thread that has died of it
                for shard in wanted:
                    self.fail(shard, error)

    def note_wanted(self, wanted: set[int], began: float) -> tuple[bool, int]:
        """Whether all shards are here, and how many the plan is to be asked for."""
        with self.changed:
            # One that failed meanwhile may have been listed before; whoever asks again is in the next list.
            self.wanted = {i for i in wanted - self.here.keys() if self.failed.get(i, -math.inf) < began}
            if self.wanted:
                self.changed.notify_all()
            limit = len(self.here) + len(self.under_way) + 4 * self.cache.workers
            return len(self.here) == len(self.shards), limit

    def look_ahead(self, limit: int) -> None:
        upcoming = self.core.upcoming(limit)
        need = {shard: rows for rows, shard in reversed(upcoming) if shard in self.shards}
        with self.changed:
            missing = need.keys() - self.here.keys()
        # What lies in the folder already comes first: in use, it is not removed to make room for the others.
        present = {shard: self.cache.has(self.shards[shard].path, **known(self.shards[shard])) for shard in missing}
        with self.changed:
            self.need = need
            self.queue = sorted(missing - self.here.keys(), key=lambda shard: (not present[shard], need[shard]))
            self.changed.notify_all()

    # Fetching

    def work(self, ahead: bool) -> None:
        while True:
            with self.changed:
                shard = None
                while not self.stop.is_set() and (shard := self.take(ahead)) is None:
                    self.changed.wait()
                if shard is None:
                    return
                urgent = shard in self.wanted
            self.bring(shard, urgent)
            with self.changed:
                self.under_way.discard(shard)
                self.changed.notify_all()

    def take(self, ahead: bool) -> int | None:
        """The next shard to fetch, now under way; None if there is none, or no room for it."""
        for shard in self.wanted - self.under_way - self.here.keys():
            if not self.make_room(shard, urgent=True) and self.under_way:
                continue  # once they are here they can be withdrawn
            self.under_way.add(shard)
            return shard
        now = time.monotonic()
        for shard in self.queue if ahead else ():
            if shard in self.under_way or shard in self.here or self.not_before.get(shard, 0) > now:
                continue
            if not self.make_room(shard, urgent=False):
                return None  # and none for later ones
            self.under_way.add(shard)
            return shard
        return None

    def bring(self, number: int, urgent: bool) -> None:
        shard = self.shards[number]
        try:
            path = self.cache.fetch(shard.path, **known(shard), ahead=not urgent, cancel=self.stop)
        except Cancelled:
            return
        except NotNowError as error:
            with self.changed:
                self.not_before[number] = time.monotonic() + _FULL_S
                if error.full:
                    self.withdraw_later_than(number)
            return
        except Exception as error:
            self.fail(number, error, urgent=urgent)
            return
        with self.changed:
            self.here[number] = path
            self.wanted.discard(number)
            self.core.provide(number, path)

    def fail(self, number: int, error: Exception, *, urgent: bool = True) -> None:
        """A shard cannot be had for now: an error for the readers that wait for it."""
        path = self.shards[number].path
        message = str(error) if isinstance(error, ShardError) else f"cannot fetch {path}: {error!r}"
        with self.changed:
            self.failed[number] = time.monotonic()
            self.not_before[number] = self.failed[number] + _TRY_AGAIN_S
            if urgent:
                self.wanted.discard(number)  # until a reader asks again
                self.core.fail(number, message)

    # Room: this process holds no more than the limit; the cache sees to all processes together

    def make_room(self, number: int, *, urgent: bool) -> bool:
        """Withdraw shards that are needed later, until one more fits; False if there are not enough of them."""
        held = {self.shards[i].path: self.shards[i].bytes for i in [*self.here, *self.under_way]}
        held[self.shards[number].path] = self.shards[number].bytes
        while sum(held.values()) > self.cache.limit_bytes:
            victim = self.withdraw_later_than(-1 if urgent else number)
            if victim is None:
                return False
            held.pop(self.shards[victim].path, None)
        return True

    def withdraw_later_than(self, number: int) -> int | None:
        """Withdraw the shard that is needed last, if that is later than `number`; returns it."""
        victims = self.here.keys() - self.wanted
        victim = max(victims, key=lambda i: self.need.get(i, math.inf), default=None)
        if victim is None or self.need.get(victim, math.inf) <= self.need.get(number, -math.inf):
            return None
        self.core.withdraw(victim)
        self.cache.release(self.here.pop(victim))
        return victim
