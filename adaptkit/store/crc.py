"""CRC-32 of bytes that several threads saw in pieces: crc(a b) from crc(a), crc(b) and the length of b.

A CRC is a remainder of polynomials over GF(2), so appending n zero bytes is a linear map: a matrix of 32 columns, made
by squaring the matrix for one bit. The method is Mark Adler's (zlib, crc32_combine).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

POLYNOMIAL = 0xEDB88320
Matrix = tuple[int, ...]  # column i: what bit i becomes


def combined(pieces: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """(CRC-32, bytes) of pieces (start, bytes, CRC-32), in any order, that lie one after the other."""
    crc = length = 0
    for _, n, piece in sorted(pieces):
        crc, length = _times(_zeros(n), crc) ^ piece, length + n
    return crc, length


@lru_cache(maxsize=256)
def _zeros(n: int) -> Matrix:
    """The map that appending n zero bytes is."""
    found, power = tuple(1 << i for i in range(32)), _byte()
    while n:
        if n & 1:
            found = tuple(_times(power, column) for column in found)
        power = _squared(power)
        n >>= 1
    return found


def _byte() -> Matrix:
    """Eight zero bits."""
    bit = (POLYNOMIAL, *(1 << i for i in range(31)))
    return _squared(_squared(_squared(bit)))


def _squared(matrix: Matrix) -> Matrix:
    return tuple(_times(matrix, column) for column in matrix)


def _times(matrix: Matrix, vector: int) -> int:
    total = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            total ^= column
        vector >>= 1
    return total
