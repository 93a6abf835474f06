"""The C++ core (csrc/): plans, shards, the threads that fill batches, and the loss on a CPU."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

WEIGHT_ONE: int

def philox(key: int, counter: Sequence[int]) -> list[int]: ...
def permute(seed: int, domain_key: int, epoch: int, n: int, index: int) -> int: ...
def quantize(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]: ...
def xxh64(data: bytes, seed: int = 0) -> int: ...
def write_checksums(path: str, sidecar: str, block_bytes: int = 4096) -> None: ...
def verify(path: str, sidecar: str) -> None: ...
def _fail_io(
    call: str, *, nth: int = 1, times: int = 1, error: int = 0, is_short: bool = False, delay_ms: int = 0
) -> None: ...
def _heal_io() -> int: ...

class TokenType(Enum):
    INT64 = ...
    INT32 = ...
    UINT16 = ...

class Boundaries(Enum):
    NONE = ...
    INDEX = ...
    AFTER_EOT = ...
    AT_EOT = ...

class Sampling(Enum):
    QUOTA = ...
    MULTINOMIAL = ...
    EXACT = ...

class Planner:
    """The plan of a stream, without its data: reference.ReferenceStream, fast."""

    def __init__(
        self,
        *,
        seed: int,
        keys: Sequence[int],
        windows: Sequence[Sequence[int]],
        rows: int,
        units: npt.NDArray[np.int64],
        shuffle: bool = True,
        shuffle_shards: int = 0,
        sampling: Sampling = Sampling.QUOTA,
        limits: Sequence[int] = (),
        stop_at_limit: bool = False,
    ) -> None: ...
    def plan(self, steps: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """(domain, draw, window), each [steps, rows], of the next steps; fewer where the stream ends."""

    def skip(self, steps: int) -> int:
        """Advance without looking; returns the steps done, fewer where the stream ends."""

    def set_weights(self, units: npt.NDArray[np.int64]) -> None:
        """Integer weights from the next step on."""

    def effective_units(self) -> npt.NDArray[np.int64]:
        """int64 [D]: the weights that the next step begins with, of the domains that have draws left."""

    def window(self, domain: int, draw: int) -> int: ...
    def upcoming(self, domain: int, draw: int, limit: int) -> list[tuple[int, int]]:
        """(draws ahead, shard) of the shards that the draws from `draw` on need, each once."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...

def pack_shard(
    shard: dict[str, Any],
    seq_len: int,
    boundaries: Boundaries,
    eot: int,
    fingerprint: bytes,
    descriptor: int,
    path: str,
) -> tuple[int, int]: ...

class PackedRows:
    def __init__(self, path: str) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def targets(self) -> int: ...
    @property
    def fingerprint(self) -> bytes: ...
    def row(self, row: int) -> list[tuple[int, int]]: ...
    def verify(self) -> None: ...

def loss_levels() -> list[str]:
    """Sets of instructions that this machine has a loss for, the fastest last."""

def loss_rows(
    logits: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    domain_ids: npt.NDArray[Any] | None,
    token_weights: npt.NDArray[np.float32] | None,
    domain_weights: npt.NDArray[np.float32] | None,
    reference_losses: npt.NDArray[np.float32] | None,
    token_bytes: npt.NDArray[np.int32] | None,
    *,
    losses: npt.NDArray[np.float32] | None,
    saved: npt.NDArray[np.float32],
    gradient: npt.NDArray[Any] | None,
    scale: npt.NDArray[np.float32] | None,
    sums: npt.NDArray[np.int64] | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    distribution: bool,
    level: str,
    threads: int,
) -> None:
    """loss_path.LossInputs as arrays, bfloat16 as its bits in int16. With losses: forward, else backward."""

class Streamer:
    def __init__(
        self,
        *,
        domains: Sequence[tuple[int, Sequence[dict[str, Any]]]],
        seq_len: int,
        vocab_size: int,
        inputs: TokenType = TokenType.INT64,
        targets: TokenType = TokenType.INT64,
        shared: bool = False,
        boundaries: Boundaries = Boundaries.NONE,
        eot: int = 0,
        mask_targets: bool = False,
        mmap: bool = False,
        seed: int,
        shuffle: bool = True,
        shuffle_shards: int = 0,
        sampling: Sampling = Sampling.QUOTA,
        limits: Sequence[int] = (),
        stop_at_limit: bool = False,
        batch_size: int,
        micro_batches: int,
        world_size: int,
        rank: int,
        units: npt.NDArray[np.int64],
        threads: int | None,
    ) -> None:
        """threads: None leaves their number to the core, which adds some when reads are slow; 0 reads in next()."""

    def supply(self, ahead: int) -> None:
        """Submit recycled memory until there are `ahead` batches to fill; a block goes back with its last tensor."""

    def submit(
        self,
        inputs: npt.NDArray[Any],
        targets: npt.NDArray[Any] | None,
        domains: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64] | None = None,
        documents: npt.NDArray[np.int32] | None = None,
        owner: Any = None,
    ) -> None:
        """owner comes back with the batch."""

    def next(self, timeout: float = 0.0, consume: bool = True) -> tuple[int, int, int, bool, int, int, Any] | None:
        """(step, micro-batch, weights version, had to wait, fill number, batches ready behind it, tensors).

        tensors: DLPack capsules, to be taken over once, of inputs and targets [B, T], domain ids [B], positions and
        documents [B, T], None for what the format does not ask for; or the owner of what was submitted.

        None at the end, where no buffers are given up; set_weights, skip and load_state may find more of the stream.
        Without `consume` the batch stays the next one until take(). Raises RuntimeError after `timeout` seconds
        without a batch; 0 waits for ever.
        """

    def take(self, fill: int) -> bool:
        """Consume the batch that next() gave; False if it was filled anew since."""

    def queued(self) -> int:
        """Buffers submitted and not given up."""

    def position(self) -> tuple[int, int]:
        """(step, micro-batch) of the next batch."""

    def peek(self) -> tuple[int, Any] | None:
        """(fill number, tensors as of next()) of the next batch if it is ready; filled anew it has a new number."""

    def set_weights(self, units: npt.NDArray[np.int64], step: int | None = None) -> int: ...
    def skip(self, n: int) -> int:
        """Pass over n steps, fewer where the stream ends; returns the next. Raises StateError inside a step."""

    def step(self) -> int: ...
    def locate(self, domain: int, window: int) -> tuple[int, int, int | None, int | None]: ...
    def weights_at(self, step: int) -> npt.NDArray[np.int64]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def provide(self, shard: int, path: str) -> None:
        """Shards are numbered through all domains; one that had no path to begin with is now here."""

    def fail(self, shard: int, message: str) -> None:
        """Those who wait for a shard get a ShardError; the next next() asks for it again."""

    def withdraw(self, shard: int) -> None: ...
    def wanted(self, timeout_ms: int) -> list[int]:
        """Shards that readers wait for; returns as soon as one asks anew, else after the timeout."""

    def upcoming(self, limit: int) -> list[tuple[float, int]]:
        """(rows ahead over all ranks, shard) of the shards to fetch that the stream needs next, soonest first."""

    def close(self) -> None: ...
