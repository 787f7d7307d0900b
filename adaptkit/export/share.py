"""Two graphs of one model hold the same numbers: the second points into the data of the first, and keeps only its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .outside import point, where

Place = tuple[str, int, int]  # data file, offset, length
BLOCK = 1 << 22


def share(first: Path, second: Path) -> int:
    """Let the second graph read what the first one holds too. Both lie in one folder, with their data.

    Returns the bytes that were saved.
    """
    import onnx

    graph = onnx.load(second, load_external_data=False)
    there = {_digest(first.parent, place): place for _, place in _places(onnx.load(first, load_external_data=False))}
    moved = [(tensor, place, there.get(_digest(second.parent, place))) for tensor, place in _places(graph)]
    if not any(known for _, _, known in moved):
        return 0
    saved = sum(place[2] for _, place, known in moved if known)
    old = second.with_name(moved[0][1][0])
    new = old.with_name(old.name + ".new")
    with open(new, "wb") as out:
        for tensor, place, known in moved:
            name, offset, length = known or (old.name, _append(out, second.parent, place), place[2])
            point(tensor, location=name, offset=offset, length=length)
    new.replace(old)
    if not old.stat().st_size:
        old.unlink()
    onnx.save(graph, second)
    return saved


def _places(graph: Any) -> Iterator[tuple[Any, Place]]:
    """The tensors of a graph whose numbers lie outside, and where."""
    for tensor in graph.graph.initializer:
        said = where(tensor)
        if said.get("location") and int(said.get("length", 0)):
            yield tensor, (said["location"], int(said.get("offset", 0)), int(said["length"]))


def _digest(folder: Path, place: Place) -> bytes:
    found = hashlib.sha256(str(place[2]).encode())
    for block in _blocks(folder, place):
        found.update(block)
    return found.digest()


def _append(out: Any, folder: Path, place: Place) -> int:
    """Copy the numbers of a tensor to the end of a file; where they begin."""
    out.write(bytes(-out.tell() % 4096))  # runtimes map them
    start = out.tell()
    for block in _blocks(folder, place):
        out.write(block)
    return start


def _blocks(folder: Path, place: Place) -> Iterator[bytes]:
    name, offset, left = place
    with open(folder / name, "rb") as file:
        file.seek(offset)
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise EOFError(name)
            left -= len(block)
            yield block
