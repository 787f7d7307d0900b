"""BD-LoRA: LoRA with one block-diagonal factor, stored without its zeros. https://arxiv.org/abs/2510.23346

W' = W + s B A     A: (r, in / n) when A is block-diagonal, or B: (out, r / n) when B is
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import Mismatch
from .base import Array, Params
from .lora import LoRA


@dataclass(frozen=True)
class BDLoRA(LoRA):
    """W' = W + s B A     one factor is a block diagonal of `blocks` chunks of its rows"""

    name = "bdlora"

    side: Literal["A", "B"] = "A"
    blocks: int = 1

    def init(self, base: Any) -> Params:
        p = super().init(base)
        return {**p, self.side: p[self.side][:, : p[self.side].shape[1] // self.blocks].clone()}

    def factors(self, p: Params) -> tuple[Array, Array, float]:
        return super().factors({**p, self.side: block_diagonal(p[self.side], self.blocks)})

    def weight(self, W: Array, p: Params) -> Array:
        L, R, s = self.factors(p)
        return W + s * (L @ R)

    def forward(self, base: Any, p: Params, *args: Any, **kwargs: Any) -> Any:
        return super().forward(base, {**p, self.side: block_diagonal(p[self.side], self.blocks)}, *args, **kwargs)

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> LoRA:
        rows, columns = shapes[self.side]
        if rows % self.blocks:
            raise Mismatch(f"{self.side} has {rows} rows, which are not {self.blocks} equal blocks")
        full = {**shapes, self.side: (rows, columns * self.blocks)}
        return replace(super().fit(shape, full, square), side=self.side, blocks=self.blocks)


def block_diagonal(M: Array, n: int) -> Array:
    """The dense matrix whose diagonal blocks are the n row chunks of M. M: (rows, c)   returns (rows, n c)"""
    rows, c = M.shape
    chunk = rows // n
    mask = _like(M, [[float(i // chunk == j) for j in range(n)] for i in range(rows)])
    return (mask[:, :, None] * M[:, None, :]).reshape(rows, n * c)


def _like(M: Array, values: list) -> Array:
    import numpy as np

    return np.asarray(values, dtype=M.dtype) if isinstance(M, np.ndarray) else M.new_tensor(values)
