"""torch's file format, written: a zip of stored members, data.pkl and one member of bytes for each storage.

Everything but the checksums is known before the first number is: the file is laid out like a safetensors file, filled
block by block, and the checksums are set at the end. The format: torch/csrc/serialization and
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3.7, 4.3.12, 4.5.3). torch is not imported.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import Mismatch, quoted
from .entry import BITS

ALIGN = 64  # of each storage in the file, as torch does it
MASK = 0xFFFFFFFF  # "see the zip64 field"
DAY = 0x21  # 1 January 1980, where DOS begins: the same input gives the same bytes
LOCAL, CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
END64, LOCATOR, END = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI"), struct.Struct("<4s4H2IH")
STORAGES = {
    "F32": "FloatStorage", "F64": "DoubleStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "BOOL": "BoolStorage",
    "U8": "ByteStorage", "I8": "CharStorage", "I16": "ShortStorage", "I32": "IntStorage", "I64": "LongStorage",
    "C64": "ComplexFloatStorage",
}  # fmt: skip
UNTYPED = {  # dtypes younger than typed storages
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
Tensor = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, bytes


@dataclass(frozen=True)
class Member:
    """One member. crc: None for tensors, whose bytes are not known yet.   header, data: where the two begin."""

    name: str
    size: int
    crc: int | None
    header: int
    data: int


@dataclass(frozen=True)
class Layout:
    """A file before its numbers. texts: (offset, bytes) of all that is known.   tensors: where each one's bytes begin."""

    members: list[Member]
    texts: list[tuple[int, bytes]]
    tensors: list[int]
    tail: int
    size: int

    def patches(self, sums: list[int]) -> list[tuple[int, bytes]]:
        """(offset, bytes) of what depends on the tensors' checksums: each header's, and the directory at the end."""
        left = iter(sums)
        known = [m.crc if m.crc is not None else next(left) for m in self.members]
        late = [
            (m.header + 14, struct.pack("<I", c)) for m, c in zip(self.members, known, strict=True) if m.crc is None
        ]
        return [*late, (self.tail, _directory(self.members, known, self.tail))]


def laid_out(tensors: list[Tensor], aliases: Mapping[str, str], home: str) -> Layout:
    """The layout of a state dict. aliases: further names of tensors that it holds.   home: the folder in the zip."""
    import zlib

    fixed = [("data.pkl", state_dict(tensors, aliases)), ("byteorder", b"little")]
    members: list[Member] = []
    texts: list[tuple[int, bytes]] = []
    starts: list[int] = []
    at = 0
    for name, text in [*fixed, *((f"data/{i}", t) for i, t in enumerate(tensors)), ("version", b"3\n")]:
        known = isinstance(text, bytes)
        size, crc = (len(text), zlib.crc32(text)) if known else (text[3], None)
        head = _header(f"{home}/{name}", size, crc or 0, at)
        texts.append((at, head + text if known else head))
        members.append(Member(f"{home}/{name}", size, crc, at, at + len(head)))
        if not known:
            starts.append(at + len(head))
        at += len(head) + size
    tail = len(_directory(members, [0] * len(members), at))
    return Layout(members, [*texts, (at, bytes(tail))], starts, at, at + tail)


def _header(name: str, size: int, crc: int, at: int) -> bytes:
    """The local header, padded so that the data begins on a multiple of ALIGN."""
    raw, wide = name.encode(), size >= MASK
    extra = struct.pack("<2H2Q", 1, 16, size, size) if wide else b""
    pad = -(at + LOCAL.size + len(raw) + len(extra) + 4) % ALIGN
    extra += struct.pack("<2s" + "H", b"FB", pad) + b"Z" * pad
    shown = MASK if wide else size
    return (
        LOCAL.pack(b"PK\3\4", 45 if wide else 20, 0, 0, 0, DAY, crc, shown, shown, len(raw), len(extra)) + raw + extra
    )


def _directory(members: list[Member], sums: list[int], start: int) -> bytes:
    """The central directory and its end, with the zip64 records where a number needs them."""
    listed = b"".join(_listed(m, c) for m, c in zip(members, sums, strict=True))
    n, length = len(members), len(listed)
    wide = n >= 0xFFFF or start >= MASK
    end64 = b""
    if wide:
        end64 = END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, n, n, length, start)
        end64 += LOCATOR.pack(b"PK\6\7", 0, start + length, 1)
    short, at = min(n, 0xFFFF), MASK if wide else start
    return listed + end64 + END.pack(b"PK\5\6", 0, 0, short, short, length, at, 0)


def _listed(m: Member, crc: int) -> bytes:
    raw = m.name.encode()
    numbers = [*([m.size, m.size] if m.size >= MASK else []), *([m.header] if m.header >= MASK else [])]
    extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    version, size, header = 45 if numbers else 20, min(m.size, MASK), min(m.header, MASK)
    facts = (b"PK\1\2", version, version, 0, 0, 0, DAY, crc, size, size, len(raw), len(extra), 0, 0, 0, 0, header)
    return CENTRAL.pack(*facts) + raw + extra


# the pickle


def state_dict(tensors: list[Tensor], aliases: Mapping[str, str]) -> bytes:
    """The pickle of {name: tensor}; names that share a storage share its key. Raises Mismatch for dtypes torch lacks."""
    made = {t[0]: _tensor(str(i), t) for i, t in enumerate(tensors)}
    made |= {name: made[kept] for name, kept in aliases.items()}
    return b"\x80\2}(" + b"".join(_text(name) + value for name, value in made.items()) + b"u."


def _tensor(key: str, tensor: Tensor) -> bytes:
    name, dtype, shape, nbytes = tensor
    if dtype not in STORAGES and dtype not in UNTYPED:
        raise Mismatch(
            f"{quoted(name)!r} has dtype {dtype}, which PyTorch files cannot hold", hint="use --to safetensors"
        )
    typed = dtype in STORAGES
    kind = f"torch\n{STORAGES[dtype]}" if typed else "torch.storage\nUntypedStorage"
    numel = nbytes * 8 // BITS[dtype] if typed else nbytes
    storage = b"(" + _text("storage") + f"c{kind}\n".encode() + _text(key) + _text("cpu") + _int(numel) + b"tQ"
    view = _int(0) + _ints(shape) + _ints(_strides(shape)) + b"\x89ccollections\nOrderedDict\n)R"
    version = "2" if typed else "3"
    told = b"" if typed else f"ctorch\n{UNTYPED[dtype]}\n".encode()
    return f"ctorch._utils\n_rebuild_tensor_v{version}\n".encode() + b"(" + storage + view + told + b"tR"


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape))]


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _ints(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def _int(n: int) -> bytes:
    if n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    return b"\x8a\x08" + struct.pack("<q", n)
