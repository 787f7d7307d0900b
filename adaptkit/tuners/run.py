"""How thin updates run on a live module: beside the base's own output, never as a dense matrix.

y = base(x) + s B A x     for each kind of module that LoRA stands on
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora import LoRA


def thin(tuner: LoRA, base: Any, p: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """base(x) + s B A x, in the dtype of the factors, returned in the dtype of the base's output."""
    import torch.nn.functional as F

    y = base(x, *args, **kwargs)
    module = bottom(base)
    A, B = p["A"], p["B"]
    if tuner.embedding:
        h = F.embedding(x, A.T, module.padding_idx) @ B.T
        # some families (Gemma 3) scale what they look up, the update with it
        return y + (tuner.scale * h * getattr(module, "embed_scale", 1.0)).to(y.dtype)
    if tuner.dropout:
        x = F.dropout(x, tuner.dropout, module.training)
    h = _convolved(module, x, A, B) if A.ndim > 2 else F.linear(F.linear(x.to(A.dtype), A), B)
    if "c" in p:
        h = h + p["c"].reshape(-1, *[1] * (A.ndim - 2)) if A.ndim > 2 else h + p["c"]
    return y + (tuner.scale * h).to(y.dtype)


def _convolved(module: Any, x: Any, A: Any, B: Any) -> Any:
    """A as the module's own kind of convolution, with its padding and dilation; B mixes the channels."""
    import torch.nn.functional as F

    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[A.ndim]
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    return convolve(convolve(x.to(A.dtype), A, None, module.stride, padding, module.dilation), B)


def bottom(base: Any) -> Any:
    """The torch module at the bottom of adapters that stand on each other."""
    while not hasattr(base, "training"):
        base = base.args[0]
    return base
