"""D = W' - W of two stored tensors, in float32, read by blocks of rows; and whether they are the same."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..store.arrays import NUMPY, load, read_into, rounded
from ..store.entry import BITS, Entry
from .plan import matrix

BLOCK = 1 << 22  # elements read at once


def difference(new: Entry, old: Entry) -> np.ndarray | None:
    """new - old as a matrix, float32; None when they are the same."""
    D = np.empty(math.prod(new.shape), "f4")
    wide = np.dtype("f8") if "F64" in (new.dtype, old.dtype) else np.dtype("f4")
    spare = np.empty(min(BLOCK, D.size), wide)
    same = True
    for at, a, b in _blocks(new, old):
        part, other = D[at : at + a.size], spare[: a.size]
        same = same and _equal(a, b, new.dtype, old.dtype)
        if wide == D.dtype:
            widen(a, new.dtype, part)
            widen(b, old.dtype, other)
            with np.errstate(invalid="ignore", over="ignore"):
                np.subtract(part, other, out=part)
        else:
            part[:] = a.astype("f8") - b.astype("f8")
    return None if same else D.reshape(matrix(new.shape))


def same(new: Entry, old: Entry) -> bool:
    """Whether two tensors are equal; in the fine-tuned one's precision, where that is the smaller."""
    if new.shape != old.shape:
        return False
    return all(_equal(a, b, new.dtype, old.dtype) for _, a, b in _blocks(new, old))


def _equal(a: np.ndarray, b: np.ndarray, new: str, old: str) -> bool:
    if new == old:
        return bool(np.array_equal(a.view("u1"), b.view("u1"))) or bool(np.array_equal(a, b))
    if BITS[new] < BITS[old]:
        return bool(np.array_equal(a, rounded(b, new)))
    return bool(np.array_equal(a.astype("f8"), b.astype("f8")))


def widen(values: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Stored numbers as float32. A bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        np.left_shift(values.view("<u2"), np.uint32(16), out=out.view("<u4"))
    else:
        np.copyto(out, values, casting="unsafe")


def _blocks(new: Entry, old: Entry) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first element, new, old), as stored."""
    if not (new.plain and old.plain):
        a, b = load(new).reshape(-1), load(old).reshape(-1)
        yield 0, np.ascontiguousarray(a), np.ascontiguousarray(b)
        return
    size = math.prod(new.shape)
    with _File(new) as one, _File(old) as other:
        for at in range(0, size, BLOCK):
            yield at, one.read(at, min(BLOCK, size - at)), other.read(at, min(BLOCK, size - at))


class _File:
    """One tensor's file, read by pread into a buffer that is used again."""

    def __init__(self, entry: Entry):
        self.entry, self.dtype = entry, NUMPY[entry.dtype]
        self.buffer = np.empty(min(BLOCK, math.prod(entry.shape)), self.dtype)

    def __enter__(self) -> _File:
        self.fd = os.open(self.entry.file, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.fd)

    def read(self, at: int, count: int) -> np.ndarray:
        values = self.buffer[:count]
        raw = memoryview(values.view("u1"))
        read_into(self.fd, raw, self.entry.offset + at * self.dtype.itemsize, self.entry.file.name)
        return values
