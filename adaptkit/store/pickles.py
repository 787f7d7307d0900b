"""torch's .bin, .pt and .pth files: where their tensors lie, found without unpickling anything.

A file is a zip (archive/data.pkl names the tensors, archive/data/0, 1, ... hold the bytes), or, before torch 1.6, five
pickles in a row and then the bytes. torch is not imported and nothing that the file names is looked up: symbolic.py
reads what the pickle would call, and only the names in ALLOWED have a meaning.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import AdaptKitError, AdaptKitWarning, Corrupt, Mismatch, Unsafe, quoted, some
from . import zips
from .entry import Entry
from .rebuild import ALLOWED, TRAINING, View, is_tensor, nbytes, viewed
from .safepaths import open_regular
from .symbolic import HINT, LARGEST, Machine, Stored, Stream, Table

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
RATIO = 20  # a member that inflates more is a bomb
WASTE = 4  # a view may be this many times its storage
FOREIGN = {
    b"version https://git-lfs": ("this is a git-lfs pointer, not the weights", "run: git lfs pull"),
    b"<": ("this is an HTML page, not a checkpoint (failed download?)", "fetch it again"),
    b"\x1f\x8b": ("this is gzip data, not a checkpoint", "unpack it first"),
    b"7z\xbc\xaf": ("this is a 7z archive, not a checkpoint", "unpack it first"),
    b"Rar!": ("this is a RAR archive, not a checkpoint", "unpack it first"),
    b"GGUF": ("this is a GGUF file, not a torch checkpoint", "name it .gguf"),
    b"\x93NUMPY": ("this is a NumPy array, not a checkpoint", "name it .npy"),
}
TEXTUAL = re.compile(rb"\(*[ci][A-Za-z_][\w.]*\n\w[\w.]*\n|\([dl]p\d+\n")  # how pickles of protocol 0 begin


@dataclass(frozen=True, slots=True)
class Block:
    """Where the bytes of a storage lie."""

    offset: int
    nbytes: int
    packed: tuple[int, int, int] | None = None
    crc: int = 0


def is_pickle(path: Path) -> bool:
    """Whether the content is that of a torch checkpoint or of a pickle, sound or not."""
    try:
        fd = open_regular(path)
    except AdaptKitError:
        return False
    try:
        start = os.pread(fd, 512, 0)
        if start.startswith(b"PK\x03\x04"):
            return _has_data_pkl(fd, start)
    finally:
        os.close(fd)
    tar = start[257:262] == b"ustar" and start[:100].strip(b"\0./") in (b"sys_info", b"pickle", b"storages", b"tensors")
    binary = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and not _safetensors(start)
    return tar or binary or bool(TEXTUAL.match(start))


def read(path: Path) -> dict[str, Entry]:
    """The entries of a state dict, in the order of the file. Raises Corrupt, Mismatch or Unsafe; runs nothing.

    The nbytes of a view that is not contiguous are those of its elements, without the gaps between them.
    """
    fd = open_regular(path)
    try:
        start = os.pread(fd, 512, 0)
        _refuse_foreign(start)
        root, find = _read_zip(fd) if start.startswith(b"PK\x03\x04") else _read_stream(fd)
        return _entries(path, _state_dict(root, path.name), find)
    except AdaptKitError as e:
        raise e.at(path.name) from None
    finally:
        os.close(fd)


def tree(path: Path, span: tuple[int, int] | None = None) -> tuple[Any, Find]:
    """What the pickle of a training checkpoint would build, and a function that finds its storages. Runs nothing.

    span: (start, bytes) of the zip within the file, where it is a part of one. Sound states of DeepSpeed and of
    torch.distributed.checkpoint are let through as inert data. Raises Corrupt, Mismatch or Unsafe.
    """
    fd = open_regular(path)
    try:
        if span is not None:
            root, find = _read_zip(zips.Span(fd, *span), TRAINING)
            return root, lambda storage: replace(b := find(storage), offset=b.offset + span[0] * (not b.packed))
        start = os.pread(fd, 512, 0)
        _refuse_foreign(start)
        return _read_zip(fd, TRAINING) if start.startswith(b"PK\x03\x04") else _read_stream(fd, TRAINING)
    except AdaptKitError as e:
        raise e.at(path.name) from None
    finally:
        os.close(fd)


def entry(path: Path, name: str, value: Any, find: Find) -> Entry:
    """The entry of one tensor of a tree."""
    return _entries(path, {name: value}, find)[name]


def check_crc(path: Path, later: Collection[int] = ()) -> None:
    """Read every member of a zip checkpoint and compare it with its CRC-32. Raises Corrupt. Older files have none.

    later: where the data of members begins that will be checked while they are copied.
    """
    fd = open_regular(path)
    try:
        if os.pread(fd, 4, 0) == b"PK\x03\x04":
            for member in zips.members(fd).values():
                if member.offset not in later:
                    zips.check(fd, member)
    except AdaptKitError as e:
        raise e.at(path.name) from None
    finally:
        os.close(fd)


# what kind of file it is


def _has_data_pkl(fd: int, start: bytes) -> bool:
    try:
        names = list(zips.members(fd))
    except AdaptKitError:  # judge a damaged one by its first member: the reader then says what is wrong
        names = [start[30 : 30 + int.from_bytes(start[26:28], "little")].decode("utf-8", "replace")]
    return any(name.rpartition("/")[2] == "data.pkl" for name in names)


def _safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def _refuse_foreign(start: bytes) -> None:
    if not start:
        raise Corrupt("file is empty", hint="fetch it again")
    if _safetensors(start):
        raise Corrupt("this is a safetensors file, not a torch checkpoint", hint="name it .safetensors")
    if start[257:262] == b"ustar":
        raise Unsafe("refused, the old tar format of torch cannot be read without running it", hint=HINT)
    for magic, (what, hint) in FOREIGN.items():
        if start.lstrip().startswith(magic):
            raise Corrupt(what, hint=hint)


# the two containers: each gives the value of its pickle and a function that finds a storage

Find = Callable[[Stored], Block]


def _read_zip(fd: zips.File, allowed: Collection[str] = ALLOWED) -> tuple[Any, Find]:
    members = zips.members(fd)
    if any(name.rpartition("/")[2] == "constants.pkl" or "/code/" in name for name in members):
        raise Unsafe("refused, this is a TorchScript archive, which holds code", hint="save its state_dict() instead")
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        what = "no data.pkl" if not pickles else f"{len(pickles)} data.pkl"
        raise Corrupt(f"this is a zip file with {what}, not a torch checkpoint (members: {some(members) or 'none'})")
    home = pickles[0].removesuffix("data.pkl")
    root = _data_pkl(fd, members[pickles[0]], allowed)
    order = members.get(f"{home}byteorder")
    if order and (order.size > 16 or b"".join(zips.blocks(fd, order)) != b"little"):
        raise Corrupt("the numbers are not stored little-endian", hint=HINT)
    return root, lambda storage: _member(members, home, storage)


def _data_pkl(fd: zips.File, member: zips.Member, allowed: Collection[str]) -> Any:
    """The value of data.pkl. A name that is refused is told even if the CRC is wrong: the CRC may be the disguise."""
    if member.size > min(LARGEST, RATIO * member.packed):
        raise Corrupt(f"{quoted(member.name)} takes {member.size:,} bytes, inflated from {member.packed:,}; too many")
    raw = b"".join(zips.blocks(fd, member))
    try:
        root = _whole(Machine(Stream(BytesIO(raw), len(raw)), allowed))
    except Corrupt:
        zips.check(fd, member)  # if the CRC is wrong, that is what to say
        raise
    zips.check(fd, member)
    return root


def _whole(machine: Machine) -> Any:
    root = machine.run()
    if machine.stream.left:
        raise Corrupt(f"{machine.stream.left:,} bytes follow the end of the pickle")
    return root


def _member(members: dict[str, zips.Member], home: str, storage: Stored) -> Block:
    m = members.get(f"{home}data/{storage.key}")
    if m is None:
        raise Corrupt(f"its storage {quoted(storage.key)!r} is not in the zip")
    expected = nbytes(storage)
    if m.size != expected:
        raise Corrupt(f"its storage {quoted(storage.key)!r} has {m.size:,} bytes, {expected:,} expected (truncated?)")
    if not m.deflated:
        return Block(m.offset, m.size, crc=m.crc)
    if m.size > RATIO * m.packed:
        raise Corrupt(f"its storage inflates from {m.packed:,} to {m.size:,} bytes, more than {RATIO} times")
    return Block(0, m.size, (m.offset, m.packed, m.size))


def _read_stream(fd: int, allowed: Collection[str] = ALLOWED) -> tuple[Any, Find]:
    """A bare pickle, or the format before torch 1.6: magic, protocol, system, the state dict, keys, storages."""
    size = os.fstat(fd).st_size
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        stream = Stream(file, size)
        machine = Machine(stream, allowed)
        root = _first(machine)
        if type(root) is not int or root != MAGIC:
            if file.tell() != size:
                raise Corrupt(f"{size - file.tell():,} bytes follow the end of the pickle")
            return root, _nowhere
        protocol, system = (Machine(stream, ALLOWED).run() for _ in range(2))
        little = isinstance(system, Table) and any(k == "little_endian" and v is True for k, v in system.items)
        if protocol != PROTOCOL or not little:
            raise Corrupt("a torch checkpoint of an unknown protocol or byte order", hint=HINT)
        machine = Machine(stream, allowed)
        root = machine.run()
        keys = Machine(stream, ALLOWED).run()
        blocks = _in_a_row(fd, file.tell(), keys, _lengths(machine.stored))
    return root, lambda storage: _listed(blocks, storage)


def _first(machine: Machine) -> Any:
    try:
        return machine.run()
    except Corrupt as e:
        raise Corrupt(f"this is not a torch checkpoint, or damaged ({e.message})", hint="fetch it again") from None


def _lengths(stored: list[Stored]) -> dict[str, tuple[int, int]]:
    """The elements and the bytes of each storage."""
    found: dict[str, tuple[int, int]] = {}
    for s in stored:
        if found.setdefault(s.key, (s.numel, nbytes(s))) != (s.numel, nbytes(s)):
            raise Corrupt(f"the storage {quoted(s.key)!r} has two lengths")
    return found


def _in_a_row(fd: int, at: int, keys: Any, lengths: dict[str, tuple[int, int]]) -> dict[str, Block]:
    """The storages after the pickles, each behind its number of elements."""
    if not isinstance(keys, list) or not all(isinstance(k, str) and k in lengths for k in keys):
        raise Corrupt("the list of storages names one that no tensor has")
    size, found = os.fstat(fd).st_size, {}
    for key in keys:
        numel, length = lengths[key]
        end = at + 8 + length
        if end > size:
            raise Corrupt(f"file has {size:,} bytes, its storages need {end:,} (truncated?)", hint="fetch it again")
        if os.pread(fd, 8, at) != numel.to_bytes(8, "little") or key in found:
            raise Corrupt(f"the storage {quoted(key)!r} is not as long as the pickle says, or there twice")
        found[key] = Block(at + 8, length)
        at = end
    if at != size:
        raise Corrupt(f"{size - at:,} bytes follow the last storage")
    return found


def _listed(blocks: dict[str, Block], storage: Stored) -> Block:
    if storage.key not in blocks:
        raise Corrupt(f"its storage {quoted(storage.key)!r} is not in the file")
    return blocks[storage.key]


def _nowhere(storage: Stored) -> Block:
    raise Corrupt(f"its storage {quoted(storage.key)!r} is not in the file: this is a bare pickle")


# which of the pickle's values are the state dict


def _state_dict(root: Any, where: str) -> dict[str, Any]:
    """The tensors by name; one wrapper is taken off and what is not a tensor is left out, both with a warning."""
    outer = _named(root)
    inside = [key for key in WRAPPERS if isinstance(outer.get(key), Table) and any(_tensors(outer[key]))]
    if len(inside) > 1:
        raise Mismatch(f"has tensors under {some(inside)}: which are meant?", hint="save one of them alone")
    state = _named(outer[inside[0]]) if inside else outer
    tensors = {name: value for name, value in state.items() if is_tensor(value)}
    if not tensors:
        raise Corrupt(f"holds no tensors (its keys: {some(outer) or 'none'})")
    left = [name for name in outer if name not in inside] if inside else []
    left += [name for name in state if name not in tensors]
    if inside or left:
        taken = f"the tensors are those under '{inside[0]}'" if inside else "not everything is a tensor"
        text = f"{quoted(where)}: {taken}; left out: {some(left, 8) or 'nothing'}"
        warnings.warn(text, AdaptKitWarning, stacklevel=3)
    return tensors


def _named(table: Any) -> dict[str, Any]:
    """A table as a dict of text."""
    if not isinstance(table, Table):
        what = "a single tensor" if is_tensor(table) else f"a {type(table).__name__.lower()}"
        raise Corrupt(f"the pickle holds {what}, not a state dict")
    for key, _ in table.items:
        if not isinstance(key, str):
            raise Corrupt(f"the pickle holds a dict with a key that is not text ({type(key).__name__})")
        if not key or any("\ud800" <= c <= "\udfff" for c in key):
            raise Corrupt(f"'{quoted(key)}' is not a tensor name")
    found = dict(table.items)
    if len(found) != len(table.items):
        raise Corrupt("the pickle gives one name twice")
    return found


def _tensors(table: Table) -> Iterator[bool]:
    return (is_tensor(value) for _, value in table.items)


# tensors


def _entries(path: Path, tensors: dict[str, Any], find: Find) -> dict[str, Entry]:
    entries = {}
    for name, value in tensors.items():
        try:
            entries[name] = _entry(path, name, viewed(value), find)
        except AdaptKitError as e:
            raise type(e)(f"{quoted(name)!r}: {e.message}", hint=e.hint) from None
    return entries


def _entry(path: Path, name: str, view: View, find: Find) -> Entry:
    block = find(view.storage)
    numel = math.prod(view.shape)
    end = view.offset + 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) if numel else 0
    if end * view.width > block.nbytes:
        raise Corrupt(f"ends at byte {end * view.width:,} of a storage of {block.nbytes:,}")
    if numel * view.width > WASTE * block.nbytes:
        raise Corrupt(f"has {numel:,} elements, but its storage has {block.nbytes:,} bytes")
    strides = None if _row_major(view, numel) else view.strides
    offset = block.offset + (view.offset * view.width if numel else 0)
    exactly = strides is None and offset == block.offset and numel * view.width == block.nbytes
    crc = block.crc if exactly else 0
    return Entry(name, view.dtype, view.shape, path, offset, numel * view.width, strides, block.packed, crc=crc)


def _row_major(view: View, numel: int) -> bool:
    step = 1
    for n, stride in reversed(list(zip(view.shape, view.strides, strict=True))):
        if n != 1 and stride != step:
            return numel == 0
        step *= n
    return True
