"""The C++ core (csrc/): plans, shards and the threads that fill batches. Used by loader.py alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

WEIGHT_ONE: int

def philox(key: int, counter: Sequence[int]) -> list[int]: ...
def permute(seed: int, domain_key: int, epoch: int, n: int, index: int) -> int: ...

class Streamer:
    def __init__(
        self,
        *,
        domains: Sequence[tuple[int, Sequence[tuple[str, int, int, int]]]],
        seq_len: int,
        vocab_size: int,
        seed: int,
        batch_size: int,
        micro_batches: int,
        world_size: int,
        rank: int,
        units: npt.NDArray[np.int64],
        threads: int,
    ) -> None: ...
    def submit(
        self,
        inputs: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        domains: npt.NDArray[np.int64],
    ) -> None: ...
    def next(self) -> tuple[int, int, int]: ...
    def set_weights(self, units: npt.NDArray[np.int64], step: int | None = None) -> int: ...
    def step(self) -> int: ...
    def weights_at(self, step: int) -> npt.NDArray[np.int64]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...
