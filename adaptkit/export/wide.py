"""A model that computes one size up, one module's numbers at a time: how much of an answer is rounding.

float32 -> float64, float16 and bfloat16 -> float32. The widened numbers live while their module runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

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

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        kept[module] = [(t, t.data) for t in _own(module) if t.dtype is narrow]
        for t, data in kept[module]:
            t.data = data.to(wide)
        return up(args), up(kwargs)

    def after(module: nn.Module, *_: Any) -> None:
        for t, data in kept.pop(module, ()):
            t.data = data

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for module in reversed(list(kept)):
            after(module)


def _own(module: nn.Module) -> list[Tensor]:
    """Numbers that stand on a module itself, those of nn.MultiheadAttention's projection and of adapters with it."""
    found = [*module._parameters.values(), *module._buffers.values()]
    held = [m for child in module.children() if isinstance(child, nn.ModuleDict) for m in child.modules()]
    found += [t for m in held if isinstance(m, nn.ParameterDict) for t in m._parameters.values()]
    if isinstance(module, nn.MultiheadAttention):
        found += module.out_proj._parameters.values()
    return [t for t in found if t is not None]
