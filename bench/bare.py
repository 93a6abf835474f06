"""bare.cpp from Python: the best plain C++ loop over given windows, for the same bytes and the same output."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from bench.tokens import Batches

OUTPUTS = {"two": 0, "views": 1, "mixed": 2, "raw": 3}
"""two: int64 inputs and int64 targets; views: both views of one int64 [B, T + 1]; mixed: int32 inputs and
int64 targets; raw: views of one uint16 [B, T + 1]."""
DTYPES = {
    "two": (torch.int64, torch.int64),
    "views": (torch.int64, torch.int64),
    "mixed": (torch.int32, torch.int64),
    "raw": (torch.uint16, torch.uint16),
}
MADV_NORMAL, MADV_RANDOM = 0, 1
FLAGS = ("-O3", "-march=native", "-std=c++20")


@cache
def library() -> ctypes.CDLL:
    """bare.cpp, compiled for this machine into a folder that is gone once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bare.so"
        source = Path(__file__).with_name("bare.cpp")
        subprocess.run(["g++", *FLAGS, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
        bare = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    bare.bare_map.restype, bare.bare_map.argtypes = pointer, (ctypes.c_int, size, ctypes.c_int, ctypes.c_int)
    bare.bare_unmap.argtypes = (pointer, size)
    bare.bare_run.argtypes = (ctypes.c_int, pointer, ctypes.c_int, pointer, size, size, size, pointer, pointer)
    bare.bare_resident_pages.restype, bare.bare_resident_pages.argtypes = ctypes.c_long, (ctypes.c_int, size)
    return bare


class BareLoop:
    """Reads the windows that begin at `starts` (tokens), in order and again from the first.

    io: "pread" or "mmap". output: a key of OUTPUTS. buffers: batches that its memory holds, filled in turn.
    populate: of mmap: fault every page in before. advice: of madvise.
    """

    def __init__(
        self,
        path: Path,
        starts: np.ndarray,
        shape: tuple[int, int],
        io: str,
        output: str,
        *,
        buffers: int = 1,
        populate: bool = True,
        advice: int = MADV_NORMAL,
    ):
        self.starts = np.ascontiguousarray(starts[: len(starts) // shape[0] * shape[0]], dtype=np.uint64)
        self.shape, self.output, self.at = shape, output, 0
        self.slots = buffers * shape[0]
        inputs, targets = DTYPES[output]
        shared = output in ("views", "raw")
        self.inputs = torch.empty((self.slots, shape[1] + shared), dtype=inputs)
        self.targets = None if shared else torch.empty((self.slots, shape[1]), dtype=targets)
        self.file, self.bytes = os.open(path, os.O_RDONLY), path.stat().st_size
        self.map = library().bare_map(self.file, self.bytes, populate, advice) if io == "mmap" else None
        if io == "mmap" and self.map is None:
            raise OSError(f"cannot map {path}")

    def run(self, batches: int) -> None:
        """Fill `batches` batches, in one call or, at the end of the windows, two."""
        rows = batches * self.shape[0]
        while rows:
            count = min(rows, len(self.starts) - self.at)
            targets = None if self.targets is None else self.targets.data_ptr()
            error = library().bare_run(
                self.file, self.map, OUTPUTS[self.output], self.starts[self.at :].ctypes.data, count,
                self.shape[1], self.slots, self.inputs.data_ptr(), targets,
            )  # fmt: skip
            if error:
                raise OSError(error, os.strerror(error))
            self.at = (self.at + count) % len(self.starts)
            rows -= count

    def batches(self) -> Batches:
        """One batch at a time; for verification, since each call from Python costs microseconds."""
        assert self.slots == self.shape[0], "a loop over several buffers does not say which one it filled last"
        while True:
            self.run(1)
            if self.targets is None:
                yield self.inputs[:, :-1], self.inputs[:, 1:]
            else:
                yield self.inputs, self.targets

    def tokens_per_second(self, seconds: float, chunk: int = 50) -> float:
        """Over about `seconds`, `chunk` batches a call."""
        tokens, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            self.run(chunk)
            tokens += chunk * self.shape[0] * self.shape[1]
        return tokens / passed

    def close(self) -> None:
        if self.map is not None:
            library().bare_unmap(self.map, self.bytes)
        os.close(self.file)

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def resident_pages(path: Path) -> int:
    """Pages of the file that are in the page cache, as mincore says."""
    file = os.open(path, os.O_RDONLY)
    try:
        pages = library().bare_resident_pages(file, path.stat().st_size)
    finally:
        os.close(file)
    if pages < 0:
        raise OSError(f"mincore of {path} failed")
    return pages
