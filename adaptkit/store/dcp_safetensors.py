"""torch.distributed.checkpoint in safetensors files: each rank's slices, and in the header where they lie in the tensor.

`DCP_SHARDING_INFO` maps names to {"saved_offsets": [...]}; the whole shape is where the farthest slice ends.
torch/distributed/checkpoint/hf_storage.py.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import AdaptKitError, Corrupt, quoted
from . import safetensors
from .dcp import covered, part
from .entry import BITS, Entry

KEY = "DCP_SHARDING_INFO"
Slices = list[tuple[Entry, tuple[int, ...]]]


def files(folder: Path) -> list[Path]:
    """The files of a folder that hold slices, if there are several and no index says that they are whole."""
    found = sorted(folder.glob("*.safetensors"))
    if len(found) < 2 or any(folder.glob("*.index.json")):
        return []
    return found if all(sliced(f) for f in found) else []


def sliced(file: Path) -> bool:
    """Whether a file says that it holds slices of tensors."""
    try:
        return KEY in safetensors.read(file)[1]
    except AdaptKitError:
        return False


def entries(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """The tensors by name, in parts. Raises Corrupt for slices that are missing."""
    held: dict[str, Slices] = {}
    for file in files(folder):
        found, metadata = safetensors.read(file)
        told = safetensors.load_json(metadata[KEY])
        for name, entry in found.items():
            held.setdefault(name, []).append((entry, _offsets(told, name, entry)))
    return {name: _joined(name, slices) for name, slices in held.items()}, []


def _offsets(told: object, name: str, entry: Entry) -> tuple[int, ...]:
    info = told.get(name) if isinstance(told, dict) else None
    offsets = info.get("saved_offsets") if isinstance(info, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != len(entry.shape)
        or not all(type(n) is int and n >= 0 for n in offsets)
    ):
        raise Corrupt(f"{KEY} does not say where {quoted(name)} lies", where=entry.file.name)
    return tuple(offsets)


def _joined(name: str, slices: Slices) -> Entry:
    first = slices[0][0]
    if any(e.dtype != first.dtype or len(e.shape) != len(first.shape) for e, _ in slices):
        raise Corrupt(f"the slices of {quoted(name)} differ in dtype or dimensions", where=first.file.parent.name)
    shape = tuple(max(o[d] + e.shape[d] for e, o in slices) for d in range(len(first.shape)))
    once = {o: (e, o) for e, o in slices}  # a slice that every rank has counts once
    try:
        parts = [part(e, shape, o, e.shape) for e, o in once.values() if e.numel]
        covered(parts, shape)
    except AdaptKitError as e:
        raise type(e)(f"{quoted(name)!r}: {e.message}", where=first.file.parent.name, hint=e.hint) from None
    nbytes = math.prod(shape) * BITS[first.dtype] // 8
    return Entry(name, first.dtype, shape, first.file, first.offset, nbytes, parts=tuple(parts))
