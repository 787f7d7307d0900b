"""Entry: where one tensor's bytes lie on disk. Made from headers alone; torch is never imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# bits per element of every dtype the safetensors format names
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a tensor that is in pieces, stored row by row in a file.

    rows, columns: (first, end) of the rectangle, in elements, in the tensor read as a matrix with rows of `width`.
    offset: where the rectangle's first element lies in `file`.
    """

    file: Path
    offset: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    width: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    dtype: as safetensors spells it ("BF16").   shape: in elements.
    offset, nbytes: where its bytes lie in `file`, or, when `packed` is set, in the inflated zip member.
    strides: in elements, for a view that is not contiguous (torch pickles only); None means row-major.
    packed: (offset, compressed size, size) of the deflated zip member the bytes are in.
    parts: the pieces of a tensor that training left in several files; `file` and `offset` are the first one's.
    crc: the CRC-32 of exactly these bytes, where the container tells it; 0 where it does not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    packed: tuple[int, int, int] | None = None
    parts: tuple[Part, ...] | None = None
    crc: int = 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """np.asarray(entry) reads it, so that whoever writes a format need not know what an Entry is."""
        from .arrays import load

        return load(self, dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def plain(self) -> bool:
        """True when the bytes can be read from the file as they are."""
        return self.strides is None and self.packed is None
