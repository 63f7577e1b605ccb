"""Factors of a given rank: of a matrix, and of a product of factors without ever building it.

Randomized SVD: Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.core.errors import UsageError

EXACT_SIDE = 512
"""Up to this smaller side a full SVD is as quick as a randomized one."""
OVERSAMPLING = 16
PASSES = 4
"""Power iterations: weights' differences have singular values that fall slowly."""
NORM_ROWS = 1024
"""Rows at a time for sums in double precision."""
SEED = 20110


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How much to keep: at most ``rank`` directions, and no more than hold the share ``energy`` of the squared norm."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise UsageError("how much is to be kept?", fix="give --rank N or --energy 0.95")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank of {self.rank} is no adapter", where="--rank", fix="use 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a share, not {self.energy:g}", where="--energy", fix="use 0.95, for example")

    def count(self, values: Tensor, total: float) -> int | None:
        """How many of the largest singular ``values`` to keep; None when they do not reach the energy."""
        limit = len(values) if self.rank is None else min(self.rank, len(values))
        if self.energy is None:
            return max(limit, 1)
        sums = values.double().square().cumsum(0)
        # Rounding in float32 must not demand directions that are noise.
        reached = int((sums < self.energy * total * (1 - 1e-7)).sum()) + 1
        if reached > len(values) and self.rank is None:
            return None
        return max(min(reached, limit), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """up [out, r] @ down [r, in] is what was kept of a matrix of that ``norm``; kept: its share, squared."""

    up: Tensor
    down: Tensor
    kept: float
    norm: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def factors_of(matrix: Tensor, wanted: Wanted) -> Factors:
    """The best factors of ``matrix`` [out, in] float32, the singular values shared evenly between them.

    Large matrices use random projections with a fixed seed, doubled until the energy is reached: the same matrix gives
    the same factors.
    """
    total = sum(float(rows.double().square().sum()) for rows in torch.split(matrix, NORM_ROWS))
    side = min(matrix.shape)
    size = side if wanted.rank is None and wanted.energy == 1 else (wanted.rank or 64) + OVERSAMPLING
    while True:
        exact = side <= EXACT_SIDE or 3 * size >= side
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False) if exact else _randomized(matrix, size)
        count = wanted.count(s if exact else s[: size - OVERSAMPLING], total)
        if count is not None or exact:
            return _cut(u, s, vh, count or len(s), total)
        size = 2 * size


def factors_of_product(up: Tensor, down: Tensor, wanted: Wanted) -> Factors:
    """The same for ``up`` [out, r] @ ``down`` [r, in], both float32: two QR and an SVD of r x r."""
    left, left_rest = torch.linalg.qr(up)
    right, right_rest = torch.linalg.qr(down.t())
    u, s, vh = torch.linalg.svd(left_rest @ right_rest.t(), full_matrices=False)
    total = float(s.double().square().sum())
    return _cut(left @ u, s, vh @ right.t(), wanted.count(s, total) or len(s), total)


def _cut(u: Tensor, s: Tensor, vh: Tensor, count: int, total: float) -> Factors:
    root = s[:count].sqrt()
    kept = float(s[:count].double().square().sum()) / total if total else 1.0
    return Factors(
        up=(u[:, :count] * root).contiguous(),
        down=(root.unsqueeze(1) * vh[:count]).contiguous(),
        kept=min(kept, 1.0),
        norm=total**0.5,
    )


def _randomized(matrix: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    probe = torch.randn(matrix.shape[1], size, generator=generator).to(matrix)
    basis, u, s, vh = sketched_svd(matrix, probe)
    return basis @ u, s, vh


def sketched_svd(matrix: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest singular values of ``matrix`` [out, in] float32, found in the span of ``matrix @ probe``.

    probe [in, n]: random. Returns (basis [out, n], u [n, n], s [n], vh [n, in]); the left directions are basis @ u.
    """
    basis, _ = torch.linalg.qr(matrix @ probe)
    for _ in range(PASSES):
        other, _ = torch.linalg.qr(matrix.t() @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    return basis, *torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
