"""A tensor in pieces: bytes start:stop of the whole, gathered from the rectangles that hold them.

Seen as a matrix with rows of `width` elements, each part is a rectangle. Equal shares of a flat tensor are rectangles
of one row; rows dealt out to machines are rectangles of full width; split columns are the general case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from .entry import Part

Read = Callable[[Path, memoryview, int], None]  # fills a buffer from a file, from an offset on


def fill(parts: Iterable[Part], size: int, out: memoryview, start: int, read: Read) -> None:
    """Bytes of the tensor from `start` on, as many as `out` holds. size: bytes of one element."""
    for part in parts:
        (top, bottom), (left, right), width = part.rows, (n * size for n in part.columns), part.width * size
        first, last = top * width + left, (bottom - 1) * width + right
        if last <= start or first >= start + len(out):
            continue
        if bottom - top == 1 or right - left == width:
            begin, end = max(first, start), min(last, start + len(out))
            read(part.file, out[begin - start : end - start], part.offset + begin - first)
        else:
            _rows(part, left, right, width, out, start, read)


def _rows(part: Part, left: int, right: int, width: int, out: memoryview, start: int, read: Read) -> None:
    """The columns left:right, in bytes, of those rows that lie in `out`, whole or cut off at its ends."""
    run, stop = right - left, start + len(out)
    top = max(part.rows[0], (start - right) // width + 1)
    bottom = min(part.rows[1], -(-(stop - left) // width))
    if top >= bottom:
        return
    held = np.empty((bottom - top, run), "u1")
    read(part.file, memoryview(held.reshape(-1)), part.offset + (top - part.rows[0]) * run)
    flat = np.frombuffer(out, "u1")
    for row in (top, bottom - 1):
        _cut(held[row - top], row * width + left - start, flat)
    inner = held[1:-1]
    if len(inner):
        at = (top + 1) * width + left - start
        view = np.lib.stride_tricks.as_strided(flat[at:], inner.shape, (width, 1))
        view[:] = inner


def _cut(row: np.ndarray, at: int, flat: np.ndarray) -> None:
    """Copy what of a row lies in `flat`, where it would begin at `at`."""
    begin, end = max(at, 0), min(at + len(row), len(flat))
    if begin < end:
        flat[begin:end] = row[begin - at : end - at]
