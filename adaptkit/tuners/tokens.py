"""Trainable tokens: some rows of an embedding, replaced.

W'[index] = rows     index: (n,)   rows: (n, width)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import Mismatch
from .base import Array, Params, Tuner


@dataclass(frozen=True)
class Tokens(Tuner):
    """W'[index] = rows     index: (n,)   rows: (n, width)"""

    name = "tokens"
    arrays = "any"

    def weight(self, W: Array, p: Params) -> Array:
        W[p["index"]] = p["rows"]
        return W

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
