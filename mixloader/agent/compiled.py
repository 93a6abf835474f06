"""How the agent's inner loops are compiled, and the sums in them that no order of domains can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

FIXED_ONE = float(1 << 44)
"""One, in the fixed point of `fixed` sums: steps of 6e-14, room for sums up to 5e5."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, without the GIL; kept on disk wherever a cache can be written.

    The cache knows of changes to the function's own file only: after a change here, delete `__pycache__`.
    numba refuses `cache=True` when neither the package's folder nor the user's cache folder is writable
    (a read-only install without a home); the function is then compiled once a process.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@compiled
def fixed(value: float) -> int:
    """`value` in fixed point. Integer sums are exact, so they are the same in any order of the domains."""
    return np.int64(np.rint(value * FIXED_ONE))
