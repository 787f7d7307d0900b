"""The first singular values and vectors of a dense matrix, by a randomised range finder whose error is checked.

Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061, with subspace iteration: Q spans (D D')^q D W for a random
W, and Q Q' D is decomposed. The squared error is |D|^2 less the squares kept, exactly; the iteration goes on until one
more step would not lower the error, and when it does not settle the whole decomposition is made instead.

NumPy arrays and torch tensors both work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .lowrank import Array, Spectrum, library, like, numpy

OVERSAMPLING = 16
STEPS = 8
SETTLED = 1e-3  # of the tail's energy: what one more step may still gain
SMALL = 128  # a matrix with a side up to this is decomposed whole


def truncated(D: Array, rank: int, random: np.random.Generator) -> Spectrum:
    """U s V of the best approximation of D of rank `rank`, to 0.1 % of its error. D: (m, n), float32"""
    rank, width = min(rank, *D.shape), min(rank, *D.shape) + OVERSAMPLING
    peak = float(abs(D).max()) if 0 not in D.shape else 0.0
    scale = 2.0 ** int(np.clip(np.frexp(peak)[1], -120, 120)) if peak else 1.0
    D = D / scale
    found = None if min(D.shape) <= max(SMALL, 2 * width) else _iterated(D, rank, width, random)
    U, s, V = found or exact(D)
    return Spectrum(U[:, :rank], s[:rank] * scale, V[:rank])


def exact(D: Array) -> tuple[Array, np.ndarray, Array]:
    """The whole decomposition."""
    wide = D.astype("f8") if isinstance(D, np.ndarray) else D
    U, s, V = library(D).linalg.svd(wide, full_matrices=False)
    return U, numpy(s).astype("f8"), V


def _iterated(D: Array, rank: int, width: int, random: np.random.Generator) -> tuple[Any, np.ndarray, Any] | None:
    """None when the error has not settled after STEPS."""
    qr = library(D).linalg.qr
    total = _squares(D)
    Q = qr(D @ like(random.standard_normal((D.shape[1], width), dtype="f4"), D))[0]
    kept = -1.0
    for _ in range(STEPS):
        back = D.T @ Q
        P, T = qr(back)
        X, s, Y = np.linalg.svd(numpy(T).astype("f8").T)  # Q' D = T' P'
        before, kept = kept, float((s[:rank] ** 2).sum())
        tail = total - kept
        if tail <= 1e-12 * total or (before >= 0 and kept - before <= SETTLED * tail):
            return Q @ like(X, D), s, like(Y, D) @ P.T
        Q = qr(D @ P)[0]
    return None


def _squares(D: Array) -> float:
    if not isinstance(D, np.ndarray):
        return float(D.double().square().sum())
    return float(sum((D[i : i + 256].astype("f8") ** 2).sum() for i in range(0, D.shape[0], 256)))
