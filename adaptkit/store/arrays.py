"""Entries as NumPy arrays, and the one rounding. bfloat16 and the 8-bit floats are ml_dtypes' NumPy types.

This is the only place that decides in which precision sums are made and how they become a stored dtype:
sums one size up (float32 for 16-bit weights, float64 for float32), then one rounding to nearest even.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import Corrupt, Mismatch, System, quoted
from . import parts
from .entry import BITS, Entry

NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"), "U8": np.dtype("u1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "BOOL": np.dtype("?"), "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz), "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
FLOATS = {"BF16", "F16", "F32", "F64"}  # what can be added to
WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # as people say them


def working(dtype: str) -> np.dtype:
    """The dtype in which a sum that is stored as `dtype` is made."""
    return np.dtype("f8") if dtype in ("F32", "F64") else np.dtype("f4")


def rounded(values: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """`values` in a stored dtype: the one rounding."""
    if out is None:
        return values.astype(NUMPY[dtype])
    with np.errstate(over="ignore"):  # an overflow is found by the caller, who knows which tensor it is
        np.copyto(out, values, casting="unsafe")
    return out


def load(value: Any, dtype: np.dtype | None = None) -> np.ndarray:
    """A param as a NumPy array: an Entry is read, a torch tensor is taken to the CPU."""
    if isinstance(value, Entry):
        array = _read(value)
    elif isinstance(value, np.ndarray):
        array = value
    else:
        value = value.detach().cpu()
        array = (value.float() if value.dtype.is_floating_point and value.dtype.itemsize < 4 else value).numpy()
    return array if dtype is None else array.astype(dtype)


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a param, read or not."""
    return tuple(value.shape)


def dtype_of(value: Any) -> str:
    """The dtype of a param, as safetensors spells it."""
    if isinstance(value, Entry):
        return value.dtype
    return {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}.get(
        str(value.dtype).rpartition(".")[2], "F32"
    )


def read_into(fd: int, buffer: memoryview, offset: int, name: object) -> None:
    """Fill `buffer` from a file. A short read means that the file was cut since its header was read."""
    done = 0
    while done < len(buffer):
        try:
            n = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as e:
            raise System(f"cannot be read ({e.strerror})", where=name) from e
        if not n:
            raise Corrupt("changed while it was read: it is shorter now", where=name)
        done += n


def _read(entry: Entry) -> np.ndarray:
    if entry.dtype not in NUMPY:
        raise Mismatch(
            f"{quoted(entry.name)!r} has dtype {entry.dtype}, which cannot be computed with", where=entry.file.name
        )
    dtype = NUMPY[entry.dtype]
    if entry.strides is None:
        return np.frombuffer(raw_bytes(entry), dtype).reshape(entry.shape)
    flat = np.frombuffer(raw_bytes(entry), dtype)
    view = np.ndarray(entry.shape, dtype, flat, 0, [s * dtype.itemsize for s in entry.strides])
    return np.ascontiguousarray(view)


def raw_bytes(entry: Entry) -> bytearray:
    """The bytes of an entry: of a view that is not contiguous, all those from its first to its last element."""
    if entry.parts is not None:
        return _gathered(entry)
    length = entry.nbytes
    if entry.strides is not None and entry.numel:
        length = (1 + sum((n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True))) * NUMPY[
            entry.dtype
        ].itemsize
    fd = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if entry.packed:
            return bytearray(_inflate(fd, entry)[entry.offset : entry.offset + length])
        buffer = bytearray(length)
        read_into(fd, memoryview(buffer), entry.offset, entry.file.name)
        return buffer
    finally:
        os.close(fd)


def _gathered(entry: Entry) -> bytearray:
    """The bytes of an entry that is in pieces."""
    buffer = bytearray(entry.nbytes)
    parts.fill(entry.parts, BITS[entry.dtype] // 8, memoryview(buffer), 0, read_file)
    return buffer


def read_file(path: Path, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file that is opened for it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_into(fd, buffer, offset, path.name)
    finally:
        os.close(fd)


def _inflate(fd: int, entry: Entry) -> bytes:
    at, packed, size = entry.packed
    raw = bytearray(packed)
    read_into(fd, memoryview(raw), at, entry.file.name)
    try:
        data = zlib.decompressobj(-15).decompress(raw, size)
    except zlib.error as e:
        raise Corrupt(f"{quoted(entry.name)!r} cannot be inflated ({e})", where=entry.file.name) from None
    if len(data) != size:
        raise Corrupt(
            f"{quoted(entry.name)!r} inflates to {len(data):,} bytes, {size:,} expected", where=entry.file.name
        )
    return data
