"""(IA)^3, Liu et al. 2022, https://arxiv.org/abs/2205.05638.

side "out":  y' = l * y,    W' = l[:, None] * W,  b' = l * b     l: (out,)
side "in":   y' = f(l * x), W' = W * l[None, :]                  l: (in,)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Mismatch
from .base import Array, Params, Tuner
from .run import bottom


@dataclass(frozen=True)
class IA3(Tuner):
    """W' = l * W     l: (out,), or (in,) on the "in" side"""

    name = "ia3"
    arrays = "any"

    feedforward: bool = False  # l multiplies the input
    transposed: bool = False  # the weight is stored as (in, out)

    def init(self, base: Any) -> Params:
        W = base.weight.detach().float()
        if W.ndim > 2 and getattr(base, "groups", 1) != 1 and self.feedforward:
            raise Mismatch(f"IA3 on the input of a convolution with {base.groups} groups is not supported")
        n = W.shape[self._axis]
        return {"l": W.new_ones(1, n, *[1] * (W.ndim - 2)) if W.ndim > 2 else W.new_ones(n)}

    @property
    def _axis(self) -> int:
        return int(self.feedforward != self.transposed)

    def weight(self, W: Array, p: Params) -> Array:
        shape = [1] * W.ndim
        shape[self._axis] = -1
        return W * p["l"].reshape(shape)

    def forward(self, base: Any, p: Params, x: Any, *args: Any, **kwargs: Any) -> Any:
        module = bottom(base)
        l = p["l"]
        channels = type(module).__name__.startswith("Conv") and module.weight.ndim > 2
        l = l.reshape(-1, *[1] * (module.weight.ndim - 2)) if channels else l.reshape(-1)
        if self.feedforward:
            return base((x.to(l.dtype) * l).to(x.dtype), *args, **kwargs)
        y = base(x, *args, **kwargs)
        return (y * l).to(y.dtype)

    def bias(self, b: Array, p: Params) -> Array:
        return b * p["l"].reshape(-1) if self.changes_bias(p) else b

    def changes_bias(self, p: Params) -> bool:
        return not self.feedforward

    def rows(self, p: Params, start: int, stop: int) -> Params:
        return {"l": p["l"].reshape(-1)[start:stop]} if self._axis == 0 else p

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> IA3:
        n = math.prod(shapes["l"])
        if len(shape) < 2 or n != max(shapes["l"], default=0):
            raise Mismatch(f"l is {list(shapes['l'])}, the model's weight is {list(shape)}")
        fits = [t for t in (False, True) if shape[int(self.feedforward != t)] == n and not (t and len(shape) > 2)]
        if not fits:
            raise Mismatch(f"l has {n} values, the model's weight is {list(shape)}")
        return replace(self, transposed=square if len(fits) == 2 else fits[0])

    def inverse(self, p: Params) -> tuple[IA3, Params]:
        if not (p["l"] != 0).all():
            raise Mismatch("l has zeros: what they multiplied is gone", hint="keep the base model")
        return self, {"l": 1 / p["l"]}
