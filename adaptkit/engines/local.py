"""The local engine: threads that each fill one aligned block at a time and write it past the page cache.

The blocks lie on a fixed grid of the output file, and each is computed by one thread with one BLAS thread, so the
bytes do not depend on the number of workers. NumPy lets go of the interpreter's lock in copies, sums and products.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..store.arrays import rounded
from ..store.disk import fd_is_direct, write_all
from ..store.entry import Entry
from ..store.output import Output
from ..store.safetensors import header
from .blocks import LIMITS, Survival, Tensor, Workspace, in_range, looked, started, whole
from .plan import Plan, Target

BLOCK = 4 << 20  # bytes written at once
SEGMENT = 8 * BLOCK  # bytes one thread takes at once
PAGE = 4096
Progress = Callable[[int], None]


@dataclass
class Shard:
    """One output file: its header, and its tensors one after the other."""

    name: str
    head: bytes
    tensors: list[Tensor]
    starts: list[int]  # of each tensor in the file
    size: int


def shard(name: str, targets: list[Target], metadata: dict[str, str], device: Any = None, **options: Any) -> Shard:
    """The layout of one file, and how its tensors are computed."""
    head = header(((t.name, t.dtype, t.shape, t.nbytes) for t in targets), metadata)
    starts, at = [], len(head)
    for t in targets:
        starts.append(at)
        at += t.nbytes
    return Shard(name, head, [_computed(t, device, **options) for t in targets], starts, at)


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
                        continue
                    ready = [spill.ready(t) for t in targets]
                    said = plan.metadata.get(name, {"format": "pt"})
                    self._file(shard(name, ready, said, self.device, allow_nonfinite=self.allow_nonfinite), out, pool)
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
            found = self._noticed()
            out.record(s.name, rounding=asdict(found))
        self.survival.add(found)

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

    def _noticed(self) -> Survival:
        """Put together what the threads noticed since they were last asked."""
        looks = []
        for space in self._spaces:
            looks += space.looks
            self.warnings |= space.warnings
            space.looks = []
        return Survival.of(looks)


class _Hand:
    """One thread's block, on a page as O_DIRECT wants it, and its workspace."""

    def __init__(self) -> None:
        self.block = memoryview(mmap.mmap(-1, BLOCK))
        self.space = Workspace()


def fill(s: Shard, out: memoryview, at: int, space: Workspace) -> None:
    """Bytes of a file from `at` on, as many as `out` holds."""
    done = 0
    if at < len(s.head):
        done = min(len(out), len(s.head) - at)
        out[:done] = s.head[at : at + done]
    i = bisect_right(s.starts, at + done) - 1
    while done < len(out):
        tensor, start = s.tensors[i], s.starts[i]
        n = min(len(out) - done, start + tensor.target.nbytes - at - done)
        if n > 0:
            tensor.fill(out[done : done + n], at + done - start, space)
            done += n
        i += 1


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
