"""Pictures and latents in overlapping tiles: an autoencoder then needs the memory of a tile, not of the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Run = Callable[[Tensor, int], Tensor]


def in_tiles(values: Tensor, edge: int, overlap: int, *, resized: Callable[[int], int], run: Run) -> Tensor:
    """``run`` on every tile of ``values`` [B,C,H,W], put together.

    edge, overlap: of tiles, in rows of ``values``; tiles at the border are moved inwards, so all have this size.
    resized: a number of rows of ``values`` in rows of the result. run: takes a tile and its number. Where tiles overlap
    the result goes over from one to the next in a straight line.
    """
    import torch

    height, width = values.shape[-2:]
    total = weights = torch.empty(0)
    for number, (top, left) in enumerate(_places(height, width, edge, overlap)):
        rows, columns = min(edge, height), min(edge, width)
        part = run(values[..., top : top + rows, left : left + columns], number)
        if number == 0:
            total = part.new_zeros(*part.shape[:2], resized(height), resized(width))
            weights = part.new_zeros(resized(height), resized(width))
        ramp = resized(overlap)
        down = _ramp(part.shape[-2], ramp, first=top == 0, last=top + rows == height).to(part)
        across = _ramp(part.shape[-1], ramp, first=left == 0, last=left + columns == width).to(part)
        weight = down[:, None] * across
        y, x = (slice(resized(at), resized(at) + size) for at, size in zip((top, left), part.shape[-2:], strict=True))
        total[..., y, x] += part * weight
        weights[y, x] += weight
    return total / weights


def _places(height: int, width: int, edge: int, overlap: int) -> Iterator[tuple[int, int]]:
    for top in _starts(height, edge, overlap):
        for left in _starts(width, edge, overlap):
            yield top, left


def _starts(size: int, edge: int, overlap: int) -> list[int]:
    if size <= edge:
        return [0]
    return [*range(0, size - edge, edge - overlap), size - edge]


def _ramp(size: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """Weights [size]: rising over ``overlap`` unless ``first``, falling unless ``last``, never zero."""
    import torch

    weights = torch.ones(size)
    slope = (torch.arange(overlap) + 0.5) / overlap
    if not first:
        weights[:overlap] *= slope
    if not last:
        weights[size - overlap :] *= slope.flip(0)
    return weights
