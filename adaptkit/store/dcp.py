"""torch.distributed.checkpoint: .metadata says which rectangle of which tensor lies where in which file.

https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py. The metadata is a pickle of
dataclasses, read as text; each item of a .distcp file is a tensor as torch.save writes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from . import pickles
from .entry import BITS, Entry, Part
from .rebuild import DTYPES, TRAINING
from .safepaths import inside, open_regular
from .symbolic import Call, Machine, Name, Stream, Table

WRAPPERS = ("model", "state_dict", "module", "app", "model_state_dict")
OTHERS = (
    "optimizer optim optimizers optimizer_state_dict lr_scheduler scheduler train_state dataloader rng trainer"
).split()
LARGEST, MOST = 1 << 28, 20_000_000  # bytes and opcodes of .metadata: a thousand tensors on 256 ranks
Facts = dict[str, Any]


def entries(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a DCP folder by name, in parts, and what was left out. Raises Corrupt or Mismatch."""
    try:
        root = _facts(_unpickled(folder / ".metadata"), "Metadata")
        described, stored = _table(root, "state_dict_metadata"), _storage(_table(root, "storage_data"))
        paths = dict(_pairs(root.get("planner_data")))
    except AdaptKitError as e:
        raise e.at(".metadata") from None
    tensors = {name: m for name, m in described if isinstance(m, Call) and m.name.endswith(".TensorStorageMetadata")}
    names, left = _named(list(tensors), paths)
    if not names:
        raise Corrupt("holds no model tensors", where=folder.name)
    found = {}
    for fqn, name in names.items():
        if name in found:
            raise Corrupt(f"two tensors are called {quoted(name)}", where=".metadata")
        found[name] = _entry(folder, fqn, name, tensors[fqn], stored)
    left += [name for name, m in described if name not in tensors]
    return found, [f"{len(left)} entries that are not of the model ({some(left)})"] if left else []


def _unpickled(path: Path) -> Any:
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise Corrupt(f"larger than {LARGEST:,} bytes")
    stream = Stream(BytesIO(raw), len(raw), LARGEST)
    root = Machine(stream, TRAINING, MOST).run()
    if stream.left:
        raise Corrupt(f"{stream.left:,} bytes follow the end of the pickle")
    return root


def _facts(value: Any, kind: str) -> Facts:
    """The attributes of a dataclass as the pickle sets them."""
    if not isinstance(value, Call) or value.name.rpartition(".")[2] != kind:
        raise Corrupt(f"is not what torch.distributed.checkpoint writes (no {kind})")
    return {k: v for state in value.states if isinstance(state, Table) for k, v in state.items if isinstance(k, str)}


def _pairs(value: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in value.items if isinstance(k, str)] if isinstance(value, Table) else []


def _table(facts: Facts, key: str) -> list[tuple[Any, Any]]:
    if not isinstance(facts.get(key), Table):
        raise Corrupt(f"has no {key}")
    return facts[key].items


def _storage(items: list[tuple[Any, Any]]) -> dict[tuple[str, tuple[int, ...] | None], Facts]:
    """Where each rectangle lies: (tensor, offsets) -> file, offset, length."""
    found = {}
    for index, info in items:
        mine, facts = _facts(index, "MetadataIndex"), _facts(info, "_StorageInfo")
        offsets = None if mine.get("offset") is None else _sizes(mine["offset"])
        found[str(mine.get("fqn")), offsets] = facts
    return found


def _sizes(value: Any) -> tuple[int, ...]:
    given = value.args[0] if isinstance(value, Call) and value.name == "torch.Size" and value.args else value
    if not isinstance(given, tuple | list) or not all(type(n) is int and 0 <= n < 2**63 for n in given):
        raise Corrupt("has a size that no tensor has")
    return tuple(given)


def _named(fqns: list[str], paths: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Names without the keys of the dictionaries around the model's; and what is not the model's."""
    split = {f: p if isinstance(p := paths.get(f), tuple) and p else (f,) for f in fqns}
    if any(not isinstance(part, str | int) for p in split.values() for part in p):
        raise Corrupt("has paths that are not text")
    left = [f for f, p in split.items() if len(p) > 1 and p[0] in OTHERS]
    split = {f: p for f, p in split.items() if f not in left}
    while split and all(len(p) > 1 for p in split.values()) and len({p[0] for p in split.values()}) == 1:
        if next(iter(split.values()))[0] not in WRAPPERS:
            break
        split = {f: p[1:] for f, p in split.items()}
        inner = [f for f, p in split.items() if len(p) > 1 and p[0] in OTHERS]
        left += inner
        split = {f: p for f, p in split.items() if f not in inner}
    return {f: ".".join(map(str, p)) for f, p in split.items()}, left


def _entry(folder: Path, fqn: str, name: str, told: Call, stored: dict) -> Entry:
    try:
        return _pieced(folder, fqn, name, _facts(told, "TensorStorageMetadata"), stored)
    except AdaptKitError as e:
        raise type(e)(f"{quoted(name)!r}: {e.message}", where=e.where or ".metadata", hint=e.hint) from None


def _pieced(folder: Path, fqn: str, name: str, facts: Facts, stored: dict) -> Entry:
    shape, dtype = _sizes(facts.get("size")), _dtype(facts.get("properties"))
    chunks = facts.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        raise Corrupt("has no chunks")
    parts = []
    for chunk in chunks:
        box = _facts(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(box.get("offsets")), _sizes(box.get("sizes"))
        where = stored.get((fqn, offsets)) or stored.get((fqn, None))
        if where is None:
            raise Corrupt(f"the part at {list(offsets)} is in no file")
        if math.prod(sizes):
            parts.append(part(_chunk(folder, fqn, where, sizes, dtype), shape, offsets, sizes))
    covered(parts, shape)
    first = parts[0] if parts else Part(folder / ".metadata", 0, (0, 0), (0, 0), 0)
    nbytes = math.prod(shape) * BITS[dtype] // 8
    return Entry(name, dtype, shape, first.file, first.offset, nbytes, parts=tuple(parts))


def _dtype(properties: Any) -> str:
    """TensorProperties pickles itself as a tuple that begins with the dtype."""
    state = properties.states[0] if isinstance(properties, Call) and properties.states else None
    told = state[0] if isinstance(state, tuple) and state else dict(_pairs(state)).get("dtype")
    name = told.name.removeprefix("torch.") if isinstance(told, Name) else "none"
    if name not in DTYPES:
        raise Mismatch(f"has dtype {quoted(name)}, which is not supported")
    return DTYPES[name]


def _chunk(folder: Path, fqn: str, where: Facts, sizes: tuple[int, ...], dtype: str) -> Entry:
    """The tensor that a file holds at a place."""
    if where.get("transform_descriptors"):
        raise Mismatch("is compressed by an extension, which is not supported", hint="save it without")
    path, offset, length = inside(folder, str(where.get("relative_path"))), where.get("offset"), where.get("length")
    if not path.is_file():
        raise Corrupt(f"its file {quoted(path.name)} is not there", hint="copy the shards of all machines together")
    if not all(type(n) is int and n >= 0 for n in (offset, length)) or offset + length > path.stat().st_size:
        raise Corrupt(f"{quoted(path.name)} is shorter than {offset} + {length} bytes (truncated?)")
    root, find = pickles.tree(path, (offset, length))
    entry = pickles.entry(path, fqn, root, find)
    if entry.shape != sizes or entry.dtype != dtype or not entry.plain:
        raise Corrupt(f"{quoted(path.name)} holds {entry.dtype} {list(entry.shape)}, {dtype} {list(sizes)} expected")
    return entry


def part(entry: Entry, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Part:
    """A chunk as a rectangle of its tensor read as a matrix. Raises Mismatch for one that is none."""
    if not len(shape) == len(offsets) == len(sizes) or any(
        o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)
    ):
        raise Corrupt(f"a part of {list(sizes)} at {list(offsets)} does not lie in {list(shape)}")
    cut = [i for i, (n, s) in enumerate(zip(sizes, shape, strict=True)) if n != s]
    last = cut[-1] if cut else 0
    two = len(cut) == 2 and cut[1] == cut[0] + 1 and math.prod(shape[: cut[0]]) == 1
    if len(cut) > 1 and not two:
        raise Mismatch(f"is cut along {len(cut)} dimensions, which is not supported")
    inner = math.prod(shape[last + 1 :])
    width = inner * (shape[last] if shape else 1)
    left = offsets[last] * inner if shape else 0
    columns = (left, left + inner * (sizes[last] if shape else 1))
    if two:
        return Part(entry.file, entry.offset, (offsets[cut[0]], offsets[cut[0]] + sizes[cut[0]]), columns, width)
    return Part(entry.file, entry.offset, (0, math.prod(shape[:last])), columns, width)


def covered(parts: list[Part], shape: tuple[int, ...]) -> None:
    """Raises Corrupt unless the parts cover a tensor exactly once."""
    total = sum((p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0]) for p in parts)
    if total != math.prod(shape):
        raise Corrupt(
            f"its parts hold {total:,} of {math.prod(shape):,} elements",
            hint="copy the shards of all machines together",
        )
    if len({p.width for p in parts}) > 1:
        raise Mismatch("is cut along different dimensions in different files")
    for a, b in _overlaps(parts):
        raise Corrupt(f"two of its parts overlap ({a.rows} x {a.columns} and {b.rows} x {b.columns})")


def _overlaps(parts: list[Part]) -> Iterator[tuple[Part, Part]]:
    ordered = sorted(parts, key=lambda p: (p.rows, p.columns))
    if len({p.rows for p in parts}) <= 1:  # shares of one vector: neighbours tell, however many ranks there are
        yield from ((a, b) for a, b in pairwise(ordered) if b.columns[0] < a.columns[1])
        return
    for i, a in enumerate(ordered):
        for b in ordered[i + 1 :]:
            if b.rows[0] >= a.rows[1]:
                break
            if b.columns[0] < a.columns[1] and a.columns[0] < b.columns[1]:
                yield a, b
