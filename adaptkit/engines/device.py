"""The same block on a torch device: copied there as it is stored, summed in the same precision, rounded there, copied back.

Each thread has its own stream and pinned buffers, so that one thread's copies run during another's sums. Products are
full float32 (no TF32). The last bit of a sum may differ from the CPU's, where the order of a product's sums differs.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np

from ..errors import Usage
from ..store.arrays import NUMPY, WORDS
from .blocks import ELEMENTS, Tensor
from .limits import LIMITS
from .plan import Change, Target
from .workspace import Workspace

BITS = {2: "int16", 4: "int32", 8: "int64"}  # NumPy has no bfloat16 that torch would take


def checked(device: str) -> Any | None:
    """The torch device to compute on, None for NumPy on the CPU. Raises Usage when there is none.

    "auto" is the CPU: merging is as fast as the disk there, and torch need not be imported.
    """
    if device in ("auto", "cpu"):
        return None
    if device != "cuda":
        raise Usage(f"{device!r} is not one of auto, cpu, cuda", where="--device")
    import torch

    if not torch.cuda.is_available():
        raise Usage("no CUDA device was found by torch", where="--device", hint="use --device cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


class DeviceTensor(Tensor):
    """A tensor whose thin changes are added on a torch device; what is not thin goes the usual way."""

    def __init__(self, target: Target, device: Any, **options: Any):
        super().__init__(target, **options)
        self.device = device
        self._factors: list[tuple[Change, Any, Any]] | None = None
        self._once = threading.Lock()

    def _block(self, first: int, last: int, into: np.ndarray, space: Workspace) -> None:
        t = self.target
        if isinstance(t.source, np.ndarray) or t.source.dtype not in LIMITS or not all(c.is_thin for c in t.changes):
            return super()._block(first, last, into, space)
        columns = max(t.view[1], 1)
        top, bottom = first // columns, -(-last // columns)
        raw = pinned(space, "raw", (bottom - top) * columns, NUMPY[t.source.dtype], self.device)
        space.take(t.source, memoryview(raw.view("u1")), top * columns * raw.itemsize)
        part = slice(first - top * columns, last - top * columns)
        with stream(space, self.device):
            before = self._up(raw, t.source.dtype)
            W = self._changed(before.clone() if self._looks(first) else before, top, columns)
            out = W[part].to(_torch(t.dtype))
            sound = self._in_range(W[part])
            np.copyto(into[: last - first].view(BITS[into.itemsize]), self._down(out, space))
        if not sound:
            exact = W[part].cpu().numpy()
            self._finite(exact, first, space)
        if self._looks(first):
            exact = W[part].cpu().numpy()
            self._look(first, before[part].cpu().numpy(), exact, into[: last - first], {}, space)
        return None

    def _looks(self, first: int) -> bool:
        return bool(self.target.changes) and (first // ELEMENTS) % self.sample == 0

    def _up(self, raw: np.ndarray, dtype: str) -> Any:
        import torch

        bits = torch.from_numpy(raw.view(BITS[raw.itemsize])).to(self.device, non_blocking=True)
        return bits.view(_torch(dtype)).to(torch.float64 if self.sum.itemsize == 8 else torch.float32)

    def _changed(self, W: Any, top: int, columns: int) -> Any:
        matrix = W.view(-1, columns)
        for change, L, R in self.factors:
            start, stop = max(top, change.rows[0]), min(top + len(matrix), change.rows[1])
            if start < stop:
                matrix[start - top : stop - top].addmm_(L[start - change.rows[0] : stop - change.rows[0]], R)
        return W

    @property
    def factors(self) -> list[tuple[Change, Any, Any]]:
        """(change, L, R) on the device, read once."""
        import torch

        with self._once:
            if self._factors is None:
                thin = [(c, *c.thin(self.sum)) for c in self.target.changes]
                self._factors = [(c, *(torch.from_numpy(x).to(self.device) for x in lr)) for c, *lr in thin]
            return self._factors

    def _in_range(self, values: Any) -> bool:
        low, high = values.aminmax() if values.numel() else (values.new_zeros(()), values.new_zeros(()))
        limit = LIMITS[self.target.dtype]
        return bool((-limit < low) & (high < limit))

    def _down(self, out: Any, space: Workspace) -> np.ndarray:
        import torch

        host = pinned(space, "out", out.numel(), NUMPY[self.target.dtype], self.device).view(BITS[out.element_size()])
        torch.from_numpy(host).copy_(out.view(getattr(torch, BITS[out.element_size()])), non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return host


def pinned(space: Workspace, role: str, size: int, dtype: np.dtype, device: Any) -> np.ndarray:
    """A reused buffer that the device can copy from and to without another copy."""
    if device.type != "cuda":
        return space.array(role, size, dtype)
    import torch

    nbytes = size * dtype.itemsize
    held = space.device.get(role)
    if held is None or held.numel() < nbytes:
        held = space.device[role] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return held.numpy()[:nbytes].view(dtype)


def stream(space: Workspace, device: Any) -> contextlib.AbstractContextManager:
    """The calling thread's own stream."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    import torch

    if "stream" not in space.device:
        space.device["stream"] = torch.cuda.Stream()
    return torch.cuda.stream(space.device["stream"])


def _torch(dtype: str) -> Any:
    import torch

    return getattr(torch, {v: k for k, v in WORDS.items()}[dtype])
