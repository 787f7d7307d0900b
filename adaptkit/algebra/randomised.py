"""The best matrix of rank r, from a few products with D:  D ~ L R,  |D - L R|^2 = |D|^2 - s_1^2 - ... - s_r^2.

Block Krylov iteration from a random start: Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061, with all
blocks kept, as in Musco and Musco 2015, https://arxiv.org/abs/1504.05477. With Q an orthonormal basis of D W, D D' D W,
..., the best rank-r part of Q Q' D is the answer. The products that the iteration makes are all that is needed for it.

NumPy arrays and torch tensors both work; sums are made in float32 for the large products and in float64 for the small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor
OVERSAMPLING = 16
STEPS = 5  # blocks at most, before the whole decomposition is made instead
EXCESS = 1e-3  # of the smallest possible error: what the iteration goes on for
WORST = 0.01  # the excess above which the whole decomposition is made
LOW, HIGH = 1e-12, 1e15  # norms whose square float32 holds well
SMALL = 96  # a matrix with a side up to this is decomposed whole


@dataclass
class Thin:
    """D ~ L R.

    L: (m, r)    R: (r, n)    values: (r,), the singular values that are kept, largest first.
    norm: |D|_F    error: |D - L R|_F    excess: how much larger than the smallest possible error it may be, estimated.
    """

    L: Array
    R: Array
    values: np.ndarray
    norm: float
    error: float
    excess: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def energy(self) -> float:
        """The share of the squared singular values that is kept."""
        return 1.0 if self.norm == 0 else max(0.0, 1 - (self.error / self.norm) ** 2)


def truncated(D: Array, rank: int, seed: int | list[int] = 0, norm: float | None = None) -> Thin:
    """The best approximation of rank `rank`, at most (1 + WORST) of the smallest possible error.

    D: (m, n), float32 or float64, finite.    norm: |D|_F when it is known already.
    The rank is at most min(m, n). Matrices that are small, or for which the iteration does not settle, get an exact SVD.
    """
    norm = frobenius(D) if norm is None else norm
    rank = min(rank, *D.shape)
    if not LOW < norm < HIGH and rank and (scale := _scale(D)) != 1:
        return _scaled(truncated(D * (1 / scale), rank, seed), scale)
    if norm == 0 or rank == 0:
        return _nothing(D, rank, norm)
    width = rank + OVERSAMPLING
    if min(D.shape) <= max(SMALL, 2 * width):
        return exact(D, rank, norm)
    if D.shape[0] < D.shape[1]:  # the basis is made on the longer side, where its blocks are applied transposed
        found = _iterated(D.T, rank, width, seed, norm)
        found = found and Thin(found.R.T, found.L.T, found.values, norm, found.error, found.excess)
    else:
        found = _iterated(D, rank, width, seed, norm)
    return found or exact(D, rank, norm)


def holding(
    D: Array, energy: float, seed: int | list[int] = 0, norm: float | None = None, most: int | None = None
) -> Thin:
    """The approximation of the smallest rank that keeps a share of the squared singular values.

    energy: between 0 and 1.    most: the largest rank allowed, which then keeps less than asked for.
    """
    norm = frobenius(D) if norm is None else norm
    if not LOW < norm < HIGH and (scale := _scale(D)) != 1:
        return _scaled(holding(D * (1 / scale), energy, seed, None, most), scale)
    most = min(D.shape) if most is None else min(most, *D.shape)
    rank = min(32, most)
    while True:
        found = truncated(D, rank, seed, norm)
        if found.energy >= energy or rank >= most:
            return cut(found, smallest_rank(found, energy))
        rank = min(4 * rank, most)
        rank = most if 4 * rank > min(D.shape) else rank  # near the full rank nothing is saved by guessing


def smallest_rank(found: Thin, energy: float) -> int:
    """How many of the values hold a share of |D|^2; all of them when they do not."""
    held = np.cumsum(found.values.astype("f8") ** 2)
    # what float32 does not see is not asked for: an energy of 1 would otherwise keep noise
    wanted = min(energy, 1 - 1e-12) * found.norm**2
    return min(int(np.searchsorted(held, wanted)) + 1, len(held)) if len(held) else 0


def cut(found: Thin, rank: int) -> Thin:
    """The same approximation with fewer values."""
    if rank >= found.rank:
        return found
    left = float((found.values[rank:].astype("f8") ** 2).sum())
    error = float(np.sqrt(found.error**2 + left))
    return Thin(found.L[:, :rank], found.R[:rank], found.values[:rank], found.norm, error, found.excess)


def exact(D: Array, rank: int, norm: float) -> Thin:
    """From the whole decomposition, in float64."""
    U, s, V = _linalg(D).svd(_double(D), full_matrices=False)
    values = _numpy(s)
    error = float(np.sqrt((values[rank:] ** 2).sum()))
    return _thin(U[:, :rank], values[:rank], V[:rank], norm, error)


def frobenius(D: Array) -> float:
    """|D|_F, summed in float64 over parts that float32 holds well."""
    if not isinstance(D, np.ndarray):
        return float(D.double().norm())
    flat = D.reshape(-1)
    with np.errstate(over="ignore", under="ignore"):
        return float(np.sqrt(sum(float(np.dot(x, x)) for x in (flat[i : i + 8192] for i in range(0, flat.size, 8192)))))


def residual(D: Array, L: Array, R: Array, rows: int = 1024) -> float:
    """|D - L R|_F, made out row by row: exact where |D|^2 less what is kept has only rounding left."""
    return float(
        np.sqrt(sum(frobenius(D[i : i + rows] - L[i : i + rows] @ R) ** 2 for i in range(0, D.shape[0], rows)))
    )


def _scale(D: Array) -> float:
    """A power of two near the largest value, by which squares stay in range. Raises ValueError for NaN and infinity."""
    peak = float(abs(D).max()) if 0 not in D.shape else 0.0
    if not np.isfinite(peak):
        raise ValueError("holds NaN or infinity")
    return 2.0 ** int(np.clip(np.frexp(peak)[1], -120, 120)) if peak else 1.0


def _scaled(found: Thin, scale: float) -> Thin:
    root = np.float32(np.sqrt(scale))
    values = found.values * scale
    return Thin(found.L * root, found.R * root, values, found.norm * scale, found.error * scale, found.excess)


# the iteration


def _iterated(D: Array, rank: int, width: int, seed: int | list[int], norm: float) -> Thin | None:
    """None when the estimate says that the result could be worse than WORST after STEPS blocks. D: (m, n), m >= n."""
    Q, Z, kept = None, None, []
    start = np.random.default_rng(seed).standard_normal((D.shape[1], width), dtype="f4")
    side = _like(start, D)
    excess = np.inf
    for step in range(STEPS):
        block = _orthonormal(D @ side, Q)
        Q = block if Q is None else _beside(Q, block)
        back = D.T @ block
        Z = back if Z is None else _beside(Z, back)  # Z = D' Q
        values = _singular(Z)
        kept.append(float((values[:rank] ** 2).sum()))
        excess = _excess(kept, values, rank, norm)
        if excess <= EXCESS:
            break
        if step + 1 < STEPS:
            side = _orthonormal(back, None)
    return _assembled(D, Q, Z, rank, norm, excess) if excess <= WORST else None


def _excess(kept: list[float], values: np.ndarray, rank: int, norm: float) -> float:
    """How far above the smallest possible error this may be, from how fast the kept energy still grows.

    What is still to come is taken for a geometric series. Its ratio is seen from the third block on; before, it is taken
    from the gap behind the last value kept, which is careful: only a clear gap, as after a LoRA, ends at two blocks.
    """
    tail = max(norm**2 - kept[-1], 0.0)
    if tail <= 1e-9 * norm**2:
        return 0.0  # of the rank asked for, but for rounding
    if len(kept) == 1:
        return np.inf
    gain = max(kept[-1] - kept[-2], 0.0)
    gap = (values[min(rank, len(values) - 1)] / max(values[rank - 1], 1e-300)) ** 4
    seen = gain / max(kept[-2] - kept[-3], 1e-300) if len(kept) > 2 else gap
    ratio = max(seen, min(gap, 0.5))  # the first gains may be of large values, and say nothing of a flat rest
    ratio = min(max(ratio, 1e-3), 0.9)
    more = gain * ratio / (1 - ratio)
    return float(np.sqrt(tail / (tail - more)) - 1) if more < tail else np.inf


def _assembled(D: Array, Q: Array, Z: Array, rank: int, norm: float, excess: float) -> Thin:
    """Q Z' cut to the rank: Z = V T', T = X s Y', so Q Z' = (Q X) s (Y' V')."""
    values, X = _eigen(Z)
    U, R = Q @ _like(X[:, :rank], D), _like(X[:, :rank], D).T @ Z.T  # R = s V'
    error = float(np.sqrt(max(norm**2 - float((values[:rank] ** 2).sum()), 0.0)))
    if error < 3e-2 * norm:  # a difference of nearly equal squares
        error = residual(D, U, R)
    root = np.sqrt(np.maximum(values[:rank], 1e-30))
    return Thin(U * _like(root, D), R / _like(root, D)[:, None], values[:rank], norm, error, excess)


def _orthonormal(Y: Array, Q: Array | None) -> Array:
    """An orthonormal basis of Y, orthogonal to Q too; twice, since once leaves rounding in."""
    qr = _linalg(Y).qr
    if Q is None:
        return qr(Y)[0]
    for _ in range(2):
        Y = qr(Y - Q @ (Q.T @ Y))[0]
    return Y


def _singular(Z: Array) -> np.ndarray:
    return _eigen(Z)[0]


def _eigen(Z: Array) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of Z, largest first, and its right singular vectors: of Z'Z, which is small, in float64."""
    T = _numpy(_linalg(Z).qr(Z)[1]).astype("f8")
    _, values, X = np.linalg.svd(T)
    return values, X.T


def _thin(U: Array, values: np.ndarray, V: Array, norm: float, error: float) -> Thin:
    root = _like(np.sqrt(values), U)
    L, R = U * root, V * root[:, None]
    return Thin(_single(L), _single(R), values, norm, error)


def _nothing(D: Array, rank: int, norm: float) -> Thin:
    return Thin(D[:, :rank] * 0, D[:rank] * 0, np.zeros(rank), norm, norm)


# the two libraries


def _linalg(D: Array) -> Any:
    if isinstance(D, np.ndarray):
        return np.linalg
    import torch

    return torch.linalg


def _like(a: np.ndarray, D: Array) -> Array:
    """A small NumPy array, where D is and of its dtype."""
    if isinstance(D, np.ndarray):
        return a.astype(D.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(a)).to(D)


def _beside(a: Array, b: Array) -> Array:
    if isinstance(a, np.ndarray):
        return np.concatenate([a, b], axis=1)
    import torch

    return torch.cat([a, b], dim=1)


def _numpy(a: Array) -> np.ndarray:
    return a if isinstance(a, np.ndarray) else a.detach().cpu().numpy()


def _double(D: Array) -> Array:
    return D.astype("f8") if isinstance(D, np.ndarray) else D.double()


def _single(D: Array) -> Array:
    return D.astype("f4") if isinstance(D, np.ndarray) else D.float()
