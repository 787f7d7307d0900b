"""Where the numbers of an onnx.TensorProto lie when they are in a file beside its graph."""

from __future__ import annotations

from typing import Any


def where(tensor: Any) -> dict[str, str]:
    """location, offset and length, as far as the graph says them; nothing for numbers inside it."""
    return {entry.key: entry.value for entry in tensor.external_data}


def point(tensor: Any, **said: object) -> None:
    """Let a tensor's numbers lie elsewhere; what is not said stays."""
    kept = where(tensor) | {key: str(value) for key, value in said.items()}
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
