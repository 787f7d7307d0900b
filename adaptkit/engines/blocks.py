"""One block of one tensor: read, add, round. Buffers are reused; fresh ones would double the time in page faults."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import registry
from ..errors import AdaptKitError, Corrupt, System, quoted
from ..store import parts
from ..store.arrays import FLOATS, NUMPY, load, read_into, rounded, shape_of, working
from ..store.entry import BITS, Entry
from .plan import Change, Target

ELEMENTS = 1 << 19  # of one sum: what stays in a core's cache in float32, and is long enough for a matrix product
SAMPLE = 16  # one sum in so many is looked at for what rounding left of the update


@dataclass(frozen=True)
class Look:
    """What rounding to the stored dtype left of the update in one block, in squared norms.

    update: |D|^2      lost: |stored(W + D) - (W + D)|^2      alone: |D_k|^2 of each adapter that acts there
    zero: whether the base is all zero there
    numbers: how many there are, 0 when the norm of the whole update is known without looking
    """

    tensor: str
    first: int
    update: float
    lost: float
    alone: dict[int, float]
    zero: bool
    numbers: int = 0


@dataclass
class Survival:
    """Looks, added up. Plain values, so that a journal can hold them.

    adapters: position -> [|D_k|^2, what rounding lost where it acts].    worst: [tensor, share lost], the largest first.
    tensors: name -> [|D|^2 of what was seen, how many numbers], where the norm is not known from factors.
    """

    update: float = 0.0
    lost: float = 0.0
    adapters: dict[str, list[float]] = field(default_factory=dict)
    worst: list[list] = field(default_factory=list)
    zero: bool = True  # nothing but zeros was seen
    tensors: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Survival:
        """Added up in one order, whichever thread looked first, so that the sums are the same every time."""
        total, by_tensor = cls(), {}
        for look in sorted(looks, key=lambda x: (x.tensor, x.first)):
            total.zero = total.zero and look.zero
            if not math.isfinite(look.update + look.lost):
                continue  # NaN in the base has its own warning
            total._add(look.update, look.lost, {str(k): [v, look.lost] for k, v in look.alone.items()})
            sums = by_tensor.setdefault(look.tensor, [0.0, 0.0])
            sums[0] += look.update
            sums[1] += look.lost
            if look.numbers:
                seen = total.tensors.setdefault(look.tensor, [0.0, 0])
                seen[0] += look.update
                seen[1] += look.numbers
        shares = [[name, share(lost, update)] for name, (update, lost) in by_tensor.items()]
        total.worst = sorted(shares, key=lambda x: (-x[1], x[0]))[:3]
        return total

    def add(self, other: Survival) -> None:
        """Another file's."""
        self._add(other.update, other.lost, other.adapters)
        self.worst = sorted(self.worst + other.worst, key=lambda x: (-x[1], x[0]))[:3]
        self.zero = self.zero and other.zero
        self.tensors |= other.tensors

    def _add(self, update: float, lost: float, adapters: dict[str, list[float]]) -> None:
        self.update += update
        self.lost += lost
        for k, (alone, eaten) in adapters.items():
            before = self.adapters.get(k, [0.0, 0.0])
            self.adapters[k] = [before[0] + alone, before[1] + eaten]


def share(lost: float, update: float) -> float:
    """|error of rounding| / |update| from their squares, between 0 and 1."""
    return min(1.0, (lost / update) ** 0.5) if update else 0.0


class Workspace:
    """The buffers and open files of one thread, and what it has noticed."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffers: dict[str, np.ndarray] = {}
        self.looks: list[Look] = []
        self.flushed: Counter[str] = Counter()
        self.warnings: dict[str, None] = {}
        self.device: dict[str, Any] = {}  # a stream and pinned buffers, where there is a device

    def array(self, role: str, size: int, dtype: np.dtype) -> np.ndarray:
        """A flat array for one role, reused: valid until the role is asked for again."""
        nbytes = size * dtype.itemsize
        if role not in self._buffers or self._buffers[role].nbytes < nbytes:
            self._buffers[role] = np.empty(nbytes, "u1")
        return self._buffers[role][:nbytes].view(dtype)

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from a file that stays open."""
        if path not in self._files:
            if len(self._files) >= 8:  # a model may have more shards than a process may have files
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise System(f"cannot be opened ({e.strerror})", where=path.name) from e
        read_into(self._files[path], buffer, offset, path.name)

    def take(self, entry: Entry, buffer: memoryview, start: int) -> None:
        """Bytes of a plain entry from `start` on."""
        if entry.parts is None:
            self.read(entry.file, buffer, entry.offset + start)
        else:
            parts.fill(entry.parts, BITS[entry.dtype] // 8, buffer, start, self.read)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


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
        dtype = NUMPY.get(self.target.dtype)
        if self.target.dtype not in FLOATS or start % dtype.itemsize or len(copied) % dtype.itemsize:
            return
        top = INFINITE[self.target.dtype]
        bits = np.frombuffer(copied, f"i{dtype.itemsize}")
        # as integers, positive floats sort by size, and negative ones sort by size when read without a sign
        if bits.max(initial=0) >= top or bits.view(f"u{dtype.itemsize}").max(initial=0) >= top + (
            1 << (8 * dtype.itemsize - 1)
        ):
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
                alone[change.adapter] = alone.get(change.adapter, 0.0) + _square(rows - old)
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


def looked(
    target: Target, first: int, before: np.ndarray, exact: np.ndarray, stored: np.ndarray, alone: dict[int, float]
) -> Look:
    """What one block says of rounding. alone: |D_k|^2 by adapter; of a single one it is the whole update's."""
    update, lost = _square(exact - before), _square(stored.astype(exact.dtype) - exact)
    adapters = {c.adapter for c in target.changes}
    alone = {adapters.pop(): update} if len(adapters) == 1 else alone
    return Look(target.name, first, update, lost, alone, not (before.any() or target.appended), exact.size)


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
    finite = np.abs(values[bad & np.isfinite(values)])
    largest = f" (largest {finite.max():.2g})" if finite.size else ""
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


def _limit(dtype: str) -> float:
    """The smallest number that rounds to infinity: half a step above the largest finite one."""
    info = ml_dtypes.finfo(NUMPY[dtype])
    return float(info.max) * (1 + float(info.eps) / 4) if dtype != "F64" else float("inf")


INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # the bits of infinity
LIMITS = {dtype: _limit(dtype) for dtype in ("BF16", "F16", "F32", "F64")}


def _square(a: np.ndarray) -> float:
    flat = a.reshape(-1)
    return float(np.dot(flat, flat))


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
        _blend(rows, change.tuner.weight(W.copy(), mine).reshape(rows.shape), change.weight)

    return become


def _blend(rows: np.ndarray, changed: np.ndarray, weight: float) -> None:
    """rows + weight (changed - rows), exact for weight 1."""
    rows[:] = changed if weight == 1 else rows + rows.dtype.type(weight) * (changed - rows)


def whole(target: Target, device: Any = None) -> np.ndarray:
    """A tensor that cannot be computed by rows, all of it, as a working-precision array of its shape."""
    if not target.changes and isinstance(target.source, Entry) and target.source.dtype == target.dtype:
        return load(target.source)  # only laid out anew: no number may pass through another type
    dtype = working(target.dtype)
    W = started(target, dtype).reshape(target.view).copy()
    for change in target.changes:
        start, stop = change.rows
        part = W[start:stop].reshape(change.shape)
        try:
            with registry.blamed("tuners", change.tuner.name):
                changed = _by(change, device)(part.copy(), change.loaded(dtype))
        except AdaptKitError as e:
            raise e.at(target.name) from None
        _blend(W[start:stop], np.asarray(changed).reshape(stop - start, -1), change.weight)
    return W.reshape(target.shape)


def started(target: Target, dtype: np.dtype) -> np.ndarray:
    """A tensor before its changes: the source, and zeros in the rows that are appended to it."""
    source = load(target.source, dtype)
    if not target.appended:
        return source
    return np.concatenate([source, np.zeros((target.appended, *source.shape[1:]), dtype)])


def _by(change: Change, device: Any) -> Callable:
    """The tuner's function, for NumPy arrays: a tuner that needs torch gets tensors, and its answer is taken back."""
    function = getattr(change.tuner, change.what)
    if device is None and (change.what == "bias" or change.tuner.arrays == "any"):
        return function
    from .device import on_device

    return on_device(function, device or "cpu")
