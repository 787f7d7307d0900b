"""Where ONNX Runtime can run. A list of providers says what it was built with, not what works: a session says that."""

from __future__ import annotations

from . import extra

CUDA = "CUDAExecutionProvider"


def has_cuda() -> bool:
    """Whether a session really gets CUDA."""
    runtime = extra.runtime()
    if CUDA not in runtime.get_available_providers():
        return False
    import onnx
    from onnx import TensorProto, helper

    same = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    model = helper.make_model(
        helper.make_graph([same], "try", [x], [y]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(onnx.ModelProto.SerializeToString(model), options, providers=[CUDA])
    return CUDA in session.get_providers()


def device_of(asked: str) -> str:
    """ "cuda" where it was asked for or may be had, "cpu" else."""
    if asked == "auto":
        return "cuda" if has_cuda() else "cpu"
    return asked
