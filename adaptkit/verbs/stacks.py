"""A stack of expert matrices as one LoRA site: each expert's difference made thin, all with the rank of the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from ..adapter import Site
from ..algebra.randomised import Thin
from ..engines.difference import difference
from ..engines.pairs import Pair
from ..store.entry import Entry
from ..tuners.experts import ExpertLoRA


def thin(pair: Pair, make: Callable[[np.ndarray, str], Thin]) -> Thin | None:
    """The thin difference of a stack, read one expert at a time; None when nothing changed.

    L: (experts, out, r)    R: (experts, r, in)    values: (r,), all experts' together.    make: of one expert's matrix.
    """
    found: list[Thin | None] = []
    for e, (new, old) in enumerate(zip(_experts(pair.finetuned), _experts(pair.base), strict=True)):
        D = difference(new, old)
        found.append(None if D is None else make(D, f"{pair.name}[{e}]"))
    changed = [t for t in found if t is not None]
    if not changed:
        return None
    r, (out, into) = max(t.rank for t in changed), pair.finetuned.shape[1:]
    L, R = np.zeros((len(found), out, r), "f4"), np.zeros((len(found), r, into), "f4")
    values = np.zeros(r)
    for e, t in enumerate(found):
        if t is not None:
            L[e, :, : t.rank], R[e, : t.rank] = t.L, t.R
            values[: t.rank] = np.hypot(values[: t.rank], t.values)
    norm, error = (math.hypot(*(getattr(t, field) for t in changed)) for field in ("norm", "error"))
    return Thin(L, R, values, norm, error, max(t.excess for t in changed))


def _experts(entry: Entry) -> Iterator[Entry]:
    """Each matrix of a stack that lies in one piece."""
    size = entry.nbytes // entry.shape[0]
    for e in range(entry.shape[0]):
        yield replace(entry, shape=entry.shape[1:], offset=entry.offset + e * size, nbytes=size, crc=0)


def site(found: Thin, turned: bool) -> Site:
    """The site of a stack. turned: the model keeps its experts as (in, out), and PEFT adds what it packs transposed."""
    L, R = (found.R.swapaxes(1, 2), found.L.swapaxes(1, 2)) if turned else (found.L, found.R)
    experts, out, r = L.shape
    A, B = R.reshape(experts * r, -1), L.transpose(1, 2, 0).reshape(out, r * experts)
    tuner = ExpertLoRA(r=r, alpha=float(r), transposed=turned)
    return Site(tuner, {"A": np.ascontiguousarray(A), "B": np.ascontiguousarray(B)})
