"""What a traced graph is called inside: inputs, outputs and axes by their names; nothing of the machine it was made on."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from ..errors import Mismatch, some
from .graph import PAST, SEQUENCE, TOTAL, Graph

SUMS = {  # what tracing writes for the sum of two axes
    f"{PAST} + {SEQUENCE}": TOTAL, f"{SEQUENCE} + {PAST}": TOTAL,
}  # fmt: skip


def settle(model: Any, graph: Graph) -> None:
    """Give an onnx_ir.Model the graph's names, and take away where it was made.

    Raises Mismatch when an input or output is missing, or an axis became a fixed size while it was traced.
    """
    import onnx_ir.passes.common as passes

    _check(model, graph)
    _axes(model, graph)
    passes.ClearMetadataAndDocStringPass()(model)  # nine tenths of the file, with paths and lines of source
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "adaptkit", version("adaptkit")
    model.graph.name = graph.name


def _check(model: Any, graph: Graph) -> None:
    for what, there, wanted in (
        ("input", [v.name for v in model.graph.inputs], graph.inputs),
        ("output", [v.name for v in model.graph.outputs], list(graph.outputs)),
    ):
        if lost := [n for n in wanted if n not in there]:
            raise Mismatch(
                f"tracing {graph.name} lost its {what} {some(lost)}, so a part of the model would be ignored"
            )
        if extra := [n for n in there if n not in wanted]:
            raise Mismatch(f"tracing {graph.name} made an {what} {some(extra)} that no program would know")


def _axes(model: Any, graph: Graph) -> None:
    """Call the axes by their names, those of values inside as well."""
    wanted = {**graph.axes, **graph.outputs}
    symbols = _symbols(model, graph)
    for value in _values(model):
        if value.shape is None:
            continue
        for i, dim in enumerate(value.shape):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[i] = _word(str(dim.value), symbols)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for i, name in wanted.get(value.name, {}).items():
            if isinstance(value.shape[i], int):
                text = f"{value.name} has a fixed {name} of {value.shape[i]}: the model's code does not allow others"
                raise Mismatch(text)
            value.shape[i] = name


def _symbols(model: Any, graph: Graph) -> dict[str, str]:
    """s15 -> "batch_size", from the inputs whose axes are known."""
    found: dict[str, str] = {}
    for value in model.graph.inputs:
        for i, name in graph.axes.get(value.name, {}).items():
            dim = value.shape[i]
            if not isinstance(dim, int) and dim.value is not None and str(dim.value).isidentifier():
                found.setdefault(str(dim.value), name)
    return found


def _word(text: str, symbols: dict[str, str]) -> str:
    text = re.sub(r"\b[A-Za-z_]\w*\b", lambda m: symbols.get(m[0], m[0]), text)
    return SUMS.get(text, text)


def _values(model: Any) -> Any:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs
