"""Numbers that a stored dtype cannot hold: too large, too small, or none."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ..errors import Corrupt, quoted
from ..store.arrays import FLOATS, NUMPY
from .plan import Target
from .workspace import Workspace


def _limit(dtype: str) -> float:
    """The smallest number that rounds to infinity: half a step above the largest finite one."""
    info = ml_dtypes.finfo(NUMPY[dtype])
    return float(info.max) * (1 + float(info.eps) / 4) if dtype != "F64" else float("inf")


INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # the bits of infinity
LIMITS = {dtype: _limit(dtype) for dtype in ("BF16", "F16", "F32", "F64")}


def finite(stored: memoryview, dtype: str, start: int) -> bool:
    """Whether stored numbers are all finite, seen from their bits; True for what are no floats, or no whole ones.

    start: the byte of the tensor at which they begin.
    """
    size = NUMPY[dtype].itemsize if dtype in FLOATS else 0
    if not size or start % size or len(stored) % size:
        return True
    top = INFINITE[dtype]
    bits = np.frombuffer(stored, f"i{size}")
    # as integers, positive floats sort by size, and negative ones sort by size when read without a sign
    return bits.max(initial=0) < top and bits.view(f"u{size}").max(initial=0) < top + (1 << (8 * size - 1))


def in_range(target: Target, values: np.ndarray, base: Callable[[], np.ndarray], allow: bool, space: Workspace) -> None:
    """Raises Corrupt when a number would be stored as NaN or infinite that was neither in the base; warns of those."""
    limit = LIMITS[target.dtype]
    if -limit < values.min(initial=0) and values.max(initial=0) < limit:  # False for NaN as well
        return
    bad = np.isfinite(base()) & ~(np.abs(values) < limit)
    if not bad.any():
        space.warnings[f"{quoted(target.name)}: the base holds NaN or infinite values; they stay"] = None
        return
    if allow:
        space.warnings[f"{quoted(target.name)}: some merged values overflow {target.dtype}; kept as asked"] = None
        return
    sizes = np.abs(values[bad & np.isfinite(values)])
    largest = f" (largest {sizes.max():.2g})" if sizes.size else ""
    what = "merged values" if target.changes else "values"
    raise Corrupt(
        f"{int(bad.sum()):,} {what} overflow {target.dtype}{largest}",
        where=target.name,
        hint="use --dtype bfloat16 or float32",
    )


def became_zero(target: Target, exact: np.ndarray, stored: np.ndarray, space: Workspace) -> None:
    """Count the numbers that are too small for the dtype they are converted to."""
    if target.changes or getattr(target.source, "dtype", target.dtype) == target.dtype:
        return
    if lost := int(np.count_nonzero(exact) - np.count_nonzero(stored)):
        space.flushed[target.name] += lost
