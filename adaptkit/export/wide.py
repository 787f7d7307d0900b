"""A model that computes one size up, one module's numbers at a time: how much of an answer is rounding.

float32 -> float64, float16 and bfloat16 -> float32. The widened numbers live while their module runs; a head or an
embedding of a large vocabulary is widened in parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 1 << 22  # numbers that are widened at once
WIDE = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[nn.Module]:
    """The model, whose modules widen their numbers for as long as they run."""
    narrow = next(p.dtype for p in model.parameters() if p.dtype in WIDE)
    wide = WIDE[narrow]
    kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def up(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(wide) if value.dtype is narrow else value
        if type(value) in (list, tuple):
            return type(value)(up(v) for v in value)
        return {k: up(v) for k, v in value.items()} if type(value) is dict else value

    parts = [m for m in model.modules() if _in_parts(m)]

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        kept[module] = [(t, t.data) for t in _own(module) if t.dtype is narrow and module not in parts]
        for t, data in kept[module]:
            t.data = data.to(wide)
        return up(args), up(kwargs)

    def after(module: nn.Module, *_: Any) -> None:
        for t, data in kept.pop(module, ()):
            t.data = data

    handles = []
    for module in parts:
        module.forward = _piecewise(module, wide)
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for module in parts:
            del module.forward
        for module in reversed(list(kept)):
            after(module)


def _in_parts(module: nn.Module) -> bool:
    """Whether a module is a plain one with many numbers. One with a forward of its own is left alone."""
    plain = type(module) in (nn.Linear, nn.Embedding) and not list(module.children())
    return plain and module.weight.numel() > LARGE and "forward" not in vars(module)  # type: ignore[operator]


def _piecewise(module: nn.Module, wide: torch.dtype) -> Any:
    """The forward of a large module whose numbers are widened piece by piece, each as it is needed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        return lambda ids: F.embedding(ids, weight).to(wide)
    rows = max(1, LARGE // weight.shape[1])

    def forward(x: Tensor) -> Tensor:
        y = torch.cat([F.linear(x, w.to(wide)) for w in weight.split(rows)], -1)
        return y if module.bias is None else y + module.bias.to(wide)  # type: ignore[operator]

    return forward


def _own(module: nn.Module) -> list[Tensor]:
    """Numbers that stand on a module itself, those of nn.MultiheadAttention's projection and of adapters with it."""
    found = [*module._parameters.values(), *module._buffers.values()]
    held = [m for child in module.children() if isinstance(child, nn.ModuleDict) for m in child.modules()]
    found += [t for m in held if isinstance(m, nn.ParameterDict) for t in m._parameters.values()]
    if isinstance(module, nn.MultiheadAttention):
        found += module.out_proj._parameters.values()
    return [t for t in found if t is not None]
