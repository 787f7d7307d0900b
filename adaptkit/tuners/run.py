"""How thin updates run on a live module: beside the base's own output, never as a dense matrix.

y = base(x) + s B A x     for each kind of module that LoRA stands on
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora import LoRA


def thin(tuner: LoRA, base: Any, p: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """base(x) + s B A x, in the dtype of the factors, returned in the dtype of the base's output.

    With A0 and B0, what the start took out: base(x) + s (B A - B0 A0) x.
    """
    y = base(x, *args, **kwargs)
    module = bottom(base)
    h = update(tuner, module, p, dropped(tuner, module, x))
    if "A0" in p:
        h = h - update(tuner, module, {"A": p["A0"], "B": p["B0"]}, x)
    return y + h.to(y.dtype)


def dropped(tuner: LoRA, module: Any, x: Any) -> Any:
    """The input with dropout, while the module trains."""
    import torch.nn.functional as F

    return F.dropout(x, tuner.dropout, module.training) if tuner.dropout and not tuner.embedding else x


def update(tuner: LoRA, module: Any, p: Any, x: Any) -> Any:
    """s B A x (+ s c), as the module's own kind of operation."""
    import torch.nn.functional as F

    A, B = p["A"], p["B"]
    if tuner.embedding:
        h = F.embedding(x, A.T, module.padding_idx) @ B.T
        # some families (Gemma 3) scale what they look up, the update with it
        return tuner.scale * h * getattr(module, "embed_scale", 1.0)
    if A.ndim > 2:
        h = convolved(module, convolved(module, x.to(A.dtype), A), B, point=True)
    else:
        h = F.linear(F.linear(x.to(A.dtype), A), B)
    if "c" in p:
        h = h + broadcast(p["c"], A.ndim)
    return tuner.scale * h


def convolved(module: Any, x: Any, kernel: Any, point: bool = False) -> Any:
    """A kernel as the module's own kind of convolution; a point kernel mixes channels only."""
    import torch.nn.functional as F

    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernel.ndim]
    if point:
        return convolve(x, kernel)
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    return convolve(x, kernel, None, module.stride, padding, module.dilation, module.groups)


def unbiased(module: Any, x: Any, transposed: bool) -> Any:
    """The module's output without its bias."""
    import torch.nn.functional as F

    W = module.weight
    if W.ndim > 2:
        return convolved(module, x.to(W.dtype), W)
    return F.linear(x.to(W.dtype), W.T if transposed else W)


def broadcast(v: Any, ndim: int) -> Any:
    """A vector over channels, for the output of a module whose weight has ndim dimensions."""
    return v.reshape(-1, *[1] * (ndim - 2)) if ndim > 2 else v.reshape(-1)


def bottom(base: Any) -> Any:
    """The torch module at the bottom of adapters that stand on each other."""
    while not hasattr(base, "training"):
        base = base.args[0]
    while hasattr(base, "base_layer"):  # another parameter of the same module is adapted
        base = base.base_layer
    return base
