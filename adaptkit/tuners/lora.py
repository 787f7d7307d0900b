"""LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA, Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.

W' = W + s B A     s = alpha / r, or alpha / sqrt(r)     A: (r, in)   B: (out, r)
b' = b + s c       c: (out,), the trained bias of B, if there is one

A convolution's kernel is read as the matrix (out, in * k...). A weight stored as (in, out), as in GPT-2's Conv1D or an
embedding, gets the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Mismatch
from .base import Array, Params, Tuner


@dataclass(frozen=True)
class LoRA(Tuner):
    """W' = W + s B A     A: (r, in)   B: (out, r)   s = alpha / r"""

    name = "lora"
    arrays = "any"

    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    transposed: bool = False  # the weight is stored as (in, out)
    embedding: bool = False  # the module looks rows up
    dropout: float = 0.0  # of the input, while training

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, base: Any) -> Params:
        """A: uniform as Linear's weight, B: zero; on an embedding A is zero and B normal, as it was introduced."""
        import torch
        from torch import nn

        W = base.weight.detach()
        like = W.new_empty(0, dtype=torch.float32)
        if self.embedding:
            return {"A": like.new_zeros(self.r, W.shape[0]), "B": nn.init.normal_(like.new_empty(W.shape[1], self.r))}
        if W.ndim > 2:
            if getattr(base, "groups", 1) != 1:
                raise Mismatch(f"LoRA on a convolution with {base.groups} groups has no merged weight")
            A = like.new_empty(self.r, *W.shape[1:])
            B = like.new_zeros(W.shape[0], self.r, *[1] * (W.ndim - 2))
        else:
            into, out = W.shape if self.transposed else W.shape[::-1]
            A, B = like.new_empty(self.r, into), like.new_zeros(out, self.r)
        return {"A": nn.init.kaiming_uniform_(A, a=math.sqrt(5)), "B": B}

    def weight(self, W: Array, p: Params) -> Array:
        L, R, s = LoRA.factors(self, p)
        return W + (s * (L @ R)).reshape(W.shape)

    def forward(self, base: Any, p: Params, *args: Any, **kwargs: Any) -> Any:
        from .run import thin

        return thin(self, base, p, *args, **kwargs)

    def bias(self, b: Array, p: Params) -> Array:
        return b + self.scale * p["c"] if "c" in p else b

    def changes_bias(self, p: Params) -> bool:
        return "c" in p

    def factors(self, p: Params) -> tuple[Array, Array, float]:
        A, B = p["A"].reshape(self.r, -1), p["B"].reshape(-1, self.r)
        return (A.T, B.T, self.scale) if self.transposed else (B, A, self.scale)

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> LoRA:
        A, B = shapes["A"], shapes["B"]
        if not self._right_rank(A, B):
            raise Mismatch(f"A {list(A)} and B {list(B)} are not of rank {self.r}")
        if len(shape) < 2:
            raise Mismatch(f"LoRA needs a matrix, the model has {list(shape)}")
        into, out = math.prod(A[1:]), B[0]
        plain = len(A) in (2, len(shape)) and (out, into) == (shape[0], math.prod(shape[1:]))
        turned = len(A) == len(shape) == 2 and (into, out) == shape
        if plain and turned:
            return replace(self, transposed=square)
        if plain or turned:
            return replace(self, transposed=turned)
        raise Mismatch(_misfit(shape, A, into, out))

    def _right_rank(self, A: tuple[int, ...], B: tuple[int, ...]) -> bool:
        return len(A) >= 2 and len(B) == len(A) and A[0] == self.r > 0 and B[1] == self.r and math.prod(B[2:]) == 1

    def inverse(self, p: Params) -> tuple[LoRA, Params]:
        return replace(self, alpha=-self.alpha), p


def _misfit(shape: tuple[int, ...], A: tuple[int, ...], into: int, out: int) -> str:
    if len(shape) > 2 and len(A) == len(shape) and A[1] != shape[1] and A[1] % shape[1] == 0:
        return f"the convolution has {A[1] // shape[1]} groups, and LoRA on a grouped convolution has no merged weight"
    if len(A) not in (2, len(shape)):
        return f"A is {len(A)}-dimensional {list(A)}, the model's weight is {list(shape)}"
    return f"the adapter is for {into} -> {out}, the model's weight is {list(shape)}"
