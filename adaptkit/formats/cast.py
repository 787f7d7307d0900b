"""The numbers of an adapter in another dtype: one rounding, overflow refused, underflow counted."""

from __future__ import annotations

import numpy as np

from ..adapter import Adapter
from ..errors import Corrupt, quoted
from ..store.arrays import FLOATS, NUMPY, WORDS, dtype_of, load, rounded
from .base import Note


def cast(adapter: Adapter, dtype: str) -> list[Note]:
    """Round the numbers of an adapter to a dtype, in place. Raises Corrupt for what overflows."""
    notes = []
    wanted = WORDS[dtype]
    for path, site in adapter.sites.items():
        for letter in [k for k in site.params if k != "index"]:
            site.params[letter], lost = narrowed(site.params[letter], wanted, f"{path}.{letter}")
            notes += [Note("rounded", f"{path}.{letter}", f"{lost:,} numbers became zero in {dtype}")] if lost else []
    for name in adapter.whole:
        if dtype_of(adapter.whole[name]) in FLOATS:
            adapter.whole[name], lost = narrowed(adapter.whole[name], wanted, name)
            notes += [Note("rounded", name, f"{lost:,} numbers became zero in {dtype}")] if lost else []
    return notes


def narrowed(value: object, dtype: str, name: str) -> tuple[np.ndarray, int]:
    """Numbers in a stored dtype, and how many of them became zero. Raises Corrupt for what overflows."""
    exact = load(value)
    if exact.dtype == NUMPY[dtype] or exact.dtype.kind in "iub":
        return exact, 0
    with np.errstate(over="ignore"):
        stored = rounded(exact.astype("f4") if exact.dtype.itemsize < 4 else exact, dtype)
    wide = stored.astype("f4") if stored.dtype.itemsize < 4 else stored
    bad = int((np.isfinite(exact.astype("f8")) & ~np.isfinite(wide)).sum())
    if bad:
        hint = "use --dtype bfloat16 or float32"
        raise Corrupt(f"{bad:,} values overflow {dtype}", where=quoted(name), hint=hint)
    return stored, int(np.count_nonzero(exact) - np.count_nonzero(wide))
