"""How far two thin updates D = s L R overlap, exactly and without making either dense.

<D1, D2> = s1 s2 sum((L1' L2) * (R1 R2'))    cosine = <D1, D2> / (|D1| |D2|)
D = Q C P'  with L = Q T, R' = P S, C = s T S':  the singular vectors of D are those of the small C, turned by Q and P.

The angles between the column spaces are the principal angles of Björck and Golub 1973; |U1' U2|^2 / min(r1, r2) is the
similarity of subspaces in Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOISE = 1e-6  # singular values below this share of the largest are rounding, and span nothing


@dataclass(frozen=True)
class Update:
    """D = L R, both float64, with the scale in L. L: (m, r)   R: (r, n)"""

    L: np.ndarray
    R: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.L.shape[0], self.R.shape[1]

    def norm(self) -> float:
        """|D|_F"""
        return float(np.linalg.norm(self._small()[1]))

    def spaces(self) -> tuple[np.ndarray, np.ndarray]:
        """Orthonormal bases of the column space, (m, k), and of the row space, (n, k), with k the rank of D."""
        (Q, P), C = self._small()
        U, values, V = np.linalg.svd(C)
        rank = int((values > NOISE * values[:1]).sum())
        return Q @ U[:, :rank], P @ V[:rank].T

    def _small(self) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        (Q, T), (P, S) = np.linalg.qr(self.L), np.linalg.qr(self.R.T)
        return (Q, P), T @ S.T


def inner(a: Update, b: Update) -> float:
    """<A, B>, the sum of the products of their elements."""
    return float(((a.L.T @ b.L) * (a.R @ b.R.T)).sum())


def angles(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Principal angles between the spans of orthonormal columns, degrees, smallest first. Accurate when small, too."""
    if U.shape[1] > V.shape[1]:
        U, V = V, U
    cosines = np.linalg.svd(V.T @ U, compute_uv=False)[: U.shape[1]]
    sines = np.linalg.svd(U - V @ (V.T @ U), compute_uv=False)[: U.shape[1]][::-1]
    return np.degrees(np.arctan2(np.clip(sines, 0, 1), np.clip(cosines, 0, 1)))


def shared(found: np.ndarray) -> float:
    """The share of the smaller space that lies in the other: the mean of the squared cosines of principal angles."""
    return float((np.cos(np.radians(found)) ** 2).mean()) if len(found) else 0.0
