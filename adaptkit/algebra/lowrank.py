"""A sum of thin products, cut to a rank without ever making the dense matrix:  c_1 L_1 R_1 + c_2 L_2 R_2 + ... = U s V.

With L = [L_1 L_2 ...] = Q T and R' = [R_1' R_2' ...] = P S (QR decompositions), the sum is Q (T diag(c) S') P', and the
singular values of the small core are those of the sum. That is Golub and Van Loan, Matrix Computations, 5.4.5; its cut
is the best one there is (Eckart and Young 1936).

NumPy arrays and torch tensors both work. Leading axes are a batch of sums of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor


@dataclass
class Spectrum:
    """U diag(s) V.    U: (..., m, k)    s: (..., k), largest first    V: (..., k, n)"""

    U: Array
    s: Array
    V: Array


Term = tuple[Any, Array, Array]  # c: a number, or one for each of the batch    L: (..., m, r)    R: (..., r, n)


def spectrum(terms: Sequence[Term]) -> Spectrum:
    """Singular value decomposition of c_1 L_1 R_1 + ..., with k = min(m, n, sum of ranks) values.

    Computed in the dtype of L and R. Factors of any size that the dtype holds are fine: each is brought to size 1 first.
    """
    sized = [_sized(c, L, R) for c, L, R in terms]
    c = np.concatenate([np.repeat(c[..., None], L.shape[-1], -1) for c, L, _ in sized], -1)
    peak = np.abs(c).max(-1, keepdims=True)
    peak = np.where(peak == 0, 1.0, peak)
    lib = library(sized[0][1])
    Q, T = lib.linalg.qr(concatenated([L for _, L, _ in sized], -1))
    P, S = lib.linalg.qr(concatenated([R.swapaxes(-1, -2) for _, _, R in sized], -1))
    core = (T * like(c / peak, T)[..., None, :]) @ S.swapaxes(-1, -2)
    X, s, Y = lib.linalg.svd(core, full_matrices=False)
    return Spectrum(Q @ X, numpy(s).astype("f8") * peak, Y @ P.swapaxes(-1, -2))


def _sized(c: Any, L: Array, R: Array) -> tuple[np.ndarray, Array, Array]:
    """The same product with factors whose largest number is 1, so that no later product leaves the dtype's range."""
    (L, a), (R, b) = _unit(L), _unit(R)
    return np.asarray(c, dtype="f8") * a * b, L, R


def _unit(M: Array) -> tuple[Array, np.ndarray]:
    size = abs(M).reshape(*M.shape[:-2], M.shape[-2] * M.shape[-1])
    peak = np.asarray(numpy(library(M).amax(size, -1)), dtype="f8") if 0 not in M.shape else np.zeros(M.shape[:-2])
    exponent = np.exp2(np.frexp(peak)[1].clip(-120, 120))  # powers of two: nothing is rounded
    return M / like(exponent, M)[..., None, None], exponent


def split(found: Spectrum, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(L, R) with L R the best approximation of that rank, the values shared evenly, in float32, on the CPU.

    L: (..., m, rank)    R: (..., rank, n). Evenly, since each factor then has the root of the sum's range.
    """
    root = np.sqrt(found.s[..., :rank])
    return _both(found, rank, root, root)


def split_left(found: Spectrum, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(L, R) as `split`, with all of the values on L."""
    s = found.s[..., :rank]
    return _both(found, rank, s, np.ones_like(s))


def _both(found: Spectrum, rank: int, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    U, V = numpy(found.U[..., :rank]), numpy(found.V[..., :rank, :])
    with np.errstate(over="ignore", under="ignore"):  # the caller looks for infinity, and knows the site
        return (U * left[..., None, :]).astype("f4"), (right[..., :, None] * V).astype("f4")


def clamped(L: np.ndarray, R: np.ndarray, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Both factors cut to [-t, t], where t is the q-quantile of all their (signed) numbers together."""
    t = np.quantile(np.concatenate([L.reshape(-1), R.reshape(-1)]), q)
    low, high = np.float32(-t), np.float32(t)
    # a quantile below zero makes the interval empty; the upper end wins then, as in torch.clamp
    return np.minimum(np.maximum(L, low), high), np.minimum(np.maximum(R, low), high)


def energy(s: np.ndarray, rank: int) -> float:
    """The share of the squared values that the first `rank` hold; 1 for a matrix of zeros."""
    squares = squared(s)
    return float(squares[:rank].sum() / squares.sum()) if squares.sum() else 1.0


def rank_for(s: np.ndarray, share: float) -> int:
    """The smallest rank, at least 1, that holds a share of the squared values. What float32 cannot see is not asked for."""
    held = np.cumsum(squared(s))
    if not len(held) or not held[-1]:
        return 1
    return min(int(np.searchsorted(held, min(share, 1 - 1e-12) * held[-1])) + 1, len(held))


def squared(s: np.ndarray) -> np.ndarray:
    """Squares of the values, divided by the largest first, so that none leaves the range."""
    top = np.max(s, initial=0.0)
    return (s / top) ** 2 if top else np.zeros_like(s)


# the two libraries


def library(x: Array) -> Any:
    """numpy or torch, whichever `x` belongs to."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def like(a: np.ndarray, x: Array) -> Array:
    """A small NumPy array, where `x` is and of its dtype."""
    if isinstance(x, np.ndarray):
        return np.asarray(a).astype(x.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(a)).reshape(np.shape(a)).to(x)


def numpy(x: Array) -> np.ndarray:
    """A NumPy array of `x`."""
    return np.asarray(x) if isinstance(x, np.ndarray | np.generic) else x.detach().cpu().numpy()


def concatenated(arrays: Sequence[Array], axis: int) -> Array:
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, axis)
    import torch

    return torch.cat(list(arrays), axis)
