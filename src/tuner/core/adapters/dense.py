"""Kinds that hold the change itself: of the whole weight (LyCORIS' full), or one factor per channel ((IA)^3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.adapters.layers import ChangeLayer, Making, only_linear
from tuner.core.adapters.rotation import without_bias
from tuner.core.compute.linear import plain_product

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target


class FullLayer(ChangeLayer):
    """diff in the shape of the weight, and diff_b [out] where there is a bias: what is added to both."""

    kind = "full"
    diff: nn.Parameter

    def __init__(self, base: nn.Module, target: Target, making: Making, stored: Mapping[str, Tensor] | None) -> None:
        super().__init__(making.dropout, making.keys, making.rng, making.device)
        of: Any = base
        convolution = isinstance(base, nn.Conv2d)
        shape = tuple(of.weight.shape) if convolution else (of.out_features, of.in_features)
        self.rows = (shape[0],)
        self.diff = nn.Parameter(torch.zeros(shape, device=making.device, dtype=making.dtype))
        has_bias = "diff_b" in stored if stored else of.bias is not None
        bias = nn.Parameter(torch.zeros(shape[0], device=making.device, dtype=making.dtype)) if has_bias else None
        self.register_parameter("diff_b", bias)

    @property
    def settings(self) -> str:
        return "whole weights"

    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        weight = (self.diff * self.strength).to(x.dtype)
        own: Tensor | None = self.diff_b  # type: ignore[assignment]
        bias = None if own is None else (own * self.strength).to(x.dtype)
        if isinstance(base, nn.Conv2d):
            return F.conv2d(x, weight, bias, base.stride, base.padding, base.dilation)
        return F.linear(x, weight, bias)


class Ia3Layer(ChangeLayer):
    """weight [out], or [in] with ``on_input``: what the channels are multiplied by, minus one (Liu et al. 2022).

    Outputs are scaled without the bias. A scale on inputs costs a second product with the frozen weight.
    """

    kind = "ia3"
    weight: nn.Parameter

    def __init__(self, base: nn.Module, target: Target, making: Making, stored: Mapping[str, Tensor] | None) -> None:
        linear = only_linear(base, target, self.kind)
        super().__init__(making.dropout, making.keys, making.rng, making.device)
        self.rows = (linear.out_features,)
        self.on_input = bool(stored["on_input"]) if stored else target.options.on_input
        size = linear.in_features if self.on_input else linear.out_features
        self.weight = nn.Parameter(torch.zeros(size, device=making.device, dtype=making.dtype))

    @property
    def settings(self) -> str:
        return "one factor per input" if self.on_input else "one factor per output"

    def fixed(self) -> dict[str, Tensor]:
        return {"on_input": torch.tensor(float(self.on_input))}

    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        scale = self.weight * self.strength
        if self.on_input:
            assert isinstance(base, nn.Linear)
            return plain_product(base, x * scale.to(x.dtype))
        return without_bias(y, base) * scale.to(y.dtype)
