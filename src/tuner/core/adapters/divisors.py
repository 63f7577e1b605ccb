"""How the sizes of a weight are cut for factors and rotations. No torch: plans count with the same sizes."""

from __future__ import annotations

import math


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """``size`` as a product of two, the smaller first: with ``factor`` if it divides, else close to a square below it.

    factor -1: as close to a square as possible.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(each for each in range(limit, 0, -1) if size % each == 0)
    return small, size // small


def has_low_rank(rows: int, columns: int, rank: int) -> bool:
    """Whether a factor [rows, columns] of a Kronecker product is made of two matrices of this rank."""
    return rank < max(rows, columns) / 2


def block_size_of(rows: int, wanted: int) -> int:
    """The largest divisor of ``rows`` that is not above ``wanted``."""
    return next(size for size in range(min(wanted, rows), 0, -1) if rows % size == 0)


def butterfly_sizes(rows: int, wanted: int) -> tuple[int, int, int]:
    """(stages, blocks, block size): the largest even size up to ``wanted`` that leaves a power of two of blocks.

    (0, 0, 0) where there is none.
    """
    for size in range(min(wanted, rows) // 2 * 2, 0, -2):
        count = rows // size
        if rows % size == 0 and count & (count - 1) == 0:
            return count.bit_length(), count, size
    return 0, 0, 0
