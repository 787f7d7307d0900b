"""A traced graph on disk: NAME.onnx, and its numbers beside it in NAME.onnx_data, whatever their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .graph import Graph
from .swappable import optional
from .trace import traced

DATA = "_data"


@dataclass
class Written:
    """A graph on disk. bytes: of both files.    route: what traced it.    nodes: operations."""

    name: str
    file: Path
    bytes: int
    opset: int
    route: str
    nodes: int


def write(graph: Graph, folder: Path, opset: int, written: Callable[[int], None] | None = None) -> Written:
    """Trace a graph and write it. written: told the bytes of each tensor.

    Raises Usage, Mismatch as tracing does, System when the disk does not take it.
    """
    import onnx

    model, route = traced(graph, opset)
    optional(model, graph.slots)
    file = folder / f"{graph.name}.onnx"
    save(model, file, written)
    onnx.checker.check_model(str(file))  # by path: a model may be larger than a message
    nodes = sum(1 for _ in model.graph)
    return Written(graph.name, file, size(file), opset, route, nodes)


def save(model: Any, file: Path, written: Callable[[int], None] | None = None) -> None:
    """Write an onnx_ir.Model, all its numbers outside."""
    import onnx_ir

    def told(tensor: Any, _: Any) -> None:
        if written:
            written(tensor.nbytes)

    onnx_ir.save(model, file, external_data=file.name + DATA, callback=told)


def size(file: Path) -> int:
    """Bytes of a graph and its numbers."""
    data = file.with_name(file.name + DATA)
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)
