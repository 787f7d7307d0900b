"""Large embeddings in 8 bits: what ONNX Runtime reads and says, beside the numbers they were."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from adaptkit.export.embeddings import shortened

COUNT, WIDTH = 32768, 32
IDS = np.array([[0, 5, COUNT - 1]])


def graph(dtype: type = np.float32, width: int = WIDTH, more: tuple = ()) -> onnx.ModelProto:
    """Words are read from a table, and said by the same one, as tied models do."""
    table = np.random.default_rng(0).standard_normal((COUNT, width)).astype(dtype)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["read"], "read"),
        helper.make_node("Transpose", ["table"], ["turned"], "turned", perm=[1, 0]),
        helper.make_node("MatMul", ["read", "turned"], ["said"], "said"),
        *more,
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outputs = [helper.make_tensor_value_info(n, kind, ["batch", "sequence", n]) for n in ("read", "said")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])
    made = helper.make_graph(nodes, "words", [ids], outputs, [numpy_helper.from_array(table, "table")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [v.astype("f8") for v in session.run(["read", "said"], {"ids": IDS})]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_short_table_is_read_and_said(dtype: type):
    """Words that are read lie within half a step of 8 bits; both operations share the numbers, a quarter of the bytes."""
    model = graph(dtype)
    long, (read, said) = len(model.SerializeToString()), run(model)
    assert shortened(model, []) == 1
    onnx.checker.check_model(model)
    got, spoken = run(model)

    step = np.abs(read.reshape(-1, 32)).max(1).reshape(1, -1, 1) / 127
    assert np.abs(got - read).max() > 0 and np.all(np.abs(got - read) <= step / 2 * 1.05 + 1e-3 * (dtype is np.float16))
    assert np.abs(spoken - said).max() < 0.02 * np.abs(said).max()
    assert [n.op_type for n in model.graph.node] == ["Reshape", "GatherBlockQuantized", "MatMulNBits"]
    assert len(model.SerializeToString()) < long * (0.3 if dtype is np.float32 else 0.6)


def test_what_else_reads_a_table_keeps_it():
    """An operation without a short form still finds the long numbers."""
    model = graph(more=(helper.make_node("ReduceSum", ["table"], ["sum"], "sum"),))
    shortened(model, [])
    assert "table" in {t.name for t in model.graph.initializer}
    assert "Transpose" not in {n.op_type for n in model.graph.node}


@pytest.mark.parametrize("width, left", [(33, []), (WIDTH, ["read"])])
def test_a_table_that_does_not_fit_is_left_alone(width: int, left: list[str]):
    """Rows that are no whole blocks, and nodes that are to be left."""
    model = graph(width=width)
    before = model.SerializeToString(deterministic=True)
    assert shortened(model, left) == 0
    assert model.SerializeToString(deterministic=True) == before
