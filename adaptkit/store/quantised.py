"""Bases whose stored numbers are not the weights: recognised, and refused with what to do instead."""

from __future__ import annotations

from pathlib import Path

from ..errors import Mismatch, quoted
from .checkpoint import Checkpoint

# endings of tensors that only quantised checkpoints have: GPTQ and AWQ, bitsandbytes, FP8 blocks, compressed-tensors, MXFP4
MARKS = (
    ".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_scale_inv", ".weight_packed", "_blocks", ".weight_scale",
)  # fmt: skip
HINT = "merge into the 16-bit model it was made from, then quantise the result"


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raises Mismatch when adding to the stored numbers would not be adding to the model."""
    settings = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if settings:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise Mismatch(f"the base is quantised ({quoted(method)})", where=_where(checkpoint), hint=HINT)
    name = next((n for n in checkpoint.entries if n.endswith(MARKS) or ".quant_state." in n), None)
    if name is not None:
        raise Mismatch(f"the base is quantised (it holds {quoted(name)})", where=_where(checkpoint), hint=HINT)


def _where(checkpoint: Checkpoint) -> str:
    return Path(checkpoint.path).name
