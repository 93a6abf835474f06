"""Batches on the device, copied ahead on a CUDA stream of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixloader.loader import MixLoader


class DevicePrefetcher:
    """Iterates over a MixLoader, with the tensors of each batch on `device`.

    While a batch is used, the next one that is ready is copied already, without being drawn: the state and
    set_weights() of the loader mean what they mean without this, and a copy that a change of weights has
    made stale is dropped. Give the loader pin_memory=True, or copies are not asynchronous.
    dtype: of input_ids there (targets are int64); a loader of int32 or uint16 batches halves or quarters what
    crosses the bus, and the device widens them. Weights, state and the rest are the loader's own.
    """

    def __init__(self, loader: MixLoader, device: torch.device | str, *, dtype: torch.dtype = torch.int64):
        self.loader, self.device = loader, torch.device(device)
        self._dtypes = {"input_ids": dtype, "targets": torch.int64}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead: tuple[int, dict[str, Any]] | None = None  # fill number, tensors under way

    def __iter__(self) -> DevicePrefetcher:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self.loader)
        ahead, self._ahead = self._ahead, None
        fresh = ahead is not None and ahead[0] == self.loader.fill
        moved = {**batch, **ahead[1]} if ahead is not None and fresh else self._copy(batch)
        self._wait(moved)
        ready = self.loader.peek()
        if ready is not None:
            fill, tensors = ready
            self._ahead = fill, self._copy(tensors)
        return moved

    def __len__(self) -> int:
        return len(self.loader)

    def _copy(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Begin the copy of a batch's tensors on the side stream."""
        with torch.cuda.stream(self._stream):  # no stream: nothing is changed
            return {
                name: self._widen(name, value.to(self.device, non_blocking=True, copy=True))
                if isinstance(value, torch.Tensor)
                else value
                for name, value in batch.items()
            }

    def _widen(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtypes[name]) if name in self._dtypes else tensor

    def _wait(self, batch: Mapping[str, Any]) -> None:
        """Let the current stream use what the side stream has written."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(current)
