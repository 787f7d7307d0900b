"""Zip files read strictly: whatever a zip says twice, it must say the same twice.

A zip lists its members in a directory at its end, and again in a header before each member. Readers that believe
different lists see different files, which is how a harmless-looking archive slips past a check.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import Corrupt, Unsafe, quoted

BLOCK = 1 << 20
LARGEST = 1 << 27  # bytes of directory: about a million members
MASKED16, MASKED32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field"
STREAMED = 0x8  # flag: sizes and CRC follow the data, the local header may have zeros instead
HARMLESS = STREAMED | 0x800 | 0x6  # and UTF-8 names, and how hard deflate tried
END, LOCATOR, END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
CENTRAL, LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of an open file that is a zip of its own."""

    fd: int
    start: int
    size: int


File = int | Span  # a descriptor, or a piece of one


@dataclass(frozen=True, slots=True)
class Member:
    """One member. crc: 0 when the writer did not compute it. packed, size: bytes in the file, bytes inflated.

    header, offset: where its local header and its data begin.
    """

    name: str
    crc: int
    deflated: bool
    flags: int
    packed: int
    size: int
    header: int
    offset: int = 0


def members(fd: File) -> dict[str, Member]:
    """The members of an open zip file, in the order of its directory. Raises Corrupt or Unsafe."""
    start, length, count = _directory(fd, _size(fd))
    listed = list(_listed(_exactly(fd, start, length), count))
    found = {m.name: _located(fd, m) for m in listed}
    if len(found) != len(listed):
        raise Corrupt("two members of the zip have the same name")
    _apart(sorted(found.values(), key=lambda m: m.header), start)
    return found


def blocks(fd: File, member: Member) -> Iterator[bytes]:
    """The inflated content, at most BLOCK bytes at a time; never more than the directory promised."""
    total = 0
    for block in _inflated(fd, member) if member.deflated else _stored(fd, member):
        total += len(block)
        if total > member.size:
            break
        yield block
    if total != member.size:
        raise Corrupt(f"{quoted(member.name)} does not inflate to the {member.size:,} bytes that the zip promises")


def check(fd: File, member: Member) -> None:
    """Compare the content with its CRC-32, if the writer computed one. Raises Corrupt."""
    crc = 0
    for block in blocks(fd, member):
        crc = zlib.crc32(block, crc)
    if member.crc not in (0, crc):
        raise Corrupt(
            f"{quoted(member.name)} is damaged (CRC {crc:08x}, {member.crc:08x} expected)", hint="fetch it again"
        )


def _directory(fd: File, size: int) -> tuple[int, int, int]:
    """Where the directory begins, its bytes, its members."""
    at = size - END.size
    if at < 0:
        raise Corrupt(f"file has {size} bytes, too few for a zip")
    magic, disk, disk2, here, count, length, start, comment = END.unpack(_exactly(fd, at, END.size))
    if magic != b"PK\x05\x06" or comment:
        raise Corrupt("the zip has no directory at its end (truncated?)", hint="fetch it again")
    short = (here, count, length, start)
    at, full = _directory64(fd, at) or (at, short)
    agree = all(
        a in (b, mask) for a, b, mask in zip(short, full, (MASKED16, MASKED16, MASKED32, MASKED32), strict=True)
    )
    here, count, length, start = full
    if disk or disk2 or here != count or not agree or start + length != at or length > LARGEST:
        raise Corrupt("the end of the zip does not fit its directory")
    return start, length, count


def _directory64(fd: File, end: int) -> tuple[int, tuple[int, int, int, int]] | None:
    """The zip64 end record, if there is one: where it lies, and the four numbers in full."""
    at = end - LOCATOR.size
    if at < END64.size:
        return None
    magic, disk, start, disks = LOCATOR.unpack(_exactly(fd, at, LOCATOR.size))
    if magic != b"PK\x06\x07":
        return None
    if start != at - END64.size or disk or disks > 1:
        raise Corrupt("the zip64 end of the zip is not where it should be")
    magic, length, _, _, disk, disk2, *full = END64.unpack(_exactly(fd, start, END64.size))
    if magic != b"PK\x06\x06" or length != END64.size - 12 or disk or disk2:
        raise Corrupt("the zip64 end of the zip is damaged")
    return start, tuple(full)


def _listed(directory: bytes, count: int) -> Iterator[Member]:
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > len(directory):
            raise Corrupt(f"the zip directory ends before its {count:,} members")
        magic, _, _, flags, method, _, _, crc, packed, size, n, extra, comment, disk, _, _, header = (
            CENTRAL.unpack_from(directory, at)
        )
        end = at + CENTRAL.size + n + extra + comment
        if magic != b"PK\x01\x02" or disk or end > len(directory):
            raise Corrupt("the zip directory is damaged")
        name = directory[at + CENTRAL.size : at + CENTRAL.size + n]
        more = directory[at + CENTRAL.size + n : at + CENTRAL.size + n + extra]
        size, packed, header = _wide((size, packed, header), more)
        yield _sensible(Member(_name(name), crc, method == 8, flags, packed, size, header), method)
        at = end
    if at != len(directory):
        raise Corrupt(f"the zip directory goes on after its {count:,} members")


def _wide(numbers: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """The numbers, those that are masked taken from the zip64 extra field."""
    if MASKED32 not in numbers:
        return numbers
    field = iter(_field(extra, 1))
    try:
        return tuple(n if n != MASKED32 else next(field) for n in numbers)
    except (StopIteration, RuntimeError):
        raise Corrupt("the zip64 numbers of a member are missing") from None


def _field(extra: bytes, wanted: int) -> tuple[int, ...]:
    """The 64-bit numbers of one extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == wanted:
            data = extra[at + 4 : at + 4 + length]
            return struct.unpack_from(f"<{len(data) // 8}Q", data)
        at += 4 + length
    return ()


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise Corrupt(f"the zip member name {quoted(raw)} is not UTF-8") from None
    odd = any(c < " " or c in "\\:\x7f" for c in name)
    if odd or not name or name.startswith("/") or ".." in name.split("/"):
        raise Corrupt(f"the zip has a member named '{quoted(name)}', which is not a plain name")
    return name


def _sensible(m: Member, method: int) -> Member:
    if m.flags & ~HARMLESS:
        raise Unsafe(f"refused, {quoted(m.name)} is marked as encrypted or patched in the zip (flags {m.flags:#x})")
    if method not in (0, 8):
        raise Corrupt(
            f"{quoted(m.name)} is compressed by method {method}; only stored and deflated members can be read"
        )
    if method == 0 and m.packed != m.size:
        raise Corrupt(f"{quoted(m.name)} is stored, but has two sizes: {m.packed:,} and {m.size:,}")
    return m


def _located(fd: File, m: Member) -> Member:
    """The member with the place of its data, if its local header says what the directory says."""
    name = m.name.encode()
    head = _exactly(fd, m.header, LOCAL.size + len(name))
    magic, _, flags, method, _, _, crc, packed, size, n, extra = LOCAL.unpack_from(head)
    if magic != b"PK\x03\x04":
        raise Corrupt(f"{quoted(m.name)} is not where the zip directory says")
    offset = m.header + LOCAL.size + n + extra
    if MASKED32 in (size, packed) and n == len(name):
        size, packed = _wide((size, packed), _exactly(fd, offset - extra, extra))
    unknown = (0,) if flags & STREAMED else ()
    numbers = all(a in (b, *unknown) for a, b in ((crc, m.crc), (packed, m.packed), (size, m.size)))
    if head[LOCAL.size :] != name or n != len(name) or flags != m.flags or method != 8 * m.deflated or not numbers:
        raise Unsafe(
            f"refused, the zip directory and the header of {quoted(m.name)} disagree; two readers would read two files"
        )
    return Member(m.name, m.crc, m.deflated, m.flags, m.packed, m.size, m.header, offset)


def _apart(found: list[Member], end: int) -> None:
    """No member may reach into the next one or into the directory."""
    for m, limit in zip(found, [*(m.header for m in found[1:]), end], strict=True):
        if m.offset + m.packed > limit:
            raise Corrupt(f"{quoted(m.name)} overlaps what follows it in the zip")


def _stored(fd: File, m: Member) -> Iterator[bytes]:
    for at in range(0, m.packed, BLOCK):
        yield _exactly(fd, m.offset + at, min(BLOCK, m.packed - at))


def _inflated(fd: File, m: Member) -> Iterator[bytes]:
    machine = zlib.decompressobj(-15)
    try:
        for raw in _stored(fd, m):
            while raw:
                yield machine.decompress(raw, BLOCK)
                raw = machine.unconsumed_tail
        while block := machine.decompress(b"", BLOCK):
            yield block
    except zlib.error as e:
        raise Corrupt(f"{quoted(m.name)} cannot be inflated ({e})") from None
    if not machine.eof or machine.unused_data:
        raise Corrupt(f"{quoted(m.name)} cannot be inflated (it ends elsewhere)")


def _exactly(fd: File, at: int, length: int) -> bytes:
    size = _size(fd)
    data = _pread(fd, length, at) if at + length <= size else b""
    if len(data) != length:
        raise Corrupt(f"file has {size:,} bytes, its zip needs {at + length:,} (truncated?)", hint="fetch it again")
    return data


def _size(fd: File) -> int:
    return fd.size if isinstance(fd, Span) else os.fstat(fd).st_size


def _pread(fd: File, length: int, at: int) -> bytes:
    return os.pread(fd.fd, length, fd.start + at) if isinstance(fd, Span) else os.pread(fd, length, at)
