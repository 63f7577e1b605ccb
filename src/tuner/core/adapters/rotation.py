"""Rotations of a module's outputs: one block-diagonal rotation (OFT), or several with shuffles between (BOFT).

A skew-symmetric Q = P - P^T gives the rotation R = (I + Q)(I - Q)^-1 (Cayley), exactly the identity for P = 0.
Formulas: Qiu et al. 2023 (OFT), Liu et al. 2024 (BOFT); blocks, their order and the limit on Q as LyCORIS and
kohya-ss/sd-scripts have them. A rotation acts on what the weight alone gives, so the bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.adapters.divisors import block_size_of, butterfly_sizes
from tuner.core.adapters.layers import ChangeLayer, Making, only_linear
from tuner.core.adapters.targets import Target
from tuner.core.errors import UsageError


def limited(blocks: Tensor, constraint: float, rows: int) -> Tensor:
    """The blocks P [..., n, b, b], float32, scaled down so that the norm of P - P^T is at most constraint * rows.

    A constraint of 0 means none.
    """
    blocks = blocks.float()
    if constraint <= 0:
        return blocks
    norm: Tensor = torch.linalg.vector_norm(blocks - blocks.transpose(-1, -2))
    # Written without a comparison of values, which would wait for the device.
    factor: Tensor = (constraint * rows / (norm + 1e-8)).clamp(max=1.0)
    return blocks * factor


def turn(blocks: Tensor) -> Tensor:
    """R - I of the blocks P [..., b, b], float32."""
    blocks = blocks.float()
    skew = blocks - blocks.transpose(-1, -2)
    identity = torch.eye(skew.shape[-1], device=skew.device)
    # R - I = 2 Q (I - Q)^-1: zero, not nearly zero, at the start.
    turned: Tensor = torch.linalg.solve(identity - skew, 2 * skew, left=False)
    return turned


def rotate(y: Tensor, turns: Tensor) -> Tensor:
    """What the block-diagonal rotation adds to rows y [..., out]: y (R - I) block by block; turns [n, b, b]."""
    count, size = turns.shape[:2]
    change = torch.einsum("...nb,nbc->...nc", y.reshape(*y.shape[:-1], count, size), turns.to(y.dtype))
    return change.flatten(-2)


def butterfly(y: Tensor, turns: Tensor) -> Tensor:
    """What the stages of a butterfly add to rows y [..., out]; turns [m, n, b, b], the first stage acts first.

    Stage i pairs entries that lie 2^i b/2 apart before it rotates blocks.
    """
    half, out = turns.shape[-1] // 2, y
    for stage, turn_of in enumerate(turns):
        apart = 2**stage * half
        shuffled = out.reshape(*y.shape[:-1], -1, 2, apart).transpose(-1, -2).flatten(-3)
        # Rows of R act on the weight here, columns in the block-diagonal kind: files of both say so.
        change = rotate(shuffled, turn_of.transpose(-1, -2))
        out = out + change.reshape(*y.shape[:-1], -1, apart, 2).transpose(-1, -2).flatten(-3)
    return out - y


class OftLayer(ChangeLayer):
    """oft_blocks [n, b, b], zero at the start. alpha: the constraint; 0 is none."""

    kind = "oft"
    oft_blocks: nn.Parameter
    alpha: float

    def __init__(self, base: nn.Module, target: Target, making: Making, stored: Mapping[str, Tensor] | None) -> None:
        linear = only_linear(base, target, self.kind)
        super().__init__(making.dropout, making.keys, making.rng, making.device)
        self.rows = (linear.out_features,)
        self.alpha = target.options.constraint or (float(stored["alpha"]) if stored else 0.0)
        shape = tuple(stored["oft_blocks"].shape) if stored else self.shape(target)
        if shape[-1] * shape[-3] != self.rows[0]:
            raise UsageError(f"{target.key} has {self.rows[0]} rows, the file's blocks make {shape[-1] * shape[-3]}")
        self.oft_blocks = nn.Parameter(torch.zeros(shape, device=making.device, dtype=making.dtype))

    def shape(self, target: Target) -> tuple[int, ...]:
        count = target.options.block_count
        if count is not None and self.rows[0] % count:
            raise UsageError(
                f"the {self.rows[0]} rows of {target.key} cannot be cut into {count} blocks",
                where="network.block_count",
                fix="choose a number that divides the rows of every module, or use block_size",
            )
        size = block_size_of(self.rows[0], target.options.block_size) if count is None else self.rows[0] // count
        return self.rows[0] // size, size, size

    @property
    def settings(self) -> str:
        *_, count, size, _ = self.oft_blocks.shape
        limit = f", constraint {self.alpha:g}" if self.alpha else ""
        return f"{count} blocks of {size}{limit}"

    def turns(self) -> Tensor:
        return turn(limited(self.oft_blocks, self.alpha, self.rows[0]))

    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return rotate(without_bias(y, base), self.turns() * self.strength)

    def rescaled(self, parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The file's limit is applied to its blocks: this layer may have another one."""
        given = float(parts["alpha"])
        if given == self.alpha:
            return dict(parts)
        return {"oft_blocks": limited(parts["oft_blocks"], given, self.rows[0]), **self.fixed()}


class BoftLayer(OftLayer):
    """oft_blocks [m, n, b, b]: m stages. A strength between 0 and 1 shortens every stage."""

    kind = "boft"

    def shape(self, target: Target) -> tuple[int, ...]:
        stages, count, size = butterfly_sizes(self.rows[0], target.options.block_size)
        if not stages:
            raise UsageError(
                f"{target.key} cannot have butterfly blocks of at most {target.options.block_size}",
                where="network.block_size",
                why=f"its {self.rows[0]} rows are not an even number up to that times a power of two",
                fix="raise it, exclude the module, or use network.type 'oft'",
            )
        return stages, count, size, size

    @property
    def settings(self) -> str:
        return f"{len(self.oft_blocks)} stages of {super().settings}"

    def change(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return butterfly(without_bias(y, base), self.turns() * self.strength)


def without_bias(y: Tensor, base: nn.Module) -> Tensor:
    """The outputs y [..., rows] of a linear ``base`` without its bias, in the dtype of y."""
    bias: Any = base.bias
    return y if bias is None else y - bias.to(y.dtype)
