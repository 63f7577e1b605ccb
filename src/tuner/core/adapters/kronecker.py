"""LoKr: the update is a Kronecker product of a small and a larger matrix, which may be of low rank (Yeh et al. 2024).

    (w1 (x) w2) x  =  w2 X w1^T  with x written as a matrix X, so two small products stand for a large one.

Sizes of the factors, names and the scale alpha / rank are those of LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.adapters.deltas import lokr_scale
from tuner.core.adapters.divisors import has_low_rank, two_factors
from tuner.core.adapters.layers import ChangeLayer, Making, only_linear
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target


class LokrLayer(ChangeLayer):
    """lokr_w1 [a, c] or its factors _a [a, rank], _b [rank, c]; lokr_w2 [b, d] or factors; the weight is [a b, c d].

    What is multiplied last is zero at the start, everything else is drawn as Kaiming's uniform with a = sqrt(5).
    """

    kind = "lokr"
    factors = ("lokr_w2", "lokr_w2_a")
    alpha: float

    def __init__(self, base: nn.Module, target: Target, making: Making, stored: Mapping[str, Tensor] | None) -> None:
        linear = only_linear(base, target, self.kind)
        super().__init__(making.dropout, making.keys, making.rng, making.device)
        self.rows = (linear.out_features,)
        shapes = self._shapes(linear, target)
        if stored:
            shapes = {name: tuple(value.shape) for name, value in stored.items() if name != "alpha"}
        for name, shape in shapes.items():
            bound = 1 / math.sqrt(shape[1])
            value = torch.zeros(shape)
            if name not in self.factors:
                value = making.rng.child(name).uniform(shape).mul_(2 * bound).sub_(bound)
            self.register_parameter(name, nn.Parameter(value.to(device=making.device, dtype=making.dtype)))
        ranks = [shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes]
        self.alpha = float(target.alpha if ranks else 1.0)
        # Both factors full: there is no rank that alpha could be divided by.
        self.factor = self.alpha / ranks[0] if ranks else 1.0
        self.rank = ranks[0] if ranks else None
        self._check(linear, target)
        if making.init_norm is not None and not stored:
            self._start_off(linear, making.init_norm, making.rng)

    @torch.no_grad()
    def _start_off(self, linear: nn.Linear, norm: float, rng: Rng) -> None:
        """A start near the weight's own statistics, by bghira/SimpleTuner: w1 = 1, w2 ~ norm * N(mean, deviation)."""
        own = dict(self.named_parameters())
        # Read back where it is quantized.
        weight = linear.weight.detach().float()
        if not weight.is_meta:
            drawn = rng.child("init_norm").normal(own["lokr_w2"].shape).to(weight.device)
            own["lokr_w1"].fill_(1.0)
            own["lokr_w2"].copy_(norm * (weight.mean() + weight.std() * drawn))

    def _shapes(self, linear: nn.Linear, target: Target) -> dict[str, tuple[int, ...]]:
        options, rank = target.options, target.rank
        (a, b), (c, d) = (two_factors(size, options.factor) for size in (linear.out_features, linear.in_features))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rows, columns, split in (
            ("lokr_w1", a, c, options.decompose_both),
            ("lokr_w2", b, d, True),
        ):
            if split and not options.full_matrix and has_low_rank(rows, columns, rank):
                shapes |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
            else:
                shapes[name] = (rows, columns)
        return shapes

    def _check(self, linear: nn.Linear, target: Target) -> None:
        first, second = self._whole("lokr_w1"), self._whole("lokr_w2")
        found = [x * y for x, y in zip(first, second, strict=True)]
        if found != [linear.out_features, linear.in_features]:
            raise UsageError(
                f"the file's factors of {target.key} make {found}, its weight is "
                f"{[linear.out_features, linear.in_features]}",
                why="the adapter was trained for another model",
            )

    def _whole(self, name: str) -> tuple[int, int]:
        own = dict(self.named_parameters())
        if name in own:
            return own[name].shape[0], own[name].shape[1]
        return own[f"{name}_a"].shape[0], own[f"{name}_b"].shape[1]

    @property
    def settings(self) -> str:
        (a, c), (b, d) = self._whole("lokr_w1"), self._whole("lokr_w2")
        size = "full" if self.rank is None else f"rank {self.rank}, alpha {self.alpha:g}"
        return f"{a}x{c} of {b}x{d}, {size}"

    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        own, dtype = dict(self.named_parameters()), x.dtype
        first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        # The smallest matrix carries the scale, and is rounded once.
        first = (first * (self.strength * self.factor)).to(dtype)
        blocks = x.reshape(*x.shape[:-1], first.shape[1], -1)
        second = own.get("lokr_w2")
        if second is None:
            narrow = _mix(F.linear(blocks, own["lokr_w2_b"].to(dtype)), first)
            out = F.linear(narrow, own["lokr_w2_a"].to(dtype))
        elif second.shape[0] > second.shape[1]:
            out = F.linear(_mix(blocks, first), second.to(dtype))
        else:
            out = _mix(F.linear(blocks, second.to(dtype)), first)
        return out.flatten(-2)

    def rescaled(self, parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        factor = next(part for part in self.factors if part in parts)
        value = parts[factor].float() * (lokr_scale(parts) / self.factor)
        return {**parts, factor: value, **self.fixed()}


def _mix(blocks: Tensor, first: Tensor) -> Tensor:
    """blocks [..., c, n] to [..., a, n] by w1 [a, c]."""
    return torch.matmul(first, blocks)
