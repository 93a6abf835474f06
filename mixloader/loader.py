"""MixLoader: micro-batches from domain shards, in a mixture that may change at every step.

An iterable and an iterator, not a torch DataLoader subclass (accelerate would rebuild a subclass
from its `.dataset`). The C++ core plans and reads ahead in threads of its own; tensors are
allocated here, so a batch may be kept for as long as one likes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mixloader.accounting import DomainAccount, accounts
from mixloader.batch import BatchFormat, as_batch, as_tensors, submit_pinned
from mixloader.dataloader import DataLoaderSurface, check_torch_arguments, seed_of
from mixloader.engine import Engine
from mixloader.heldout import HeldOut
from mixloader.layout import Layout, check_counts
from mixloader.live import LiveMixture
from mixloader.manifest import Manifest
from mixloader.mixture import as_fractions
from mixloader.place import Place, locate
from mixloader.probe import probe
from mixloader.rules import StreamRules
from mixloader.schedule import FollowedSchedule, Schedule
from mixloader.state import STATE_VERSION, append_domains, change_seq_len, check_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MOST_AHEAD = 32  # batches that a prefetch grows to by itself
_SKIPPED_AT_ONCE = 1024  # steps; a schedule sets the weights of each


class MixLoader(LiveMixture, DataLoaderSurface):
    """Draws micro-batches of token windows from several domains.

    data: a Manifest, or what Manifest.open takes: a manifest's path, a folder, {name: path}. roots: folders or
        beginnings of URLs outside a manifest's own folder that it may name shards in.
    batch_size: rows of a micro-batch on this rank. seq_len: tokens of a row.
    weights: one number a domain, in order or by name; by default each domain's share of tokens. Or a
        Schedule, or a function from the plan step to weights.
    grad_accumulation_steps: micro-batches of an optimizer step on each rank; or give global_batch,
        the rows of an optimizer step over all ranks, and it follows.
    world_size, rank: by default those of torch.distributed where it is initialized, else 1 and 0; or mesh, a
        DeviceMesh whose data-parallel dimensions (mesh_dims) count, so that tensor- and context-parallel
        ranks read the same.
    seed (or generator, whose initial seed is taken): the stream is a pure function of it, the data, the
        weights of each step, the global batch, seq_len and the rules.
    max_steps: optimizer steps after which iteration ends; by default never.
    vocab_size, eot: ids at or above the first are an error, the second ends a text; by default the manifest's.
    sampling, shuffle, shuffle_shards, exhausted, max_epochs, documents, mask_boundaries, packing: the rules;
        see StreamRules.

    num_workers: reader threads; 0 reads in the caller, None adds some where storage is slow. prefetch_factor:
        batches ahead, each worker; None begins with 4 and grows where batches come late. timeout: seconds to
        wait for a batch, 0 for ever.
    io: "pread", or "mmap" for files that stay in the page cache. cache_dir, cache_bytes: where remote and
        compressed shards and packing tables are kept, and how much of the first.
    dtype: of input_ids: torch.int64, int32 or uint16 (to be widened on the GPU). target_dtype: by default
        int64, or uint16 with uint16. contiguous: False makes inputs and targets views of one tensor, which
        is written in two thirds of the time. pin_memory: page-locked, where CUDA is available.

    Each item: {"input_ids": [B, T], "targets": [B, T] (the next tokens, already shifted), "domain_ids":
    int64 [B], "step": int, "micro_step": int, "weights_version": int}, and with documents: position_ids
    int64 [B, T], document_ids int32 [B, T], cu_seqlens int32 [documents + 1], max_seqlen int.
    Raises ShardError or TokenError at the batch that a damaged shard belongs to.
    """

    def __init__(
        self,
        data: Manifest | str | Path | Mapping[str, Any],
        batch_size: int,
        seq_len: int,
        *,
        roots: Iterable[str | Path] = (),
        weights: Any = None,
        grad_accumulation_steps: int | None = None,
        global_batch: int | None = None,
        world_size: int | None = None,
        rank: int | None = None,
        mesh: DeviceMesh | None = None,
        mesh_dims: Sequence[str] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        max_steps: int | None = None,
        vocab_size: int | None = None,
        eot: int | None = None,
        sampling: str = "quota",
        shuffle: bool = True,
        shuffle_shards: int | None = None,
        exhausted: str | None = None,
        max_epochs: float | Mapping[str, float] | None = None,
        documents: str | None = None,
        mask_boundaries: bool = False,
        packing: str | None = None,
        num_workers: int | None = None,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        io: str = "pread",
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        dtype: torch.dtype = torch.int64,
        target_dtype: torch.dtype | None = None,
        contiguous: bool = True,
        pin_memory: bool = False,
        **torch_arguments: Any,
    ):
        check_torch_arguments(torch_arguments, num_workers, prefetch_factor)
        layout = Layout.resolve(batch_size, grad_accumulation_steps, global_batch, world_size, rank, mesh, mesh_dims)
        self.mesh, self.mesh_dims = mesh, mesh_dims
        seed = seed_of(seed, generator)
        check_counts(
            seq_len=(seq_len, 1), num_workers=(num_workers or 0, 0), seed=(seed, 0), max_steps=(max_steps or 0, 0),
            prefetch_factor=(4 if prefetch_factor is None else prefetch_factor, 1),
        )  # fmt: skip
        if not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise ValueError(f"timeout is {timeout!r}; expected seconds of at least 0")
        self.manifest = Manifest.open(data, roots=roots)
        self.layout, self.seq_len, self.seed = layout, int(seq_len), int(seed)
        self.batch_size, self.grad_accumulation_steps = layout.batch_size, layout.micro_batches
        self.world_size, self.rank, self.global_batch = layout.world_size, layout.rank, layout.global_batch
        self.max_steps = None if max_steps is None else int(max_steps)
        if exhausted is None:
            exhausted = "repeat" if max_epochs is None else "redistribute"
        if shuffle_shards is None:
            shuffle_shards = 0 if self.manifest.is_ready or not shuffle else 8
        self.rules = StreamRules(
            sampling, shuffle, shuffle_shards, exhausted, max_epochs, documents, mask_boundaries, packing
        )
        if target_dtype is None:
            target_dtype = torch.uint16 if dtype == torch.uint16 else torch.int64
        self.format = BatchFormat(
            self.batch_size, self.seq_len, dtype, target_dtype, contiguous, documents is not None,
            mask_boundaries or packing is not None, bool(pin_memory) and torch.cuda.is_available(),
        )  # fmt: skip
        self.vocab_size = self.manifest.vocab_size if vocab_size is None else vocab_size
        self.eot = self.manifest.eot if eot is None else eot
        check_counts(vocab_size=(1 if self.vocab_size is None else self.vocab_size, 1), eot=(self.eot or 0, 0))
        self.pin_memory, self.timeout = bool(pin_memory), float(timeout)
        self.num_workers = 1 if num_workers is None else int(num_workers)
        threads = None if num_workers is None else int(num_workers)
        self._reading: dict[str, Any] = {
            "io": io,
            "threads": threads,
            "cache_dir": cache_dir,
            "cache_bytes": cache_bytes,
        }
        self._depth = max(1, self.num_workers * (4 if prefetch_factor is None else int(prefetch_factor)))
        self._deepens = prefetch_factor is None and self.num_workers > 0

        self.removed: tuple[str, ...] = ()
        """Domains that were removed: they keep their number, and weight zero."""
        if callable(weights):
            weights = Schedule.function(weights)
        self._scheduled = weights.bind(self.names) if isinstance(weights, Schedule) else None
        self._schedule = None if self._scheduled is None else FollowedSchedule(self._scheduled)
        if self._scheduled is not None:
            weights = self._scheduled.at(0)
        units = self._units(self.manifest.table().prior if weights is None else weights)
        self._tokens_before = [0] * len(self.names)
        self._prior: list[int] | None = None  # integer weights that the table has had since domains were added
        self._drawing = threading.RLock()  # two threads that draw get whole batches, each its own
        self._drawer: int | None = None  # the thread that drew last, with several ranks
        self._closed_state: dict[str, Any] | None = None
        self.fill = 0
        """The number of the filling of the batch drawn last: see peek()."""
        self._owner = os.getpid()  # a forked child has no threads, and locks that nobody releases
        self._open(units)
        self.table = self.manifest.table(as_fractions(units))

    # The stream

    def __iter__(self) -> MixLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        self._core.position()  # raises in a forked child, where the lock may be held for ever
        if self.world_size > 1:
            self.__dict__["_drawer"] = threading.get_ident()
        with self._drawing:
            if self.max_steps is not None and self._core.position()[0] >= self.max_steps:
                raise StopIteration
            while True:
                queued = self._core.queued()
                if not queued:
                    self._submit(self._depth)
                drawn = self._core.next(self.timeout, False)
                if drawn is None:
                    raise StopIteration
                step, micro_step, version, waited, fill, ready, tensors = drawn
                if waited and self._deepens:
                    self._depth = min(self._depth + 1, _MOST_AHEAD)
                # Some at a time: while half of the batches are ready, nobody needs more work.
                if ready < queued - 1 or 2 * ready < self._depth:
                    self._submit(self._depth + 1)
                batch = as_batch(as_tensors(tensors))
                batch["step"], batch["micro_step"], batch["weights_version"] = step, micro_step, version
                object.__setattr__(self, "fill", fill)  # not by way of DataLoaderSurface's checks
                # Last, so that an interrupt before loses nothing. False: other weights came in between.
                if self._core.take(fill):
                    return batch

    def __len__(self) -> int:
        """Micro-batches still to be drawn; only with max_steps."""
        if self.max_steps is None:
            raise TypeError("a MixLoader without max_steps has no length: it never ends")
        step, micro_step = self._core.position()
        return max(0, (self.max_steps - step) * self.grad_accumulation_steps - micro_step)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains, in the order of domain_ids and weights."""
        return self.manifest.names

    @property
    def step(self) -> int:
        """The first plan step of which no micro-batch was drawn yet."""
        return self._core.step()

    @property
    def queue_depth(self) -> int:
        """Batches ahead of the one drawn last, ready or being filled."""
        return self._core.queued()

    @property
    def cursors(self) -> np.ndarray:
        """int64 [D]: windows of each domain drawn in all steps before the one under way."""
        return np.array(self._core.state()["cursors"], dtype=np.int64)

    def skip(self, steps: int) -> int:
        """Leave out the next `steps` plan steps, after a loss spike for instance; nothing of them is read.

        Returns the step that comes next. Raises StateError between the micro-batches of a step.
        """
        check_counts(steps=(steps, 0))
        with self._drawing:
            before = self._core.state()["cursors"]
            try:
                for done in range(0, steps, _SKIPPED_AT_ONCE):
                    part = min(steps - done, _SKIPPED_AT_ONCE)
                    self._follow_schedule(self._last_ahead() + part)
                    self._core.skip(part)
            finally:  # also of those that were skipped before an interrupt
                after = self._core.state()["cursors"]
                self._tokens_before = [
                    tokens - (new - old) * self.seq_len
                    for tokens, old, new in zip(self._tokens_before, before, after, strict=True)
                ]
            return self._core.step()

    def accounts(self) -> dict[str, DomainAccount]:
        """What each domain was asked to give and gave, to the token, by name."""
        return accounts(self)

    def locate(self, step: int, row: int) -> Place:
        """Where row `row` (of the global batch) of a plan step that is not over stands, as things stand.

        For steps that are over: mixloader.replay.locate, with the run record. Raises WeightsError for them, StateError
        if the stream ends before.
        """
        with self._drawing:
            self._follow_schedule(step)
            return locate(self, step, row)

    # Beside the stream

    def probe(self, domain: str, batch_size: int | None = None, *, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Batches of one domain's training windows, without end; this stream does not notice. seed: of their order."""
        return probe(self, domain, self.batch_size if batch_size is None else batch_size, seed)

    def held_out(self, batch_size: int | None = None, **options: Any) -> HeldOut:
        """The held-out windows as finite batches, the same on every rank; options: of HeldOut."""
        batch_size = self.batch_size if batch_size is None else batch_size
        own = {"vocab_size": self.vocab_size, **{key: self._reading[key] for key in ("cache_dir", "cache_bytes")}}
        return HeldOut(self.manifest, batch_size, self.seq_len, **own | options)

    def peek(self) -> tuple[int, dict[str, Any]] | None:
        """The next batch if it is ready, without drawing it: the number of its filling, and its tensors.

        If `fill` has this number after next(), the tensors are those of the batch that was drawn; else a change of
        weights came in between, and they hold nothing of use.
        """
        with self._drawing:
            ready = self._core.peek()
            return None if ready is None else (ready[0], as_batch(as_tensors(ready[1])))

    # State

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: what was drawn, not what was read ahead. JSON-able, O(domains).

        The same on every rank.
        """
        if self._closed_state is not None:
            return self._closed_state
        with self._drawing:
            schedule, step = self._schedule, self.step
            with suppress(Exception):  # a schedule that fails for the next step fails there, not here
                self._follow_schedule(step)
            core = self._core.state()
        if schedule is not None:  # what it has set ahead depends on the prefetch, and is set again
            core["weights"] = [entry for entry in core["weights"] if entry[0] <= step or schedule.is_over(entry[0])]
            core["weights_version"] = max(version for _, version, _ in core["weights"])
        return {
            "version": STATE_VERSION,
            "fingerprint": self.manifest.fingerprint,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "rules": self.rules.to_json(),
            "domains": list(self.names),
            "removed": list(self.removed),
            "schedule": None if schedule is None else schedule.to_json(),
            "prior": self._prior,
            "tokens_before": list(self._tokens_before),
            **core,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken, at any world size.

        Another global batch (between steps) goes on from the same windows; another seq_len begins a
        new epoch of each domain; domains appended since begin with weight zero. Raises StateError for a state
        of other data, another seed or other rules.
        """
        check_state(state, self)
        state = append_domains(state, self.names)
        if state["seq_len"] != self.seq_len:
            state = change_seq_len(state, self.seq_len, self.engine.epoch_windows(state["seq_len"]), self.windows)
        with self._drawing:
            self._core.load_state(
                {key: state[key] for key in ("step", "rows", "cursors", "residuals", "weights_version", "weights")}
            )
            self._tokens_before, self.removed = list(state["tokens_before"]), tuple(state["removed"])
            self._prior = state["prior"]
            if self._prior is not None:
                self.table = self.manifest.table(as_fractions(self._prior))
            self._schedule = None
            if state["schedule"] is not None and self._scheduled is not None:
                ends = state["schedule"]["ends"]
                known = [step for step, _, _ in state["weights"] if ends is None or step < ends]
                followed = max(known, default=self.step)
                self._schedule = FollowedSchedule(self._scheduled, followed, ends)
                self._follow_schedule(self._last_ahead())

    def close(self) -> None:
        """End the reader threads and drop what they read ahead. The state stays to be had."""
        if self._closed_state is None and os.getpid() == self._owner:
            self._closed_state = self.state_dict()
        self.engine.close()

    def __enter__(self) -> MixLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Helpers

    def _open(self, units: np.ndarray) -> None:
        """Start the core over the manifest as it is now."""
        self.engine = Engine(
            self.manifest,
            self.seq_len,
            rules=self.rules,
            format=self.format,
            layout=self.layout,
            units=units,
            seed=self.seed,
            vocab_size=self.vocab_size,
            eot=self.eot,
            **self._reading,
        )
        self._core, self.windows = self.engine.core, self.engine.windows

    @property
    def schedule_digest(self) -> str | None:
        """Which schedule the loader was made with, if any."""
        return None if self._scheduled is None else self._scheduled.digest

    def _submit(self, ahead: int) -> None:
        """Have the core fill up to `ahead` batches."""
        if self._schedule is None and not self.format.pin_memory:
            self._core.supply(ahead)
            return
        while self._core.queued() < ahead:
            try:
                self._follow_schedule(self._last_ahead(1))
            except Exception:
                if self._core.queued():
                    return  # the schedule fails for a later step: an error when that one comes
                raise
            if self.format.pin_memory:
                submit_pinned(self._core, self.format)
            else:
                self._core.supply(self._core.queued() + 1)

    def _last_ahead(self, more: int = 0) -> int:
        """The plan step of the last batch that the core has memory for, if it gets it for so many more."""
        step, micro_step = self._core.position()
        ahead = micro_step + max(0, self._core.queued() + more - 1)
        step += ahead // self.grad_accumulation_steps
        return step if self.max_steps is None else max(0, min(step, self.max_steps - 1))

    def _follow_schedule(self, step: int) -> None:
        """Have the scheduled weights of all steps up to `step` set."""
        if self._schedule is not None:
            self._schedule.follow(self._core, step)
