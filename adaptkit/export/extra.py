"""The packages that exporting needs, and the one place where onnxruntime is imported: without its telemetry."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from ..errors import Mismatch

PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported; it writes into HOME otherwise


def need() -> None:
    """Raises Mismatch that says what to install when a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Mismatch(f"exporting needs {', '.join(missing)}", hint="pip install adaptkit[onnx]")


def runtime() -> Any:
    """The module onnxruntime."""
    return importlib.import_module("onnxruntime")
