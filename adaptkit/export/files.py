"""<name>.onnx_adapter: named tensors that ONNX Runtime feeds to a graph's slots, by its AdapterFormat.

Two adapters in one run are not added up: for each tensor the first one is taken, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import Mismatch, quoted
from .extra import runtime

SUFFIX = ".onnx_adapter"
TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # of ONNX's TensorProto


def write(path: Path, numbers: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """Write an adapter in the dtype of the graph it is for. Raises Mismatch where a number is too large for that."""
    ort = runtime()
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    short = {name: _rounded(name, value, dtype) for name, value in numbers.items()}
    make = ort.OrtValue.ortvalue_from_numpy_with_onnx_type  # looks at the array's memory, which must stay until the end
    file.set_parameters({name: make(value, TYPES[dtype]) for name, value in short.items()})
    file.export_adapter(str(path))


def _rounded(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor in the graph's dtype: the one rounding. bfloat16 as the bits that it is."""
    import ml_dtypes

    with np.errstate(over="ignore"):
        short = np.ascontiguousarray(value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    if not np.isfinite(short.astype("f4")).all():
        said = "is not finite" if not np.isfinite(value).all() else f"is too large for {dtype}"
        raise Mismatch(f"a number of {quoted(name)} {said}")
    return short.view("u2") if dtype == "bfloat16" else short


def size(numbers: Mapping[str, np.ndarray], width: int) -> int:
    """About how many bytes the file of an adapter has.    width: of a number."""
    return sum(v.size * width + len(n) + 256 for n, v in numbers.items())
