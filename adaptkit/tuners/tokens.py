"""Trainable tokens: some rows of an embedding, replaced.

W'[index] = rows     index: (n,)   rows: (n, width)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Mismatch
from .base import Array, Params, Tuner
from .run import bottom


@dataclass(frozen=True)
class Tokens(Tuner):
    """W'[index] = rows     index: (n,)   rows: (n, width)"""

    name = "tokens"
    arrays = "any"
    of_rows = True

    def weight(self, W: Array, p: Params) -> Array:
        if hasattr(W, "index_copy"):  # torch's own, which gradients flow through
            return W.index_copy(0, p["index"], p["rows"])
        W[p["index"]] = p["rows"]
        return W

    def forward(self, base: Any, p: Params, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows looked up, or, where the matrix is the output head, products with the rows."""
        from torch import nn

        y, module = base(x, *args, **kwargs), bottom(base)
        index, rows = p["index"], p["rows"]
        if not isinstance(module, nn.Embedding):
            return y.index_copy(-1, index, (x.to(rows.dtype) @ rows.T).to(y.dtype))
        of = index.new_full((module.num_embeddings,), -1)
        of[index] = index.new_tensor(range(len(index)))
        which = of[x]
        # some families (Gemma 3) scale what they look up
        mine = rows[which.clamp(min=0)] * getattr(module, "embed_scale", 1.0)
        return mine.to(y.dtype).where((which >= 0).unsqueeze(-1), y)

    def rows(self, p: Params, start: int, stop: int) -> Params:
        mine = (p["index"] >= start) & (p["index"] < stop)
        return {"index": p["index"][mine] - start, "rows": p["rows"][mine]}

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> Tokens:
        n, width = shapes["rows"] if len(shapes["rows"]) == 2 else (0, 0)
        if shapes["index"] != (n,) or len(shape) != 2 or width != shape[1]:
            raise Mismatch(
                f"{shapes['index'][0]} token indices with rows {list(shapes['rows'])}, the embedding is {list(shape)}"
            )
        return self
