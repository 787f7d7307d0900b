"""One block of one tensor: read, add, round. Buffers are reused; fresh ones would double the time in page faults."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..errors import quoted
from ..store.arrays import NUMPY, rounded, shape_of, working
from .limits import became_zero, finite, in_range
from .plan import Change, Target
from .survival import looked, square
from .workspace import Workspace

ELEMENTS = 1 << 19  # of one sum: what stays in a core's cache in float32, and is long enough for a matrix product
SAMPLE = 16  # one sum in so many is looked at for what rounding left of the update

Observe = Callable[[int, np.ndarray, np.ndarray], None]  # (first element, before, after but not rounded)
Apply = Callable[[np.ndarray, int, int], None]  # changes rows start:stop of a target, given as (rows, columns)


class Tensor:
    """One output tensor, ready to be computed by blocks. Its factors are read when first needed."""

    def __init__(self, target: Target, sample: int = SAMPLE, allow_nonfinite: bool = False):
        self.target, self.sample, self.allow_nonfinite = target, sample, allow_nonfinite
        self.observe: Observe | None = None
        self.sum = working(target.dtype)
        self._steps: list[tuple[Change, Apply]] | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.target.nbytes

    @property
    def steps(self) -> list[tuple[Change, Apply]]:
        with self._lock:
            if self._steps is None:
                self._steps = [(c, _step(c, self.sum)) for c in self.target.changes]
            return self._steps

    @cached_property
    def is_thin(self) -> bool:
        """Whether the norm of the update can be had from the factors."""
        return self.target.is_thin

    def forget(self) -> None:
        """Drop the factors that were read."""
        self._steps = None

    def fill(self, out: memoryview, start: int, space: Workspace) -> None:
        """The bytes of the tensor from `start` on, as many as `out` holds."""
        t = self.target
        if t.copied:
            space.take(t.source, out, start)
            if start % (self.sample * ELEMENTS) < len(out):
                self._sound(out, start, space)
            return
        size = NUMPY[t.dtype].itemsize
        first, last = start // size, -(-(start + len(out)) // size)
        whole = first * size == start and last * size == start + len(out)
        flat = np.frombuffer(out, "u1")
        into = flat.view(NUMPY[t.dtype]) if whole else np.empty(last - first, NUMPY[t.dtype])
        for at in range(first, last, ELEMENTS):
            self._block(at, min(at + ELEMENTS, last), into[at - first :], space)
        if not whole:
            flat[:] = into.view("u1")[start - first * size :][: len(out)]

    def _sound(self, copied: memoryview, start: int, space: Workspace) -> None:
        """Warn when bytes that are only copied are NaN or infinite: the base is damaged, and stays as it is."""
        if not finite(copied, self.target.dtype, start):
            space.warnings[f"{quoted(self.target.name)}: the base holds NaN or infinite values; they stay"] = None

    def _block(self, first: int, last: int, into: np.ndarray, space: Workspace) -> None:
        """Elements first:last, rounded, into the start of `into`."""
        t, columns = self.target, max(self.target.view[1], 1)
        top, bottom = first // columns, -(-last // columns)
        W = space.array("sum", (bottom - top) * columns, self.sum)
        self._base(W, top * columns, space)
        matrix = W.reshape(bottom - top, columns)
        looked_at = bool(t.changes) and (first // ELEMENTS) % self.sample == 0
        before = W.copy() if looked_at else None
        alone = self._change(matrix, top, bottom, space, looked_at)
        piece = W[first - top * columns : last - top * columns]
        out = rounded(piece, t.dtype, into[: last - first])
        self._finite(piece, first, space)
        became_zero(t, piece, out, space)
        if looked_at:
            part = slice(first - top * columns, last - top * columns)
            self._look(first, before[part], piece, out, alone, space)
            if self.observe:
                self.observe(first, before[part], piece)

    def _base(self, W: np.ndarray, first: int, space: Workspace) -> None:
        source = self.target.source
        if self.target.appended:
            there = min(max(math.prod(shape_of(source)) - first, 0), len(W))
            W[there:] = 0
            W = W[:there]
        if isinstance(source, np.ndarray):
            np.copyto(W, source.reshape(-1)[first : first + len(W)], casting="unsafe")
            return
        raw = space.array("raw", len(W), NUMPY[source.dtype])
        space.take(source, memoryview(raw.view("u1")), first * raw.itemsize)
        np.copyto(W, raw, casting="unsafe")

    def _change(self, matrix: np.ndarray, top: int, bottom: int, space: Workspace, looked_at: bool) -> dict[int, float]:
        """Apply every change; when it is looked at, |D_k|^2 of each adapter if there are several."""
        several = looked_at and len({c.adapter for c, _ in self.steps}) > 1  # else it is the whole update
        alone: dict[int, float] = {}
        for change, apply in self.steps:
            start, stop = max(top, change.rows[0]), min(bottom, change.rows[1])
            if start >= stop:
                continue
            rows = matrix[start - top : stop - top]
            old = rows.copy() if several else None
            apply(rows, start - change.rows[0], space)
            if old is not None:
                alone[change.adapter] = alone.get(change.adapter, 0.0) + square(rows - old)
        return alone

    def _look(
        self,
        first: int,
        before: np.ndarray,
        exact: np.ndarray,
        stored: np.ndarray,
        alone: dict[int, float],
        space: Workspace,
    ) -> None:
        look = looked(self.target, first, before, exact, stored, alone)
        space.looks.append(replace(look, numbers=0) if self.is_thin else look)

    def _finite(self, values: np.ndarray, first: int, space: Workspace) -> None:
        """Nothing becomes NaN or infinite that was not so in the base."""

        def base() -> np.ndarray:
            found = np.empty_like(values)
            self._base(found, first, space)
            return found

        in_range(self.target, values, base, self.allow_nonfinite, space)


def _step(change: Change, dtype: np.dtype) -> Apply:
    """The function that applies one change to rows of the sum, in place."""
    thin = change.thin(dtype)
    if thin is not None:
        L, R = thin

        def add(rows: np.ndarray, at: int, space: Workspace) -> None:
            update = space.array("update", rows.size, dtype).reshape(rows.shape)
            np.matmul(L[at : at + len(rows)], R, out=update)
            np.add(rows, update, out=rows)

        return add
    p = change.loaded(dtype)
    shape = change.shape

    def become(rows: np.ndarray, at: int, space: Workspace) -> None:
        mine = change.tuner.rows(p, at, at + len(rows))
        W = rows.reshape(len(rows), *shape[1:])
        blend(rows, change.tuner.weight(W.copy(), mine).reshape(rows.shape), change.weight)

    return become


def blend(rows: np.ndarray, changed: np.ndarray, weight: float) -> None:
    """rows + weight (changed - rows), exact for weight 1."""
    rows[:] = changed if weight == 1 else rows + rows.dtype.type(weight) * (changed - rows)
