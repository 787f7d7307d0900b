"""A plan: every tensor of the output, where its bytes come from, and what changes them. Made from headers alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Mismatch, quoted
from ..store.arrays import FLOATS, load, shape_of
from ..store.checkpoint import Checkpoint, Stamps
from ..store.entry import BITS, Entry
from ..tuners.base import Tuner


@dataclass
class Change:
    """What one adapter does to some rows of one stored tensor.

    rows: which rows of the tensor's matrix.         shape: of the weight that the tuner sees there.
    weight: how much of the update is taken.         adapter: whose it is, by position.
    expert, experts: which pair of a packed stack.   part: rows of the tuner's weight that lie here.
    turned: the disk holds the transpose.            order: disk row i is row order[i] of the tuner's weight.
    """

    tuner: Tuner
    params: dict[str, Any]
    weight: float
    adapter: int
    rows: tuple[int, int]
    shape: tuple[int, ...]
    what: str = "weight"
    expert: int | None = None
    experts: int = 1
    part: tuple[int, int] | None = None
    turned: bool = False
    order: tuple[int, ...] | None = None

    def loaded(self, dtype: np.dtype) -> dict[str, np.ndarray]:
        """The params, read, in the precision of the sum."""
        p = {k: load(v, None if k == "index" else dtype) for k, v in self.params.items()}
        return self.tuner.one(p, self.expert, self.experts) if self.expert is not None else p

    def thin(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray] | None:
        """(L, R) with update = L R in the orientation of the disk, scale and weight included; None when it is not thin."""
        if self.what != "weight" or not self.is_thin:
            return None
        L, R, scale = self.tuner.factors(self.loaded(dtype))
        L = L[self.part[0] : self.part[1]] if self.part else L
        L, R = (R.T, L.T) if self.turned else (L, R)
        L = L[list(self.order)] if self.order is not None else L
        return np.ascontiguousarray(L * dtype.type(scale * self.weight)), np.ascontiguousarray(R)

    @property
    def is_thin(self) -> bool:
        """Whether the tuner adds L R to the stored matrix."""
        return type(self.tuner).factors is not Tuner.factors and self.tuner.factors(self._ghost) is not None

    @property
    def by_rows(self) -> bool:
        """Whether rows of the result can be computed from the same rows of the stored weight."""
        if self.what != "weight":
            return False
        sliced = self.turned or self.order is not None or self.part is not None
        return self.is_thin or not (sliced or self.tuner.arrays != "any" or self.tuner.rows(self._ghost, 0, 0) is None)

    @property
    def _ghost(self) -> dict[str, np.ndarray]:
        """Params of the right shapes that take no memory, to ask the tuner what it can do."""
        p = {
            k: np.broadcast_to(np.zeros((), "i8" if k == "index" else "f4"), shape_of(v))
            for k, v in self.params.items()
        }
        return self.tuner.one(p, self.expert, self.experts) if self.expert is not None else p


@dataclass
class Target:
    """One tensor of the output.

    source: the entry, or array, that it starts from.     shape, dtype: as written.
    view: (rows, columns) of the matrix that changes and blocks are counted in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Entry | np.ndarray
    view: tuple[int, int]
    changes: list[Change] = field(default_factory=list)
    replaced: bool = False  # the source is an adapter's

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def copied(self) -> bool:
        """Whether its bytes are the source's bytes."""
        return (
            not self.changes
            and isinstance(self.source, Entry)
            and self.source.plain
            and self.source.dtype == self.dtype
        )

    @property
    def appended(self) -> int:
        """Rows that the source does not have; they begin as zeros."""
        return self.shape[0] - shape_of(self.source)[0] if self.shape else 0

    @property
    def is_thin(self) -> bool:
        """Whether all that changes it are thin products."""
        return bool(self.changes) and all(c.what == "weight" and c.is_thin for c in self.changes)

    @property
    def whole(self) -> bool:
        """Whether it must be computed at once, not in blocks of rows."""
        ready = isinstance(self.source, np.ndarray) or self.source.plain
        return not ready or not all(c.by_rows for c in self.changes)


@dataclass
class Plan:
    """What a merge writes.

    files: output file name -> its tensors, in order.   config: config.json as it will be, None when it stays.
    extras: (file, name) copied beside the weights.     texts: name -> content of files that a soft prompt changed.
    """

    checkpoint: Checkpoint
    files: dict[str, list[Target]]
    config: dict[str, Any] | None
    extras: list[tuple[Path, str]]
    adapters: list[Path] = field(default_factory=list)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)  # of each output file
    texts: dict[str, bytes] = field(default_factory=dict)
    virtual: range = range(0)  # ids of the rows that a soft prompt became
    stamps: Stamps = field(default_factory=dict)  # of every input, as it was when it was planned
    options: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # further names of tensors, which PyTorch files can hold

    @property
    def targets(self) -> list[Target]:
        return [t for targets in self.files.values() for t in targets]

    @property
    def changed(self) -> list[Target]:
        return [t for t in self.targets if t.changes or t.replaced]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.targets)

    @property
    def need(self) -> int:
        """Bytes of disk while it is written: the output, and one file's tensors that are computed at once."""
        scratch = (sum(t.nbytes for t in targets if t.whole) for targets in self.files.values())
        return self.nbytes + max(scratch, default=0) + self._beside

    @property
    def _beside(self) -> int:
        return sum(f.stat().st_size for f, _ in self.extras) + sum(map(len, self.texts.values()))

    def fingerprint(self) -> str:
        """A hash of everything the output's bytes depend on: names and headers, sizes and times of inputs, options."""
        h = hashlib.sha256(version("adaptkit").encode())
        for path in [*self.checkpoint.files, *(f for f, _ in self.extras), *self.adapter_files]:
            s = path.stat()
            h.update(os.fsencode(path.resolve()) + f"\0{s.st_size}\0{s.st_mtime_ns}\0".encode())
        for name, targets in self.files.items():
            h.update(f"{name}\0{self.metadata.get(name)}\0".encode())
            for t in targets:
                h.update(f"{t.name}\0{t.dtype}\0{t.shape}\0{_source(t)}\0{[_summary(c) for c in t.changes]}\0".encode())
        for name, raw in self.texts.items():
            h.update(f"{name}\0{hashlib.sha256(raw).hexdigest()}\0".encode())
        h.update(json.dumps([self.config, self.options, self.aliases], sort_keys=True, default=str).encode())
        return h.hexdigest()

    @property
    def adapter_files(self) -> list[Path]:
        """The files that the changes are read from."""
        found = {}
        for t in self.targets:
            values = [t.source] if t.replaced else []
            for c in t.changes:
                values += c.params.values()
            found |= {v.file: None for v in values if isinstance(v, Entry)}
        return list(found)


def _source(t: Target) -> str:
    return (
        f"{t.source.file.name}@{t.source.offset}{t.source.parts or ''}"
        if isinstance(t.source, Entry)
        else hashlib.sha256(t.source.tobytes()).hexdigest()
    )


def _summary(c: Change) -> tuple:
    numbers = [(k, _from(v)) for k, v in c.params.items()]
    where = c.rows, c.what, c.expert, c.experts, c.part, c.turned, c.order
    return repr(c.tuner), c.weight, c.adapter, where, numbers


def _from(value: Any) -> tuple:
    if isinstance(value, Entry):
        return value.file.name, value.dtype, value.offset, value.strides
    return (hashlib.sha256(load(value).tobytes()).hexdigest(),)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """How a tensor is counted in rows: (out, in), or (out, in * k...) for a kernel."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def target(name: str, source: Entry | np.ndarray, dtype: str | None, replaced: bool = False) -> Target:
    """An output tensor that starts as its source, in `dtype` when both are floats that can be converted."""
    shape = shape_of(source)
    stored = source.dtype if isinstance(source, Entry) else "F32"
    wanted = dtype if dtype and stored in FLOATS else stored
    # without changes there are no rows to keep together, and one row may be very long
    return Target(name, wanted, shape, source, (math.prod(shape), 1), replaced=replaced)


def addable(t: Target) -> None:
    """Raises Mismatch when a tensor's dtype cannot be added to."""
    if t.dtype not in FLOATS:
        raise Mismatch(
            f"{quoted(t.name)} is stored as {t.dtype}, which no update can be added to",
            hint="merge into the 16-bit model it was made from",
        )
