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
from .embeddings import BLOCK, shortened
from .outside import point, where
from .swappable import products
from .trace import quiet

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
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file, made, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True,
        nodes_to_exclude=products(onnx.load(file, load_external_data=False)),
    )  # fmt: skip


def _blocks(file: Path, made: Path, bits: int) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(file, load_external_data=False)
    left = products(model)
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
    multiplied = {n.input[1] for n in model.graph.node if n.op_type == "MatMul"}
    rest = []
    for tensor in model.graph.initializer:
        if tensor.name in multiplied and len(tensor.dims) == 2 and tensor.external_data:
            point(tensor, location=folder.resolve() / where(tensor)["location"])
        else:
            rest.append(tensor)
    _fetch(rest, folder)


def _fetch(tensors: Iterable[Any], folder: Path) -> None:
    """Load what still lies in a graph's data file."""
    from onnx.external_data_helper import load_external_data_for_tensor

    for tensor in tensors:
        if tensor.external_data:
            point(tensor, location=Path(where(tensor)["location"]).name)
            load_external_data_for_tensor(tensor, str(folder))
            del tensor.external_data[:]
            tensor.data_location = tensor.DEFAULT


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
    from onnx.external_data_helper import _get_all_tensors

    graph = onnx.load(again, load_external_data=False)
    for tensor in _get_all_tensors(graph):
        if tensor.external_data:
            point(tensor, location=file.name + data)
    onnx.save(graph, file)
    again.unlink()
    again.with_name(again.name + data).rename(file.with_name(file.name + data))
