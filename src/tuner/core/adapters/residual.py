"""Low-rank layers that start as a part of the weight itself; the base keeps the rest.

    W_rest = W - c B0 A0,   y = (W_rest + c B A) x,   c = alpha / rank

PiSSA (Meng et al. 2024): B0 A0 are the principal singular directions of W. OLoRA (Büyükakyüz 2024): the first columns
and rows of its QR factors. LoftQ (Li et al. 2023, one round): the principal directions of what quantization takes away,
W - Q(W), so that the sum is closer to W than Q(W) is; here W stays, and is quantized later.

B0 and A0 are kept: at strength 0 a layer computes with them, which is the base model, and a file for other programs,
whose base is W, holds the difference c (B A - B0 A0) as one adapter of twice the rank. It is written as
c ((B - B0) A + B0 (A - A0)): rounded to few bits, the two large products would not cancel any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tuner.core.adapters.layers import LoraLayer, LoraPart, Making, factor_shapes
from tuner.core.adapters.low_rank import sketched_svd
from tuner.core.compute.low_bits import decode, encode
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target

INITIAL = "initial_factors"
"""Attribute of the first module of a target: its factors, between the split of the weight and the making of a layer."""
MORE = 8
"""Least number of directions beyond the rank in a random sketch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """down [rank, in, *kernel] and up [rows, rank, *ones], as the layer starts; in the adapter's dtype."""

    down: Tensor
    up: Tensor


# --- splitting weights ------------------------------------------------------------------------------------------------


@torch.no_grad()
def split_weight(
    bases: Sequence[nn.Module],
    target: Target,
    init: str,
    *,
    dtype: torch.dtype,
    rng: Rng,
    method: str | None = None,
    stored: Sequence[Mapping[str, Tensor]] | None = None,
) -> None:
    """Take a target's start out of the weights of ``bases``, in place, and leave it with them for `ResidualLayer`.

    dtype: of the adapter. method: how the weights will be quantized; ``loftq`` needs it, and a layer starts as usual
    where it is None. stored: the parts of each module after an earlier start. UsageError: a rank that the weight does
    not have.
    """
    weights = [_weight(base, target) for base in bases]
    down_shape, up_shape = factor_shapes(bases[0], target.rank)
    up_shape = (sum(weight.shape[0] for weight in weights), *up_shape[1:])
    scale = target.alpha / target.rank
    if stored is not None:
        whole = stored[0]["first_down"], torch.cat([parts["first_up"] for parts in stored])
        down, up = (value.to(weights[0].device, dtype) for value in whole)
        if down.shape != down_shape or up.shape != up_shape:
            raise UsageError(f"the checkpoint has other factors for {target.key}", why="the network is another one")
    else:
        joint = torch.cat([weight.float().flatten(1) for weight in weights])
        up, down = _start(joint, target, init, rng, [len(weight) for weight in weights], method)
        # The scale goes into both: their product is what is taken away.
        down, up = (down / scale**0.5).to(dtype), (up / scale**0.5).to(dtype)
        down, up = down.reshape(down_shape).contiguous(), up.reshape(up_shape).contiguous()
    if init != "loftq":
        taken = torch.split(up.flatten(1).float(), [len(weight) for weight in weights])
        for weight, rows in zip(weights, taken, strict=True):
            weight.copy_(weight.float().flatten(1).addmm(rows, down.flatten(1).float(), alpha=-scale).view_as(weight))
    bases[0].__dict__[INITIAL] = Factors(down=down, up=up)


def _weight(base: Any, target: Target) -> Tensor:
    weight = base._parameters.get("weight")
    if weight is None:
        raise UsageError(
            f"the weight of {target.key} cannot be split",
            where="network.init",
            why="it was stored in few bits before the adapter was made",
        )
    found: Tensor = weight.detach()
    return found


def _start(
    weight: Tensor, target: Target, init: str, rng: Rng, rows: Sequence[int], method: str | None
) -> tuple[Tensor, Tensor]:
    """up [rows, rank] and down [rank, in] whose product is the start, float32."""
    if target.rank > min(weight.shape):
        raise UsageError(
            f"the rank {target.rank} of {target.key} is more than its weight has",
            where="network.init",
            why=f"its shape is {[*weight.shape]}",
            fix="lower the rank by network.rules, or leave the module out",
        )
    if init == "olora":
        columns, upper = torch.linalg.qr(weight)
        return columns[:, : target.rank], upper[: target.rank]
    if init == "loftq":
        if method is None:
            bound = weight.shape[1] ** -0.5
            drawn = rng.child("unquantized").uniform((target.rank, weight.shape[1])).to(weight.device)
            return weight.new_zeros(len(weight), target.rank), drawn * 2 * bound - bound
        parts = [part - decode(method, encode(method, part), torch.float32) for part in torch.split(weight, list(rows))]
        weight = torch.cat(parts)
    left, sizes, right = principal(weight, target.rank, rng.child("directions"))
    return left * sizes.sqrt(), right * sizes.sqrt().unsqueeze(1)


def principal(matrix: Tensor, rank: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values [rank] of a float32 matrix with their directions [rows, rank], [rank, cols].

    By a random sketch with power iterations where that is cheaper (`sketched_svd`).
    """
    size = rank + max(MORE, rank)
    if 2 * size >= min(matrix.shape):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]
    probe = rng.normal((matrix.shape[1], size)).to(matrix.device)
    basis, left, sizes, right = sketched_svd(matrix, probe)
    return basis @ left[:, :rank], sizes[:rank], right[:rank]


# --- the layer --------------------------------------------------------------------------------------------------------


class ResidualLayer(LoraLayer):
    """A low-rank layer that starts as a part of the weight. first_down, first_up: that part, which stays fixed and is
    in checkpoints alone."""

    first_down: Tensor
    first_up: Tensor

    @classmethod
    def make(
        cls, bases: Sequence[nn.Module], target: Target, making: Making, stored: Mapping[str, Tensor] | None
    ) -> Self:
        layer = super().make(bases, target, making, stored)
        factors: Factors = bases[0].__dict__.pop(INITIAL)
        for parameter, name, value in (
            (layer.down, "first_down", factors.down),
            (layer.up, "first_up", factors.up),
        ):
            parameter.data.copy_(value)
            layer.register_buffer(name, value.to(parameter.device, parameter.dtype), persistent=False)
        return layer

    def parts(self) -> Sequence[LoraPart]:
        starts = accumulate(self.rows, initial=0)
        return [ResidualPart(self, start, size) for start, size in zip(starts, self.rows, strict=False)]

    def tensors(self) -> list[dict[str, Tensor]]:
        ups = torch.split(self.first_up, list(self.rows))
        if len(ups) == 1:
            return [{**parts, "first_down": self.first_down, "first_up": self.first_up} for parts in super().tensors()]
        return [
            {**parts, "first_down": self.first_down.clone(), "first_up": up.clone()}
            for parts, up in zip(super().tensors(), ups, strict=True)
        ]

    def load(self, members: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        for parts, own, name in zip(members, self.tensors(), names, strict=True):
            if not all(torch.equal(parts[part].to(own[part]), own[part]) for part in ("first_down", "first_up")):
                raise UsageError(f"the checkpoint split the weight of {name} in another way")
        super().load(members, names)

    def exported(self) -> list[dict[str, Tensor]]:
        """The change of the original weight: one low-rank product of twice the rank with the same scale."""
        trained_down, trained_up = self.down.detach().float(), self.up.detach().float()
        down = torch.cat([trained_down, trained_down - self.first_down])
        up = torch.cat([trained_up - self.first_up, self.first_up], dim=1)
        alpha = torch.tensor(2 * self.alpha, dtype=torch.float32)
        return [{"down": down.clone(), "up": rows.clone(), "alpha": alpha} for rows in torch.split(up, list(self.rows))]


class ResidualPart(LoraPart):
    """One linear's share of a layer: as trained at strength 1, the fixed factors at strength 0, a mixture between."""

    layer: ResidualLayer

    @property
    def down(self) -> Tensor:
        layer = self.layer
        if layer.strength == 1.0:
            return layer.down
        return layer.first_down if layer.strength == 0.0 else torch.cat([layer.down, layer.first_down])

    @property
    def up(self) -> Tensor:
        layer = self.layer
        trained, first = (each.narrow(0, self.start, self.size) for each in (layer.up, layer.first_up))
        if layer.strength == 1.0:
            return trained
        share = layer.strength
        return first if share == 0.0 else torch.cat([share * trained, (1 - share) * first], dim=1)

    @property
    def scale(self) -> float:
        return self.layer.alpha / self.layer.rank

    def mid_mask(self, x: Tensor) -> Tensor | None:
        return self.layer.mid_mask(x) if self.layer.strength == 1.0 else None
