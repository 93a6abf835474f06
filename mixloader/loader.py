"""MixLoader: micro-batches from domain shards, in a mixture that may change at every step.

An iterable and an iterator, not a torch DataLoader subclass (accelerate would rebuild a subclass
from its `.dataset`). The C++ core plans and reads ahead in threads of its own; tensors are
allocated here, so a batch may be kept for as long as one likes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixloader import _core
from mixloader.errors import ManifestError, StateError
from mixloader.manifest import Manifest
from mixloader.mixture import WEIGHT_ONE, Weights, as_fractions, as_weights, quantize
from mixloader.reference import domain_key

STATE_VERSION = 1

# torch's DataLoader has these; a loader that took them silently would not do what they say.
_REFUSED = {
    "shuffle": "windows are always permuted within each domain, anew in every epoch",
    "sampler": "the plan decides which window comes next; change the mixture with set_weights()",
    "batch_sampler": "the plan decides which window comes next; change the mixture with set_weights()",
    "collate_fn": "batches are filled in place; transform them after they are drawn",
    "drop_last": "every batch is full: a domain that runs out begins its next epoch",
    "worker_init_fn": "workers are threads of the C++ core, not processes",
    "multiprocessing_context": "workers are threads of the C++ core, not processes",
    "persistent_workers": "workers are threads of the C++ core, which live as long as the loader",
    "generator": "give an integer seed= instead",
}


class MixLoader:
    """Draws micro-batches of token windows from several domains.

    data: a Manifest, or what Manifest.open takes: a manifest's path, a folder, {name: path}.
    batch_size: rows of a micro-batch on this rank. seq_len: tokens of a row.
    weights: one number a domain, in order or by name; by default each domain's share of tokens.
    grad_accumulation_steps: micro-batches of an optimizer step on each rank; or give global_batch,
        the rows of an optimizer step over all ranks, and it follows.
    world_size, rank: by default those of torch.distributed where it is initialized, else 1 and 0.
    seed: the stream is a pure function of it, the data, the weights of each step, the global batch
        and seq_len.
    num_workers: reader threads; 0 reads in the caller. prefetch_factor: batches ahead, each worker.
    pin_memory: batches in page-locked memory, where CUDA is available.
    max_steps: optimizer steps after which iteration ends; by default never.
    vocab_size: token ids at or above it are an error; by default the manifest's.

    Each item: {"input_ids": int64 [B, T], "targets": int64 [B, T] (the next tokens, already
    shifted), "domain_ids": int64 [B], "step": int, "micro_step": int, "weights_version": int}.
    Raises ShardError or TokenError at the batch that a damaged shard belongs to.
    """

    def __init__(
        self,
        data: Manifest | str | Path | Mapping[str, Any],
        batch_size: int,
        seq_len: int,
        *,
        weights: Weights | None = None,
        grad_accumulation_steps: int | None = None,
        global_batch: int | None = None,
        world_size: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        num_workers: int = 1,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
        max_steps: int | None = None,
        vocab_size: int | None = None,
        **unsupported: Any,
    ):
        for name in unsupported:
            reason = _REFUSED.get(name, "it is no argument of MixLoader")
            raise TypeError(f"MixLoader cannot honour {name}=: {reason}")
        world_size, rank = _ranks(world_size, rank)
        _check_counts(
            batch_size=(batch_size, 1), seq_len=(seq_len, 1), world_size=(world_size, 1), rank=(rank, 0),
            num_workers=(num_workers, 0), prefetch_factor=(prefetch_factor, 1), seed=(seed, 0),
            max_steps=(0 if max_steps is None else max_steps, 0),
        )  # fmt: skip
        if rank >= world_size:
            raise ValueError(f"rank is {rank}, but world_size is {world_size}; ranks count from 0")
        self.manifest = Manifest.open(data)
        self.names = self.manifest.names
        self.batch_size, self.seq_len = int(batch_size), int(seq_len)
        self.world_size, self.rank, self.seed = int(world_size), int(rank), int(seed)
        self.grad_accumulation_steps = _accumulation(
            grad_accumulation_steps, global_batch, self.world_size, self.batch_size
        )
        self.global_batch = self.world_size * self.batch_size * self.grad_accumulation_steps
        self.max_steps = None if max_steps is None else int(max_steps)
        self.vocab_size = self.manifest.vocab_size if vocab_size is None else vocab_size
        self.windows = self._windows(seq_len)
        units = self._units(self.manifest.table().prior if weights is None else weights)
        self.table = self.manifest.table(as_fractions(units))

        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._depth = max(1, num_workers * prefetch_factor)
        self._buffers: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self._core = _core.Streamer(
            domains=[
                (
                    domain_key(d.name),
                    [{**shard.for_core(), "windows": (shard.tokens - 1) // seq_len} for shard in d.shards],
                )
                for d in self.manifest.domains
            ],
            seq_len=seq_len,
            vocab_size=self.vocab_size or 0,
            seed=seed,
            batch_size=batch_size,
            micro_batches=self.grad_accumulation_steps,
            world_size=world_size,
            rank=rank,
            units=units,
            threads=num_workers,
        )

        self._step, self._micro_step = 0, 0  # of the next batch
        self._drawing = threading.Lock()  # two threads that draw get whole batches, each its own

    # The stream

    def __iter__(self) -> MixLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        with self._drawing:
            if self.max_steps is not None and self._step >= self.max_steps:
                raise StopIteration
            while len(self._buffers) < self._depth:
                self._submit()
            position = self._core.next()
            if position is None:
                raise StopIteration
            step, micro_step, version, _, _ = position
            tokens, domain_ids = self._buffers.popleft()
            self._submit()
            self._advance(step, micro_step + 1)
        inputs, targets = tokens.unbind()
        return {
            "input_ids": inputs,
            "targets": targets,
            "domain_ids": domain_ids,
            "step": step,
            "micro_step": micro_step,
            "weights_version": version,
        }

    def __len__(self) -> int:
        """Micro-batches still to be drawn; only with max_steps."""
        if self.max_steps is None:
            raise TypeError("a MixLoader without max_steps has no length: it never ends")
        return max(0, (self.max_steps - self._step) * self.grad_accumulation_steps - self._micro_step)

    @property
    def step(self) -> int:
        """The first plan step of which no micro-batch was drawn yet."""
        return self._step + (self._micro_step > 0)

    @property
    def cursors(self) -> np.ndarray:
        """int64 [D]: windows of each domain drawn in all steps before the one under way."""
        return np.array(self._core.state()["cursors"], dtype=np.int64)

    # The mixture

    @property
    def units(self) -> np.ndarray:
        """int64 [D], sums to WEIGHT_ONE: the integer weights of `step`."""
        return self._core.weights_at(self.step)

    @property
    def weights(self) -> np.ndarray:
        """float64 [D], sums to 1: the weights of `step`."""
        return as_fractions(self.units)

    def units_at(self, step: int) -> np.ndarray:
        """int64 [D]: the integer weights that `step`, not yet over, has as things stand."""
        return self._core.weights_at(step)

    def set_weights(self, weights: Weights, step: int | None = None) -> int:
        """Change the mixture from plan step `step` on; by default from the first step not begun.

        weights: as for MixLoader, or int64 [D] that sum to WEIGHT_ONE, which are taken as they are.
        Returns the first step with these weights. Batches read ahead for that step and after are
        dropped and filled anew, so the change is never late. With several ranks every rank makes
        the same call. Raises WeightsError and changes nothing if the weights are no mixture or the
        step has begun.
        """
        return self._core.set_weights(self._units(weights), step)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: what was drawn, not what was read ahead. JSON-able, O(domains).

        The same on every rank.
        """
        return {
            "version": STATE_VERSION,
            "fingerprint": self.manifest.fingerprint,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "domains": list(self.names),
            **self._core.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken, at any world size.

        Another global batch (between steps) goes on from the same windows; another seq_len begins a
        new epoch of each domain. Raises StateError for a state of other data or another seed.
        """
        self._check_state(state)
        core = {key: state[key] for key in ("step", "rows", "cursors", "residuals", "weights_version", "weights")}
        if state["seq_len"] != self.seq_len:
            old = self._windows(state["seq_len"])
            epochs = [-(-cursor // int(n)) for cursor, n in zip(core["cursors"], old, strict=True)]
            core["cursors"] = [epoch * int(n) for epoch, n in zip(epochs, self.windows, strict=True)]
        with self._drawing:
            self._core.load_state(core)
            self._step = state["step"]
            self._micro_step = state["rows"] // (self.batch_size * self.world_size)

    def close(self) -> None:
        """End the reader threads and drop what they read ahead."""
        self._core.close()
        self._buffers.clear()

    def __enter__(self) -> MixLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Helpers

    def _submit(self) -> None:
        # Inputs and targets share one allocation: on the caller's thread it costs more than the rest.
        shape = (2, self.batch_size, self.seq_len)
        tokens = torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory)
        domain_ids = torch.empty(self.batch_size, dtype=torch.int64, pin_memory=self._pin_memory)
        inputs, targets = tokens.numpy()
        self._core.submit(inputs, targets, domain_ids.numpy())
        self._buffers.append((tokens, domain_ids))

    def _advance(self, step: int, micro_step: int) -> None:
        last = micro_step == self.grad_accumulation_steps
        self._step, self._micro_step = (step + 1, 0) if last else (step, micro_step)

    def _units(self, weights: Weights) -> np.ndarray:
        if isinstance(weights, np.ndarray) and weights.dtype == np.int64 and weights.sum() == WEIGHT_ONE:
            as_weights(weights, self.names)
            return weights
        return quantize(as_weights(weights, self.names))

    def _windows(self, seq_len: int) -> np.ndarray:
        """int64 [D]: windows of seq_len + 1 tokens in one epoch of each domain."""
        windows = [sum((s.tokens - 1) // seq_len for s in domain.shards) for domain in self.manifest.domains]
        for domain, count in zip(self.manifest.domains, windows, strict=True):
            if count == 0:
                raise ManifestError(
                    f"domain {domain.name!r} has no shard of {seq_len + 1} tokens, which one window of "
                    f"seq_len {seq_len} needs; its longest has {max(s.tokens for s in domain.shards)}"
                )
        return np.array(windows, dtype=np.int64)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        missing = sorted(set(own) - set(state))
        if missing:
            raise StateError(f"the loader state has no {missing[0]!r}; it is damaged or was not saved by a MixLoader")
        if state["version"] != STATE_VERSION:
            raise StateError(
                f"the loader state has version {state['version']}; this mixloader reads version {STATE_VERSION}"
            )
        for key, what in (("domains", "domains"), ("fingerprint", "data"), ("seed", "seed")):
            if state[key] != own[key]:
                raise StateError(
                    f"the loader state was saved with other {what}: {state[key]!r}; this loader has {own[key]!r}"
                )
        if state["global_batch"] != self.global_batch and state["rows"]:
            raise StateError(
                f"the loader state was saved {state['rows']} rows into a step of {state['global_batch']} rows; "
                f"a change to a global batch of {self.global_batch} is possible between steps only"
            )
        _check_stream_state(state, len(self.names))


def _check_stream_state(state: Mapping[str, Any], domains: int) -> None:
    """Refuse a state whose numbers cannot be those of a stream over this many domains."""

    def integers(values: Any, least: int | None) -> bool:
        return (
            isinstance(values, (list, tuple))
            and len(values) == domains
            and all(type(v) is int and (least is None or v >= least) for v in values)
        )

    sound = (
        all(type(state[key]) is int and state[key] >= 0 for key in ("step", "rows", "weights_version", "seq_len"))
        and state["seq_len"] > 0
        and state["rows"] < state["global_batch"]
        and integers(state["cursors"], 0)
        and integers(state["residuals"], None)
        and sum(state["residuals"]) == 0
        and all(integers(units, 0) and sum(units) == WEIGHT_ONE for _, _, units in state["weights"])
        and any(step <= state["step"] for step, _, _ in state["weights"])
    )
    if not sound:
        raise StateError(
            f"the loader state is damaged: {dict(state)!r} is no position in a stream of {domains} domains"
        )


def _ranks(world_size: int | None, rank: int | None) -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size is None:
        world_size = torch.distributed.get_world_size() if distributed else 1
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    return world_size, rank


def _accumulation(steps: int | None, global_batch: int | None, world_size: int, batch_size: int) -> int:
    rows = world_size * batch_size
    if global_batch is None:
        _check_counts(grad_accumulation_steps=(1 if steps is None else steps, 1))
        return 1 if steps is None else int(steps)
    _check_counts(global_batch=(global_batch, 1))
    if global_batch % rows or steps not in (None, global_batch // rows):
        raise ValueError(
            f"a global batch of {global_batch} rows cannot be dealt to {world_size} ranks in micro-batches of "
            f"{batch_size} rows{'' if steps is None else f' and {steps} accumulation steps'}; "
            f"give a multiple of {rows}"
        )
    return int(global_batch) // rows


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value < 1 << 64:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}, in 64 bits")
