"""The local engine: threads that each fill one aligned block at a time and write it past the page cache.

The blocks lie on a fixed grid of the output file, and each is computed by one thread with one BLAS thread, so the
bytes do not depend on the number of workers. NumPy lets go of the interpreter's lock in copies, sums and products.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Corrupt, quoted
from ..store.arrays import rounded
from ..store.crc import combined
from ..store.disk import DIRECT, fd_is_direct, write_all
from ..store.entry import Entry
from ..store.output import Output
from ..store.safepaths import read_small
from ..store.safetensors import header
from ..store.torchzip import Layout, laid_out
from . import layout
from .blocks import Tensor
from .limits import LIMITS, became_zero, in_range
from .plan import Plan, Target
from .survival import Survival, looked
from .whole import started, whole
from .workspace import Workspace

BLOCK = 4 << 20  # bytes written at once
SEGMENT = 8 * BLOCK  # bytes one thread takes at once
PAGE = 4096
Progress = Callable[[int], None]


class Text:
    """Bytes of a file that are known before its numbers: headers."""

    def __init__(self, raw: bytes):
        self.raw, self.nbytes = raw, len(raw)

    def fill(self, out: memoryview, start: int, space: Workspace) -> None:
        out[:] = self.raw[start : start + len(out)]


@dataclass
class Shard:
    """One output file: its pieces one after the other, headers and tensors, and where each begins.

    zipped: the layout of a PyTorch file, which gets its checksums when it is filled.
    sums: by tensor name (start, bytes, CRC-32) of what was written, where somebody wants to know.
    """

    name: str
    pieces: list[Text | Tensor]
    starts: list[int]
    size: int
    zipped: Layout | None = None
    sums: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [p for p in self.pieces if isinstance(p, Tensor)]

    def summed(self, tensor: Tensor) -> bool:
        """Whether the checksum of a tensor's bytes is wanted: to write it, or because its source tells one."""
        t = tensor.target
        return self.zipped is not None or (t.copied and t.source.crc != 0)


def shard(
    name: str,
    targets: list[Target],
    metadata: dict[str, str],
    device: Any = None,
    aliases: Mapping[str, str] | None = None,
    head: bytes | None = None,
    **options: Any,
) -> Shard:
    """The layout of one file, and how its tensors are computed.

    aliases: further names of tensors, in PyTorch files.    head: of a safetensors file, made here when left out.
    """
    tensors = [_computed(t, device, **options) for t in targets]
    described = [(t.name, t.dtype, t.shape, t.nbytes) for t in targets]
    if not name.endswith(".safetensors"):
        mine = {alias: kept for alias, kept in (aliases or {}).items() if kept in {t.name for t in targets}}
        form = laid_out(described, mine, Path(name).name.rpartition(".")[0])
        pieces = [*zip(form.tensors, tensors, strict=True), *((at, Text(raw)) for at, raw in form.texts)]
        pieces.sort(
            key=lambda piece: (piece[0], piece[1].nbytes)
        )  # a tensor without numbers begins where a header does
        return Shard(name, [p for _, p in pieces], [at for at, _ in pieces], form.size, form)
    pieces = [Text(head or header(described, metadata)), *tensors]
    starts = [0, *accumulate(p.nbytes for p in pieces)]
    return Shard(name, pieces, starts[:-1], starts[-1])


def _computed(target: Target, device: Any, **options: Any) -> Tensor:
    if device is None:
        return Tensor(target, **options)
    from .device import DeviceTensor

    return DeviceTensor(target, device, **options)


def default_workers() -> int:
    """Two for each core: while one waits for the disk, the other computes."""
    return min(2 * (os.cpu_count() or 1), 16)


class Local:
    """Runs a plan on this machine's cores."""

    def __init__(
        self,
        workers: int | None = None,
        progress: Progress | None = None,
        allow_nonfinite: bool = False,
        device: Any = None,
    ):
        self.workers = workers or default_workers()
        self.progress = progress or (lambda n: None)
        self.allow_nonfinite, self.device = allow_nonfinite, device
        self._threads = threading.local()
        self._spaces: list[Workspace] = []
        self.survival = Survival()
        self.flushed: dict[str, int] = {}  # numbers that became zero in another dtype, by tensor
        self._stopping = threading.Event()
        self.warnings: dict[str, None] = {}

    def write(self, plan: Plan, out: Output) -> None:
        """Write every file of the plan that is not finished yet."""
        spill = _Spill(out.partial, self.device, self.allow_nonfinite)
        self._spaces.append(spill.space)
        with single_threaded_blas(), ThreadPoolExecutor(self.workers) as pool:
            try:
                for name, targets in plan.files.items():
                    if record := out.done(name):
                        self.progress(sum(t.nbytes for t in targets))
                        self.survival.add(Survival(**record.get("rounding", {})))
                        self.flushed |= record.get("flushed", {})
                        continue
                    said = plan.metadata.get(name, {"format": "pt"})
                    same = layout.same_file(plan.checkpoint, targets, said)
                    head = read_small(same, min(t.source.offset for t in targets)) if same else None
                    ready = [spill.ready(t) for t in targets]
                    options = {"aliases": plan.aliases, "head": head, "allow_nonfinite": self.allow_nonfinite}
                    self._file(shard(name, ready, said, self.device, **options), out, pool)
                    spill.rewind()
            finally:
                spill.close()
                pool.shutdown(cancel_futures=True)
                for space in self._spaces:
                    space.close()

    def _file(self, s: Shard, out: Output, pool: ThreadPoolExecutor) -> None:
        with out.file(s.name, s.size, direct=True) as fd:
            jobs = [pool.submit(self._segment, s, fd, at) for at in range(0, s.size, SEGMENT)]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self._stopping.set()
                for job in jobs:
                    job.cancel()
                wait(jobs)  # nobody may write through a descriptor that is closed
                raise
            os.ftruncate(fd, s.size)
            _sealed(s, fd)
            found, flushed = self._noticed()
            out.record(s.name, rounding=asdict(found), flushed=flushed)
        self.survival.add(found)
        self.flushed |= flushed

    def _segment(self, s: Shard, fd: int, start: int) -> None:
        hand, direct = self._hand(), fd_is_direct(fd)
        for at in range(start, min(start + SEGMENT, s.size), BLOCK):
            if self._stopping.is_set():
                return
            length = min(BLOCK, s.size - at)
            fill(s, hand.block[:length], at, hand.space)
            padded = -(-length // PAGE) * PAGE if direct else length
            write_all(fd, hand.block[:padded], at)
            self.progress(length)

    def _hand(self) -> _Hand:
        """What the calling thread works with."""
        if not hasattr(self._threads, "hand"):
            self._threads.hand = _Hand()
            self._spaces.append(self._threads.hand.space)
        return self._threads.hand

    def _noticed(self) -> tuple[Survival, dict[str, int]]:
        """Put together what the threads noticed since they were last asked."""
        looks, flushed = [], Counter()
        for space in self._spaces:
            looks += space.looks
            flushed += space.flushed
            self.warnings |= space.warnings
            space.looks, space.flushed = [], Counter()
        return Survival.of(looks), dict(sorted(flushed.items()))


class _Hand:
    """One thread's block, on a page as O_DIRECT wants it, and its workspace."""

    def __init__(self) -> None:
        self.block = memoryview(mmap.mmap(-1, BLOCK))
        self.space = Workspace()


def fill(s: Shard, out: memoryview, at: int, space: Workspace) -> None:
    """Bytes of a file from `at` on, as many as `out` holds."""
    done = 0
    i = bisect_right(s.starts, at) - 1
    while done < len(out):
        piece, start = s.pieces[i], s.starts[i]
        n = min(len(out) - done, start + piece.nbytes - at - done)
        if n > 0:
            made = out[done : done + n]
            piece.fill(made, at + done - start, space)
            if isinstance(piece, Tensor) and s.summed(piece):
                s.sums.setdefault(piece.target.name, []).append((at + done - start, n, zlib.crc32(made)))
            done += n
        i += 1


def _sealed(s: Shard, fd: int) -> None:
    """Compare the checksums of what was copied with those of its source, and write those of a PyTorch file.

    Raises Corrupt when the source is damaged: the file is not finished then.
    """
    sums = []
    for tensor in s.tensors:
        crc, length = combined(s.sums.get(tensor.target.name, ()))
        sums.append(crc)
        source = tensor.target.source
        if tensor.target.copied and source.crc and (crc, length) != (source.crc, source.nbytes):
            raise Corrupt(
                f"{quoted(source.name)} is damaged (CRC {crc:08x}, {source.crc:08x} expected)",
                where=source.file.name,
                hint="fetch it again",
            )
    if s.zipped is None:
        return
    if DIRECT and fd_is_direct(fd):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~DIRECT)
    for at, raw in s.zipped.patches(sums):
        write_all(fd, raw, at)


class _Spill:
    """Tensors that must be computed at once are written to a scratch file, and then copied like any other."""

    def __init__(self, folder: Path, device: Any = None, allow_nonfinite: bool = False):
        self.path, self.device, self.fd, self.size = folder / ".computed", device, None, 0
        self.allow_nonfinite, self.space = allow_nonfinite, Workspace()

    def ready(self, target: Target) -> Target:
        if not target.whole:
            return target
        with single_threaded_blas():
            values = self._computed(target)
        return Target(target.name, target.dtype, target.shape, self._entry(target, values), target.view)

    def _computed(self, target: Target) -> np.ndarray:
        exact = whole(target, self.device)
        if target.dtype not in LIMITS:
            return exact
        stored = rounded(exact, target.dtype)
        in_range(target, exact, lambda: started(target, exact.dtype), self.allow_nonfinite, self.space)
        became_zero(target, exact, stored, self.space)
        if target.changes:
            before = started(target, exact.dtype)
            self.space.looks.append(looked(target, 0, before.reshape(exact.shape), exact, stored, {}))
        return stored

    def _entry(self, target: Target, values: np.ndarray) -> Entry:
        if self.fd is None:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        at, raw = self.size, np.ascontiguousarray(values).reshape(-1).view("u1")
        write_all(self.fd, memoryview(raw), at)
        self.size += -(-raw.size // PAGE) * PAGE
        return Entry(target.name, target.dtype, target.shape, self.path, at, raw.size)

    def rewind(self) -> None:
        """Give the disk back: the file that these tensors were computed for is written."""
        if self.fd is not None:
            os.ftruncate(self.fd, 0)
            self.size = 0

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.path.unlink(missing_ok=True)


def single_threaded_blas():
    """One BLAS thread: our threads are the parallelism, and the order of sums must not depend on the machine."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def expected(plan: Plan, folder: Path, names: set[str] | None = None) -> Iterator[tuple[Target, Tensor]]:
    """Every tensor of a plan, ready to be computed, for those who compare instead of write."""
    spill = _Spill(folder)
    try:
        for target in plan.targets:
            if names is None or target.name in names:
                yield target, Tensor(spill.ready(target), sample=1)
    finally:
        spill.close()
