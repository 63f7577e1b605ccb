"""The position table of SD3: windows of the stored one, and tables scaled to the training resolutions.

A table is [1, side * side, D]: sines then cosines of the column in the first half of D, of the row in the second.
Token counts and sizes are in patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tuner.core.errors import UsageError

BASE = 16
"""Coordinates span 0 to 16 over the size that a table is made for."""
MARGIN = 1.5
"""How much longer than that size the side of a scaled table is."""


def sincos_table(width: int, side: int, size: float | None = None) -> Tensor:
    """A table [1, side*side, width] float32.

    size None: coordinates 0, 1, 2, ... Else the middle size x size part spans 0 to BASE, so that every resolution sees
    the same coordinates; formula as in kohya-ss/sd-scripts, checked with its numbers.
    """
    points = torch.arange(side, dtype=torch.float64)
    if size is not None:
        points = points * BASE / size - BASE * (side - size) / (2 * size)
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = points[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = waves[None].expand(side, side, -1)
    rows = waves[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()


def window(table: Tensor, rows: int, columns: int, corner: tuple[int, int] | None = None) -> Tensor:
    """The [1, rows*columns, D] part of a square table at ``corner``, None: its centre."""
    side = math.isqrt(table.shape[1])
    top, left = ((side - rows) // 2, (side - columns) // 2) if corner is None else corner
    square = table.reshape(1, side, side, -1)[:, top : top + rows, left : left + columns]
    return square.reshape(1, rows * columns, -1)


def training_size(pixels: tuple[int, int], patch_pixels: int) -> int:
    """Size in patches of the square that has the area of ``pixels`` (width, height)."""
    return round(math.sqrt(pixels[0] * pixels[1])) // patch_pixels


class ScaledTables:
    """One table per training size; the area of an image chooses. New ones are made for images that are longer."""

    def __init__(self, width: int, sizes: Iterable[int]) -> None:
        self.width = width
        self.sizes = sorted(set(sizes))
        self._tables: dict[int, Tensor] = {}

    def thresholds(self) -> list[tuple[float, int]]:
        """(number of tokens below which a size serves, size): halfway between neighbours; last, the table's area."""
        middles = [(low**2 + high**2) / 2 for low, high in zip(self.sizes, self.sizes[1:], strict=False)]
        return list(zip([*middles, (MARGIN * self.sizes[-1]) ** 2], self.sizes, strict=True))

    def size_for(self, rows: int, columns: int) -> int:
        """The size whose table serves an image; its longer side where every table is too short."""
        near = [size for limit, size in self.thresholds() if rows * columns < limit]
        size = near[0] if near else self.sizes[-1]
        return size if max(rows, columns) <= int(MARGIN * size) else max(rows, columns)

    def table(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The table [1, side*side, D] float32 for an image, on ``device``."""
        size = self.size_for(rows, columns)
        if size not in self._tables or self._tables[size].device != device:
            self._tables[size] = sincos_table(self.width, int(MARGIN * size), size).to(device)
        return self._tables[size]


class PatchEmbed(nn.Module):
    """Latents [B,C,h,w] to tokens [B, h/2*w/2, D]: a patch convolution plus a window of a position table.

    Names of parameters and buffers are those of diffusers' module. ``scaled`` tables replace the stored one;
    ``corner`` (top, left) moves the window for one forward.
    """

    def __init__(self, proj: nn.Conv2d, table: Tensor) -> None:
        super().__init__()
        self.proj = proj
        self.register_buffer("pos_embed", table)
        self.pos_embed: Tensor
        self.scaled: ScaledTables | None = None
        self.corner: tuple[int, int] | None = None

    def room(self, rows: int, columns: int) -> tuple[int, int]:
        """How many corners a window of that size can have, down and across."""
        side = math.isqrt(self._table(rows, columns).shape[1])
        return side - rows + 1, side - columns + 1

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents)
        rows, columns = tokens.shape[-2:]
        places = window(self._table(rows, columns), rows, columns, self.corner)
        # The sum is float32 and rounded once: a rounded table would shift every image.
        return (tokens.flatten(2).transpose(1, 2).float() + places).to(tokens.dtype)

    def _table(self, rows: int, columns: int) -> Tensor:
        if self.scaled is not None:
            return self.scaled.table(rows, columns, self.pos_embed.device)
        side = math.isqrt(self.pos_embed.shape[1])
        if max(rows, columns) > side:
            raise UsageError(f"a picture of {columns}x{rows} patches is larger than the model's table of positions",
                             why=f"the table is {side}x{side}",
                             fix="lower data.sets[].resolution or buckets.max, or the size of the preview")  # fmt: skip
        return self.pos_embed
