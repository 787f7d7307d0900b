"""safetensors files, header only: 8 bytes of length, a JSON header, the data. No torch, no mmap.

The format: https://github.com/huggingface/safetensors#format. The checks are those of the reference, and a few more:
a name given twice (two parsers would read two different files), and what else the file is when it is not one of these.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from ..errors import Corrupt, System, quoted
from .entry import BITS, Entry
from .safepaths import open_regular

LARGEST = 100_000_000  # bytes of header, as in the reference
ALIGN = 4096  # where our own data starts, so that blocks lie on pages


def read(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of a file, in the order of their bytes, and its metadata. Raises Corrupt."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        head = os.pread(fd, 8, 0)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > min(LARGEST, size - 8) or length < 2:
            raise _not_one(fd, size, length).at(path.name)
        raw = os.pread(fd, length, 8)
    except OSError as e:
        raise System(f"cannot be read ({e.strerror})", where=path.name) from e
    finally:
        os.close(fd)
    try:
        return _parse(path, raw, size)
    except Corrupt as e:
        raise e.at(path.name) from None


def header(entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a file that holds (name, dtype, shape, bytes) one after the other, padded to ALIGN."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape, nbytes in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    return struct.pack("<Q", len(text)) + text


def load_json(text: str | bytes) -> object:
    """JSON in which a name may stand once, and NaN and Infinity not at all. Raises Corrupt."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise Corrupt("the JSON is nested too deep") from None
    except UnicodeDecodeError as e:
        raise Corrupt(f"not UTF-8 text (byte {e.start})") from None
    except ValueError as e:
        raise Corrupt(f"not JSON ({quoted(e)})") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise Corrupt(f"{quoted(twice)!r} is given twice")
    return found


def _no_constant(text: str) -> float:
    raise Corrupt(f"{text} is not a number here")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Corrupt(f"{quoted(text)} is too large a number")
    return number


def _parse(path: Path, raw: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    if raw[:1] != b"{":
        raise Corrupt("the header does not begin with '{'")
    table = load_json(raw)
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Corrupt("__metadata__ holds something that is not text")
    start, data = 8 + len(raw), size - 8 - len(raw)
    entries = sorted(
        (_entry(path, name, info, start) for name, info in table.items()), key=lambda e: (e.offset, e.nbytes)
    )
    _gap_free(entries, start, data)
    return {e.name: e for e in entries}, metadata


def _entry(path: Path, name: str, info: object, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise Corrupt(f"{quoted(name)!r} lacks a dtype, a shape or two data_offsets") from None
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= 2**63:
        raise Corrupt(f"{quoted(name)!r} has shape {quoted(shape)} and offsets {quoted([begin, end])}")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Corrupt(f"{quoted(name)!r} has the unknown dtype {quoted(dtype)!r}")
    if not name or not (name.isascii() or _encodable(name)):
        raise Corrupt(f"{quoted(name)!r} is not a tensor name")
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise Corrupt(f"{quoted(name)!r}: {dtype} {quoted(shape)} does not take {end - begin:,} bytes")
    return Entry(name, dtype, tuple(shape), path, start + begin, end - begin)


def _gap_free(entries: list[Entry], start: int, data: int) -> None:
    at = start
    for e in entries:
        if e.offset != at:
            raise Corrupt(f"the bytes of {quoted(e.name)!r} begin at {e.offset - start:,}, {at - start:,} expected")
        at += e.nbytes
    if at - start > data:
        raise Corrupt(f"file has {start + data:,} bytes, its header needs {at:,} (truncated?)", hint="fetch it again")
    if at - start < data:
        raise Corrupt(f"file has {start + data:,} bytes, its header accounts for {at:,}")


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


KINDS = {
    b"version https://git-lfs": ("this is a git-lfs pointer, not the weights", "run: git lfs pull"),
    b"<": ("this is an HTML page, not a safetensors file (failed download?)", "fetch it again"),
    b"\x1f\x8b": ("this is gzip data, not a safetensors file", "unpack it first"),
    b"PK\x03\x04": ("this is a zip file (a PyTorch checkpoint?), not a safetensors file", "name it .bin"),
    b"\x80": ("this is a pickle, not a safetensors file", "name it .bin"),
    b"7z\xbc\xaf": ("this is a 7z archive, not a safetensors file", "unpack it first"),
}


def _not_one(fd: int, size: int, length: int) -> Corrupt:
    start = os.pread(fd, 1024, 0)
    if size < 8:
        return Corrupt(f"file has {size} bytes, too few for a safetensors header", hint="fetch it again")
    for magic, (what, hint) in KINDS.items():
        if start.startswith(magic):
            return Corrupt(what + _promised(start), hint=hint)
    if LARGEST < length <= size - 8:
        return Corrupt(f"a header of {length:,} bytes is larger than {LARGEST:,}")
    return Corrupt(f"file has {size:,} bytes, but says that its header takes {length:,}", hint="fetch it again")


def _promised(pointer: bytes) -> str:
    """The size a git-lfs pointer promises."""
    size = pointer.partition(b"\nsize ")[2].split(b"\n")[0]
    return f" ({int(size):,} bytes expected)" if size.isdigit() else ""
