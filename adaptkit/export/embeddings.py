"""Embeddings in 8 bits, of graphs whose products are in 4: one copy for the words that are read and those that are said.

e = s (q - 128)     q: (vocab, width) uint8    s: (vocab, width / block)

The tools quantise products with a constant. A tied embedding is none: it is gathered from, and multiplied by turned around,
so that it would stay as it is, half of a small model's file.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (GatherBlockQuantized, MatMulNBits)
"""

from __future__ import annotations

from typing import Any

import numpy as np

BITS, BLOCK = 8, 32  # the block of the other matrices as well
LARGE = 1 << 20  # numbers; smaller ones are not worth an operation that fewer runtimes have
DOMAIN = "com.microsoft"


def shortened(model: Any, left: list[str]) -> int:
    """Quantise the large embeddings of an onnx.ModelProto in its place. left: nodes to leave alone.

    Returns how many there were. One that is used in another way as well stays, for that.
    """
    graph = model.graph
    inputs = {i.name for i in graph.input}
    large = {t.name: t for t in graph.initializer if t.name not in inputs and _fits(t)}
    done = 0
    for name, tensor in large.items():
        read = [n for n in graph.node if n.op_type == "Gather" and n.input[0] == name and n.name not in left]
        if not read or any(_axis(n) for n in read):
            continue
        said = _said(graph, name, left)
        _put(graph, tensor, read, said)
        done += 1
    _tidy(graph, set(large))
    if done and not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)
    return done


def _fits(tensor: Any) -> bool:
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    dims = tuple(tensor.dims)
    return tensor.data_type in floats and len(dims) == 2 and dims[0] * dims[1] >= LARGE and dims[1] % BLOCK == 0


def _axis(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 0)


def _said(graph: Any, name: str, left: list[str]) -> list[Any]:
    """The products with an embedding turned around: a head that is tied to it."""
    turned = {n.output[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] == name}
    return [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in turned and n.name not in left]


def _put(graph: Any, tensor: Any, read: list[Any], said: list[Any]) -> None:
    """Put the short numbers into a graph, and the operations that read them where the old ones were."""
    from onnx import helper, numpy_helper

    name, (count, width) = tensor.name, tuple(tensor.dims)
    short, scales = _blocks(numpy_helper.to_array(tensor))
    q, s, deep = f"{name}_Q{BITS}", f"{name}_scales", f"{name}_Q{BITS}_blocks"
    graph.initializer.append(numpy_helper.from_array(short.reshape(count, width), q))
    graph.initializer.append(numpy_helper.from_array(scales, s))
    for node in read:
        how = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": BITS}
        made = helper.make_node(
            "GatherBlockQuantized", [q, node.input[1], s], list(node.output), node.name, domain=DOMAIN, **how
        )
        node.CopyFrom(made)
    if not said:
        return
    shape = f"{deep}_shape"
    graph.initializer.append(numpy_helper.from_array(np.array([count, width // BLOCK, BLOCK], np.int64), shape))
    for node in said:
        how = {"K": width, "N": count, "bits": BITS, "block_size": BLOCK, "accuracy_level": 4}
        made = helper.make_node(
            "MatMulNBits", [node.input[0], deep, s], list(node.output), node.name, domain=DOMAIN, **how
        )
        node.CopyFrom(made)
    graph.node.insert(0, helper.make_node("Reshape", [q, shape], [deep], deep))


def _blocks(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(vocab, width) as (vocab, blocks, block) uint8 and (vocab, blocks) scales, by ONNX Runtime's own rounding."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    how = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=BITS)
    short, scales, _ = DefaultWeightOnlyQuantizer(how).qbits_block_quant(np.ascontiguousarray(numbers.T))
    return short, scales


def _tidy(graph: Any, names: set[str]) -> None:
    """Take away what nothing reads any more: embeddings, and where they were turned around."""
    used = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in names]:
        if node.output[0] not in used:
            graph.node.remove(node)
    used = {i for n in graph.node for i in n.input}
    for tensor in [t for t in graph.initializer if t.name in names and t.name not in used]:
        graph.initializer.remove(tensor)
