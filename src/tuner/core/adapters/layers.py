"""The low-rank layer, its reproducible dropout, and putting it into a module in place.

A layer stands for `up(mask * down(x)) * strength * alpha / rank` beside the frozen module it belongs to; that module
computes the sum (`tuner.core.compute.linear`), so only parameters live here. Formula: Hu et al. 2021, LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.compute.linear import adapted_forward
from tuner.core.rng import Rng

ELEMENT, COMPONENT, MODULE = 1, 2, 3
"""What a dropout draw decides about: keeps the three draws of one sample apart."""
LOW32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Rates in [0, 1).

    element: entries of the down activation; rank: whole rank components of a sample; both scale what is left by
    1/(1-p). module: the whole layer for a sample, nothing is rescaled.
    """

    element: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __bool__(self) -> bool:
        return max(self.element, self.rank, self.module) > 0


@dataclass(slots=True)
class DropoutKeys:
    """Keys of the samples of the running step, int64 [samples], shared by all layers; None outside `adapter_rng`."""

    samples: Tensor | None = None


class LoraLayer(nn.Module):
    """down [rank, in, *kernel] drawn uniformly within 1/sqrt(fan in), up [out, rank, *ones] zero; so it starts neutral.

    The draw is Kaiming's with a = sqrt(5), from a stream of its own: order of creation and device do not matter.
    others: further linears on the same input; the rows of up are then those of all of them, one below the other.
    """

    dropout_key: Tensor

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
        super().__init__()
        down_shape, up_shape = factor_shapes(base, rank)
        self.rows = (up_shape[0], *(factor_shapes(each, rank)[1][0] for each in others))
        up_shape = (sum(self.rows), *up_shape[1:])
        device = base_device(base)
        bound = 1 / math.sqrt(math.prod(down_shape[1:]))
        drawn = rng.uniform(down_shape).mul_(2 * bound).sub_(bound)
        self.down = nn.Parameter(drawn.to(device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(up_shape, device=device, dtype=dtype))
        self.rank, self.alpha, self.dropout, self.keys = rank, float(alpha), dropout, keys
        self.scale = self.alpha / rank
        if dropout:
            key = torch.tensor(rng.child("dropout").key(), dtype=torch.int64, device=device)
            self.register_buffer("dropout_key", key, persistent=False)

    def set_strength(self, strength: float) -> None:
        """1 is the adapter as trained, 0 is exactly the base model."""
        self.scale = strength * self.alpha / self.rank

    def mid_mask(self, x: Tensor) -> Tensor | None:
        """Factor on the down activation of `x` [B, ..., in]: broadcastable to [B, ..., rank]; None without dropout.

        A draw depends on the layer, the sample, the step and the position alone: recomputation, another batch size and
        a resumed run see the same. Row b belongs to sample b modulo the number of samples (guidance stacks batches).
        """
        if not self.dropout or not self.training:
            return None
        if self.keys.samples is None:
            if torch.is_grad_enabled():
                raise RuntimeError("an adapter with dropout trains outside adapter_rng")
            return None
        middle = x.shape[1:-1]
        samples = self.keys.samples[torch.arange(x.shape[0], device=x.device) % self.keys.samples.shape[0]]
        key = (samples ^ self.dropout_key).reshape(-1, 1)
        ones = (1,) * len(middle)
        mask: Tensor | None = None
        for rate, salt, shape, rescale in (
            (self.dropout.element, ELEMENT, (*middle, self.rank), True),
            (self.dropout.rank, COMPONENT, (*ones, self.rank), True),
            (self.dropout.module, MODULE, (*ones, 1), False),
        ):
            if rate > 0:
                kept = keep(key, math.prod(shape), rate, salt).reshape(x.shape[0], *shape).to(x.dtype)
                factor = kept / (1 - rate) if rescale else kept
                mask = factor if mask is None else mask * factor
        return mask

    def parts(self) -> list[LoraLayer | LoraPart]:
        """What each linear computes with: the layer itself, or its share of the rows."""
        if len(self.rows) == 1:
            return [self]
        starts = accumulate(self.rows, initial=0)
        return [LoraPart(self, start, size) for start, size in zip(starts, self.rows, strict=False)]


class LoraPart:
    """One linear's rows of a layer that several linears share: the same down, scale and dropout for all of them."""

    def __init__(self, layer: LoraLayer, start: int, size: int) -> None:
        self.layer, self.start, self.size = layer, start, size

    @property
    def down(self) -> Tensor:
        return self.layer.down

    @property
    def up(self) -> Tensor:
        return self.layer.up.narrow(0, self.start, self.size)

    @property
    def scale(self) -> float:
        return self.layer.scale

    def mid_mask(self, x: Tensor) -> Tensor | None:
        return self.layer.mid_mask(x)


def keep(key: Tensor, count: int, rate: float, salt: int) -> Tensor:
    """[rows, count] booleans, True with probability 1 - rate: a counter-based hash of (key [rows, 1], salt, position).

    Integer arithmetic on tensors, so that it runs inside compiled graphs and gives the same on every device.
    """
    position = torch.arange(count, device=key.device, dtype=torch.int64)
    hashed = _mix(_mix(position + salt * 0x9E3779B1 & LOW32) ^ (key & LOW32))
    hashed = _mix(hashed ^ (key >> 32))
    return hashed >= int(rate * 2**32)


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64; the multipliers are below 2**31, so no product overflows."""
    value = (value ^ (value >> 15)) * 0x2C1B3C6D & LOW32
    value = (value ^ (value >> 12)) * 0x297A2D39 & LOW32
    return value ^ (value >> 15)


# --- base modules -----------------------------------------------------------------------------------------------------


def is_adaptable(module: nn.Module) -> bool:
    """Linears (quantized ones too: they have no children and tell their sizes) and ungrouped convolutions."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    if isinstance(module, nn.Linear):
        return True
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return sized and "linear" in type(module).__name__.lower()


def factor_shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of down and up for a base module."""
    if isinstance(base, nn.Conv2d):
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1)
    sizes: Any = base
    return (rank, sizes.in_features), (sizes.out_features, rank)


def base_device(base: nn.Module) -> torch.device:
    tensor: Tensor | None = next(base.parameters(), None)
    if tensor is None:
        tensor = next(base.buffers(), None)
    return torch.device("cpu") if tensor is None or tensor.device.type == "meta" else tensor.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One adapted module and what to put back when the adapter goes."""

    base: nn.Module
    forward: Callable[..., Tensor] | None
    base_forward: Callable[..., Tensor] | None


def inject(base: nn.Module, layer: LoraLayer | LoraPart) -> Injection:
    """Make `base` compute with `layer`. Names, parameters and the state dict of the model stay as they are."""
    slots = base.__dict__
    record = Injection(base=base, forward=slots.get("forward"), base_forward=slots.get("base_forward"))
    if isinstance(base, nn.Conv2d):
        slots["base_forward"] = base.forward
        slots["forward"] = MethodType(_adapted_convolution, base)
    else:
        # Anything but a stock linear (a quantized one) keeps computing its own product.
        if record.base_forward is None and (record.forward is not None or type(base).forward is not nn.Linear.forward):
            slots["base_forward"] = base.forward
        slots["forward"] = MethodType(adapted_forward, base)
    # Past nn.Module's own attribute handling: a registered submodule would change the model's names.
    slots["adapter"] = layer
    return record


def eject(record: Injection) -> None:
    """Undo `inject`."""
    slots = record.base.__dict__
    slots.pop("adapter", None)
    for name, value in (("forward", record.forward), ("base_forward", record.base_forward)):
        if value is None:
            slots.pop(name, None)
        else:
            slots[name] = value


def _adapted_convolution(base: nn.Conv2d, x: Tensor) -> Tensor:
    """`forward` of an adapted convolution: [B, in, H, W] -> [B, out, H', W']."""
    y: Tensor = base.base_forward(x)  # type: ignore[operator]
    layer: LoraLayer = base.adapter  # type: ignore[assignment]
    if layer.scale == 0.0:
        return y
    mid = F.conv2d(x, layer.down.to(x.dtype), None, base.stride, base.padding, base.dilation)
    mask = layer.mid_mask(mid.permute(0, 2, 3, 1))
    if mask is not None:
        mid = mid * mask.permute(0, 3, 1, 2)
    return y + F.conv2d(mid, (layer.up * layer.scale).to(x.dtype))
