"""What one thread works with: buffers that are used again, files that stay open, and what it has noticed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import System
from ..store import parts
from ..store.arrays import read_into
from ..store.entry import BITS, Entry
from .survival import Look


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
