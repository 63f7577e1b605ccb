"""Per-head RMS norm followed by rotary embedding, as one autograd node.

Written out of elementwise calls, the pair costs a dozen passes over the queries and keys and makes autograd keep
several float32 copies of them. The node below keeps its input and one float per row, and writes both halves of its
result in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_rope(
    x: Tensor, weight: Tensor, rope: Tensor | None, eps: float = 1e-6, *, neighbours: bool = False
) -> Tensor:
    """RMS norm over the last axis, times ``weight``, then rotary embedding of pairs of channels.

    x: [B, L, H, d], any strides. weight: [d]. rope: [2, L, d] float32, cos and sin, each with every angle written
    for both channels of its pair; None for no rotation. Statistics are float32; the table is rounded to the dtype of x
    once, after the product with the weight.
    Returns a contiguous [B, L, H, d] in the dtype of x. Pairs are (j, j + d/2), or (2j, 2j + 1) with ``neighbours``;
    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula into one kernel and plans its own saved tensors.
        return _plain(x, weight, rope, eps, neighbours)
    result: Tensor = _NormRope.apply(x, weight, rope, eps, neighbours)  # type: ignore[no-untyped-call]
    return result


def _pair(x: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    """Views [..., d/2] of the first and the second channel of every pair."""
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(-1) if neighbours else x.chunk(2, dim=-1)
    return first, second


def _joined(first: Tensor, second: Tensor, neighbours: bool) -> Tensor:
    """The inverse of `_pair`."""
    return torch.stack((first, second), dim=-1).flatten(-2) if neighbours else torch.cat((first, second), dim=-1)


def _plain(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, neighbours: bool) -> Tensor:
    out = x.float()
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * weight.float()
    if rope is not None:
        cos, sin = rope.unsqueeze(2)
        first, second = _pair(out, neighbours)
        out = out * cos + _joined(-second, first, neighbours) * sin
    return out.to(x.dtype)


def _table(rope: Tensor, weight: Tensor, dtype: torch.dtype, neighbours: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos of the first and the second of each pair, then sin, each [L, 1, d/2], with the norm's weight folded in."""
    table = torch.empty(rope.shape, dtype=dtype, device=rope.device)
    torch.mul(rope, weight, out=table)
    (cos1, cos2), (sin1, sin2) = (_pair(part.unsqueeze(1), neighbours) for part in table.unbind())
    return cos1, cos2, sin1, sin2


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, neighbours: bool) -> Tensor:
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = rows.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse_rms, weight, rope)
        ctx.neighbours = neighbours
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rope is None:
            torch.mul(x, weight, out=out)
        else:
            cos1, cos2, sin1, sin2 = _table(rope, weight, x.dtype, neighbours)
            (x1, x2), (out1, out2) = _pair(x, neighbours), _pair(out, neighbours)
            torch.mul(x1, cos1, out=out1).addcmul_(x2, sin2, value=-1)
            torch.mul(x2, cos2, out=out2).addcmul_(x1, sin1)
        return out.mul_(inverse_rms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_rms, weight, rope = ctx.saved_tensors
        neighbours = ctx.neighbours
        if ctx.needs_input_grad[1]:
            return _plain_backward(grad, x, inverse_rms, weight, rope, neighbours)
        # With n = x * inverse_rms * weight and u = d(loss)/d(n) * weight:
        # d(loss)/dx = inverse_rms * (u - x * inverse_rms^2 * mean(u * x)).
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rope is None:
            torch.mul(grad, weight, out=grad_x)
        else:
            cos1, cos2, sin1, sin2 = _table(rope, weight, x.dtype, neighbours)
            (grad1, grad2), (out1, out2) = _pair(grad, neighbours), _pair(grad_x, neighbours)
            torch.mul(grad1, cos1, out=out1).addcmul_(grad2, sin1)
            torch.mul(grad2, cos2, out=out2).addcmul_(grad1, sin2, value=-1)
        projection = (grad_x * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(inverse_rms).mul_(inverse_rms)
        grad_x.addcmul_(x, projection.to(x.dtype), value=-1.0 / x.shape[-1]).mul_(inverse_rms)
        return grad_x, None, None, None, None


def _plain_backward(
    grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, rope: Tensor | None, neighbours: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the weight, in float32: only full fine-tuning trains the weight."""
    grad = grad.float()
    if rope is not None:
        cos, sin = rope.unsqueeze(2)
        first, second = _pair(grad * sin, neighbours)
        grad = grad * cos + _joined(second, -first, neighbours)
    unit = x.float() * inverse_rms
    grad_weight = (grad * unit).flatten(0, -2).sum(0)
    grad = grad * weight
    grad_x = inverse_rms * (grad - unit * (grad * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None
