"""Blends of tensors entry by entry: weighted sums, TIES, DARE and magnitude pruning.

linear            sum_i w_i x_i
magnitude_prune   the same, after each x_i has kept its k = floor(density n) largest entries by absolute value
ties              Yadav et al. 2023, https://arxiv.org/abs/2306.01708: prune; elect for each entry the sign of
                  sum_i x_i (or of sum_i sign x_i); average the w_i x_i whose sign it is
dare              Yu et al. 2023, https://arxiv.org/abs/2311.03099: drop entries at random, divide the rest by density
dare_linear, dare_ties: the random dropping, then linear, or ties without its pruning

Blends of the factors A and B apart, as PEFT makes them, take the roots of the weights (`roots`): their product then has
cross terms B_i A_j. The paper's TIES, without them, is the one on products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

PRUNED = ("magnitude_prune", "ties")
RANDOM = ("dare_linear", "dare_ties")
SIGNED = ("ties", "dare_ties")


def blended(xs: Sequence[np.ndarray], weights: Sequence[float], method: str, majority: str = "total") -> np.ndarray:
    """The blend of tensors that are pruned already. xs: of one shape."""
    if method not in SIGNED:
        return sum(np.asarray(w, dtype=x.dtype) * x for w, x in zip(weights, xs, strict=True))
    agreed = agreeing(xs, majority)
    total = sum((np.asarray(w, dtype=x.dtype) * x) * yes for w, x, yes in zip(weights, xs, agreed, strict=True))
    return total / np.maximum(sum(yes.astype(total.dtype) for yes in agreed), 1)


def agreeing(xs: Sequence[np.ndarray], majority: str) -> list[np.ndarray]:
    """For each tensor, where its sign is the elected one. A draw elects plus; zeros agree with nobody."""
    votes = sum(np.sign(x) for x in xs) if majority == "frequency" else sum(xs)
    elected = np.where(votes >= 0, 1, -1)
    return [np.sign(x) == elected for x in xs]


def largest(x: np.ndarray, density: float) -> np.ndarray:
    """x with its floor(density n) largest entries by absolute value, and zeros."""
    k = int(density * x.size)
    if k >= x.size:
        return x
    kept = np.zeros(x.size, dtype=bool)
    if k:
        kept[np.argpartition(np.abs(x).reshape(-1), x.size - k)[x.size - k :]] = True
    return np.where(kept.reshape(x.shape), x, 0)


def dropped(x: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """x * Bernoulli(density) / density"""
    if density >= 1:
        return x
    return np.where(random.random(x.shape, dtype="f4") < density, x, 0) / np.asarray(density, dtype=x.dtype)


def pruned(x: np.ndarray, method: str, density: float, random: np.random.Generator) -> np.ndarray:
    """What a method leaves of a tensor before the sum."""
    if method in RANDOM:
        return dropped(x, density, random)
    return largest(x, density) if method in PRUNED else x


def generator(*words: object) -> np.random.Generator:
    """A random generator that depends on its words alone, so that neither order nor threads change the numbers."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def roots(weight: float) -> tuple[float, float]:
    """(b, a) with b a = weight: what B and A are multiplied by. The sign is on A."""
    root = abs(weight) ** 0.5
    return root, -root if weight < 0 else root


BLOCK = 1 << 22  # numbers of a dense matrix that are made at a time

Pair = tuple[np.ndarray, np.ndarray]  # L: (m, r)    R: (r, n)


def product_blend(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    method: str,
    density: float,
    majority: str,
    randoms: Sequence[np.random.Generator],
) -> np.ndarray:
    """The blend of the products L_i R_i, (m, n) float32, made in blocks of rows.

    Pruning by size needs the k-th largest number of a whole product first, and that one product in memory. Numbers that
    are as large as the k-th are all kept.
    """
    m, n = pairs[0][0].shape[0], pairs[0][1].shape[1]
    limits = [threshold(p, density) if method in PRUNED and density < 1 else None for p in pairs]
    out = np.empty((m, n), dtype="f4")
    for rows in _blocks(m, n):
        made = [L[rows] @ R for L, R in pairs]
        for i, x in enumerate(made):
            if limits[i] is not None:
                made[i] = np.where(np.abs(x) >= limits[i], x, 0)
            elif method in RANDOM:
                made[i] = dropped(x, density, randoms[i])
        out[rows] = blended(made, weights, method, majority)
    return out


def threshold(pair: Pair, density: float) -> float:
    """The floor(density n)-th largest absolute value of L R; infinity when none is to be kept."""
    L, R = pair
    size = np.empty((L.shape[0], R.shape[1]), dtype="f4")
    for rows in _blocks(*size.shape):
        np.abs(L[rows] @ R, out=size[rows])
    k = int(density * size.size)
    flat = size.reshape(-1)
    flat.partition(flat.size - max(k, 1))
    return float(flat[flat.size - k]) if k else float("inf")


def _blocks(m: int, n: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(n, 1))
    yield from (slice(i, i + step) for i in range(0, m, step))
