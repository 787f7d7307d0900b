"""Writing what formats share: one safetensors file, or a folder of one and its settings. Either appears whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Mismatch, System, quoted
from ..store.arrays import NUMPY, load
from ..store.disk import HINTS, create, why, write_all
from ..store.entry import Entry
from ..store.output import Output
from ..store.safetensors import header
from .base import appearing
from .fold import stored

SPELT = {v.name: k for k, v in NUMPY.items()}
Arrays = dict[str, np.ndarray]


def ordered(tensors: Mapping[str, Any]) -> Arrays:
    """Params as contiguous arrays, the widest dtype first as in the reference writer, so that each lies aligned.

    Raises Mismatch for numbers that are none: they would spoil every model that they are added to.
    """
    arrays = {n: np.ascontiguousarray(stored(v)).reshape(v.shape) for n, v in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.kind in "fV" and not np.isfinite(array.astype("f4")).all():
            raise Mismatch(f"{quoted(name)} has numbers that are not finite", hint="fetch or train it again")
        if array.dtype.name not in SPELT:
            raise Mismatch(f"{quoted(name)} has dtype {array.dtype}, which safetensors cannot hold")
    return by_width(arrays)


def by_width(tensors: Mapping[str, np.ndarray | Entry]) -> dict[str, np.ndarray | Entry]:
    """In the reference writer's order: the widest dtype first, so that each lies aligned, then by name."""
    return {n: tensors[n] for n in sorted(tensors, key=lambda n: (-NUMPY[spelt(tensors[n])].itemsize, n))}


def spelt(value: np.ndarray | Entry) -> str:
    """The dtype, as safetensors spells it."""
    return value.dtype if isinstance(value, Entry) else SPELT[value.dtype.name]


def digest(arrays: Arrays) -> str:
    """sha256 of the data section of a safetensors file that holds these arrays."""
    found = hashlib.sha256()
    for a in arrays.values():
        found.update(raw(a))
    return found.hexdigest()


def raw(value: np.ndarray | Entry) -> memoryview:
    """The bytes in the file; an Entry is read."""
    return memoryview(np.ascontiguousarray(load(value)).reshape(-1).view("u1"))


def head_of(arrays: Mapping[str, np.ndarray | Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file."""
    entries = ((n, spelt(a), a.shape, a.nbytes) for n, a in arrays.items())
    return header(entries, {k: metadata[k] for k in sorted(metadata)})


def file(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """One safetensors file. Raises Usage when something is there, System when it cannot be written."""
    with appearing(path) as beside:
        try:
            fd = create(beside)
        except OSError as e:
            raise System(f"cannot be written ({why(e)})", where=path, hint=HINTS.get(e.errno)) from e
        with open(fd, "rb+", buffering=0) as f:
            _fill(f.fileno(), head_of(arrays, metadata), arrays)


def folder(
    path: Path,
    name: str,
    arrays: Mapping[str, np.ndarray | Entry],
    metadata: Mapping[str, str],
    settings: Mapping[str, Any],
    by: str,
    *,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    beside: Collection[tuple[Path, str]] = (),
    said: Mapping[str, Any] | None = None,
) -> None:
    """A folder with the safetensors file `name` and adapter_config.json; Entries are read one after the other.

    by: the format.   inputs: folders that the output must stay out of.   beside: (file, name) to copy.
    said: the receipt. Raises Usage when the folder is not empty, unless overwrite.
    """
    head, text = head_of(arrays, metadata), (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    size = len(head) + sum(a.nbytes for a in arrays.values())
    need = size + len(text) + sum(source.stat().st_size for source, _ in beside)
    place = {"inputs": inputs, "overwrite": overwrite, "need": need, "files": 2 + len(beside), "resumable": False}
    with Output(path, plan=_fingerprint(text + head, arrays), **place) as out:
        if not out.done(name):
            with out.file(name, size) as fd:
                _fill(fd, head, arrays)
        if not out.done("adapter_config.json"):
            with out.file("adapter_config.json", len(text)) as fd:
                write_all(fd, text, 0)
        for source, other in beside:
            if not out.done(other):
                out.copy(source, other)
        out.publish(dict(said or {"adaptkit": version("adaptkit"), "made": {"verb": "write", "format": by}}))


def _fingerprint(start: bytes, arrays: Mapping[str, np.ndarray | Entry]) -> str:
    """What will be written; of tensors still on disk, where they lie."""
    plan = hashlib.sha256(start)
    for a in arrays.values():
        plan.update(repr((a.file, a.offset)).encode() if isinstance(a, Entry) else raw(a))
    return plan.hexdigest()


def _fill(fd: int, head: bytes, arrays: Mapping[str, np.ndarray | Entry]) -> None:
    write_all(fd, head, 0)
    at = len(head)
    for a in arrays.values():
        write_all(fd, raw(a), at)
        at += a.nbytes
