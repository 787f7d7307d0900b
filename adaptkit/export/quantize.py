"""Smaller numbers in a finished graph, by ONNX Runtime's own tools.

int8: weights per channel, activations as they come (per tensor, its default, is clearly worse).
int8_weight_only, int4: blocks of 32 weights with one scale, of matrix products; large embeddings in 8 bits, once where
they are tied.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import Mismatch, quoted
from . import extra
from .embeddings import shortened
from .swappable import products
from .trace import quiet

BLOCK = 32
BITS = {"int8_weight_only": 8, "int4": 4}


def quantised(file: Path, kind: str) -> None:
    """Quantise a graph in its place. kind: "int8", "int8_weight_only" or "int4".

    Raises Mismatch when the tool does not take the graph.
    """
    extra.runtime()
    made = file.with_name(f"{file.stem}.{kind}.onnx")
    try:
        with quiet(), _beside(file):
            _forget(file)
            _int8(file, made) if kind == "int8" else _blocks(file, made, BITS[kind])
    except (ValueError, RuntimeError, KeyError, NotImplementedError, TypeError, AttributeError) as e:
        raise Mismatch(
            f"cannot be quantised to {kind}: {quoted(e)}", where=file.name, hint="leave --quantize out"
        ) from e
    _replace(made, file)


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[None]:
    """Temporary copies, as large as the model, go where there is room for it."""
    before, tempfile.tempdir = tempfile.tempdir, str(file.parent)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _forget(file: Path) -> None:
    """Take the shapes of values inside off a graph: the tools turn weights around, and stumble over what they were."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    del graph.graph.value_info[:]
    onnx.save(graph, file)


def _int8(file: Path, made: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file, made, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True,
        nodes_to_exclude=_left(file),
    )  # fmt: skip


def _blocks(file: Path, made: Path, bits: int) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model, left = onnx.load(file, load_external_data=False), _left(file)
    _lend(model, file.parent)
    shortened(model, left)
    tool = MatMulNBitsQuantizer(
        model, bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=4, nodes_to_exclude=left
    )
    tool.process()
    _fetch(tool.model.model.graph.initializer, file.parent)
    tool.model.save_model_to_file(str(made), True)


def _lend(model: Any, folder: Path) -> None:
    """Let the tool read the matrices it turns into small ones from the file, one after the other, and load the rest."""
    products = {n.input[1] for n in model.graph.node if n.op_type == "MatMul"}
    rest = []
    for tensor in model.graph.initializer:
        if tensor.name in products and len(tensor.dims) == 2 and tensor.external_data:
            _at(tensor, str(folder.resolve() / _said(tensor)["location"]))
        else:
            rest.append(tensor)
    _fetch(rest, folder)


def _fetch(tensors: Iterable[Any], folder: Path) -> None:
    """Load what still lies in a graph's data file."""
    from onnx.external_data_helper import load_external_data_for_tensor

    for tensor in tensors:
        if tensor.external_data:
            _at(tensor, Path(_said(tensor)["location"]).name)
            load_external_data_for_tensor(tensor, str(folder))
            del tensor.external_data[:]
            tensor.data_location = tensor.DEFAULT


def _said(tensor: Any) -> dict[str, str]:
    return {e.key: e.value for e in tensor.external_data}


def _at(tensor: Any, location: str) -> None:
    next(e for e in tensor.external_data if e.key == "location").value = location


def _left(file: Path) -> list[str]:
    """Products with what an adapter brings: the tools would take the default, which is nothing, for a weight."""
    import onnx

    return products(onnx.load(file, load_external_data=False))


def _replace(made: Path, file: Path) -> None:
    """Put the new graph under the old one's name, its numbers under the name that programs look for."""
    import onnx_ir

    from .write import DATA

    model = onnx_ir.load(made)
    again = made.with_name(f"again.{file.name}")
    onnx_ir.save(model, again, external_data=f"again.{file.name}{DATA}")
    del model
    for old in file.parent.glob(f"{made.name}*"):
        old.unlink()
    for old in (file, file.with_name(file.name + DATA)):
        old.unlink(missing_ok=True)
    _renamed(again, file, DATA)


def _renamed(again: Path, file: Path, data: str) -> None:
    import onnx

    graph = onnx.load(again, load_external_data=False)
    for tensor in _tensors(graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = file.name + data
    onnx.save(graph, file)
    again.unlink()
    again.with_name(again.name + data).rename(file.with_name(file.name + data))


def _tensors(graph) -> list:  # type: ignore[no-untyped-def]
    from onnx.external_data_helper import _get_all_tensors

    return list(_get_all_tensors(graph))
