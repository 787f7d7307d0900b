"""DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353.

W' = m * V / |V|     V = W + s B A     A: (r, in)   B: (out, r)   m: (out,)     |V|: the norm of each output row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Mismatch
from .base import Array, Params, Tuner
from .lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m * V / |V|     V = W + s B A     m: (out,)"""

    name = "dora"
    noise = 8.0  # W and D may cancel before they are divided by the norm
    follows = False  # its norm is that of the unchanged base weight

    def init(self, base: Any) -> Params:
        W = base.weight.detach().float()
        return {**super().init(base), "m": norms(W, self.transposed).reshape(-1)}

    def weight(self, W: Array, p: Params) -> Array:
        return renormed(super().weight(W, p), p["m"], self.transposed)

    def forward(self, base: Any, p: Params, *args: Any, **kwargs: Any) -> Any:
        """y + (g - 1) W x + g s B A x     g = m / |V|; only g needs the dense V, and no gradient goes through it."""
        if self.embedding or not hasattr(base, "named_parameters"):
            return Tuner.forward(self, base, p, *args, **kwargs)
        from .run import bottom, broadcast, dropped, unbiased, update

        module, (x, *rest) = bottom(base), args
        y, kept = base(x, *rest, **kwargs), dropped(self, module, x)
        W = module.weight.detach().to(p["A"].dtype)
        n = norms(LoRA.weight(self, W, {k: p[k].detach() for k in "AB"}), self.transposed)
        g = broadcast(p["m"].reshape(-1) / n.reshape(-1), W.ndim)
        change = (g - 1) * unbiased(module, kept, self.transposed) + g * update(self, module, p, kept)
        return y + change.to(y.dtype)

    def factors(self, p: Params) -> None:
        return None

    def rows(self, p: Params, start: int, stop: int) -> Params | None:
        return None if self.transposed else {"A": p["A"], "B": p["B"][start:stop], "m": p["m"].reshape(-1)[start:stop]}

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> DoRA:
        fitted = super().fit(shape, shapes, square)
        n, out = max(shapes["m"]), shapes["B"][0]
        if n != out:
            raise Mismatch(f"the magnitude vector has {n} values, B has {out} rows")
        return fitted

    def inverse(self, p: Params) -> tuple[Tuner, Params]:
        return Tuner.inverse(self, p)


def renormed(V: Array, m: Array, transposed: bool) -> Array:
    """m * V / |V|, by output rows."""
    n = norms(V, transposed)
    n = n.detach() if hasattr(n, "detach") else n  # the paper treats the norm as a constant for gradients
    return V * (m.reshape(n.shape) / n)


def norms(V: Array, transposed: bool) -> Array:
    """|V| of each output row, in a shape that broadcasts."""
    axes = 0 if transposed else tuple(range(1, V.ndim))
    return (V * V).sum(axis=axes, keepdims=True) ** 0.5
