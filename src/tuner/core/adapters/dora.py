"""DoRA: the length of each row of the weight is trained apart from its direction (Liu et al. 2024).

    W' = m * (W + s B A) / |W + s B A|        row by row, s = alpha / rank

The rows' lengths are constants for the gradient, as the paper's section 4.3 proposes, and they are found without the
matrix itself: |W + s B A|^2 = |W|^2 + 2 s B . (W A^T) + s^2 (B A A^T) . B, where W A^T costs as much as a few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.adapters.layers import Dropout, DropoutKeys, LoraLayer, LoraPart, Making, copy_into, only_linear
from tuner.core.compute.linear import plain_product
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target


class DoraLayer(LoraLayer):
    """A low-rank layer and ``dora_scale`` [rows, 1], the lengths m, float32, which start as those of the weight.

    squares: the squared lengths of the frozen weight's rows, [rows] float32; no part of a file.
    """

    kind = "dora"
    dora_scale: nn.Parameter
    squares: Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: Dropout,
        keys: DropoutKeys,
        dtype: torch.dtype,
        rng: Rng,
        others: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, keys=keys, dtype=dtype, rng=rng, others=others)
        squares = torch.cat([row_squares(each) for each in (base, *others)]).to(self.up.device)
        self.register_buffer("squares", squares, persistent=False)
        # Rounded to fewer bits, a length would differ from the weight's, and the start from the base model.
        self.dora_scale = nn.Parameter(squares.sqrt().unsqueeze(1))

    @classmethod
    def make(
        cls, bases: Sequence[nn.Module], target: Target, making: Making, stored: Mapping[str, Tensor] | None
    ) -> Self:
        return super().make([only_linear(base, target, cls.kind) for base in bases], target, making, stored)

    def tensors(self) -> list[dict[str, Tensor]]:
        lengths = torch.split(self.dora_scale.detach(), list(self.rows))
        return [found | {"dora_scale": each} for found, each in zip(super().tensors(), lengths, strict=True)]

    def load(self, members: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        super().load(members, names)
        for parts, name, rows in zip(members, names, self._lengths(), strict=True):
            copy_into(rows, parts["dora_scale"], f"{name}.dora_scale")

    def start(self, stored: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> None:
        super().start(stored, names)
        for name, rows in zip(names, self._lengths(), strict=True):
            if name in stored:
                copy_into(rows, stored[name]["dora_scale"], f"{name}.dora_scale")

    def parts(self) -> Sequence[LoraPart]:
        starts = accumulate(self.rows, initial=0)
        return [DoraPart(self, start, size) for start, size in zip(starts, self.rows, strict=False)]

    def _lengths(self) -> Sequence[Tensor]:
        return torch.split(self.dora_scale.data, list(self.rows))


class DoraPart(LoraPart):
    """One linear's share of a layer. `project` adds the low-rank product; ``adapt`` turns the sum's rows to length."""

    layer: DoraLayer

    def adapt(self, x: Tensor, y: Tensor, base: nn.Linear) -> Tensor:
        """y [..., out]: what the weight and the low-rank product made of x."""
        layer = self.layer
        strength, bias = layer.strength, base.bias
        turned = y if bias is None else y - bias.to(y.dtype)
        if strength != 1.0:
            # Between 0 and 1 the weights are mixed, not the factors: what is missing of the product comes on top.
            mid = F.linear(x, layer.down.to(x.dtype))
            mask = layer.mid_mask(x)
            mid = mid if mask is None else mid * mask
            full = self.up * (layer.alpha / layer.rank)
            turned = turned + (1 - strength) * F.linear(mid, full.to(x.dtype))
        change = turned * ((self.gain(base) - 1) * strength).to(y.dtype)
        mask = layer.module_mask(x)
        return y + (change if mask is None else change * mask)

    def gain(self, base: nn.Linear) -> Tensor:
        """m / |W + s B A| of each row, [out] float32; only m has a gradient."""
        layer, rows = self.layer, slice(self.start, self.start + self.size)
        scale = layer.alpha / layer.rank
        with torch.no_grad():
            down, up = layer.down.float(), self.up.float()
            crossed = plain_product(base, layer.down).float().t()
            squares = layer.squares[rows] + 2 * scale * (up * crossed).sum(1)
            squares = squares + scale**2 * ((up @ (down @ down.t())) * up).sum(1)
            lengths = squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return layer.dora_scale[rows].squeeze(1).float() / lengths


def row_squares(base: nn.Module) -> Tensor:
    """The squared length of each row of a weight (read back where it is quantized), [out] float32."""
    weight = cast("Any", base).weight.detach()
    if weight.is_meta:
        return torch.ones(weight.shape[0])
    found: Tensor = weight.float().square().sum(1)
    return found
