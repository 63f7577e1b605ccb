"""Per-head RMS norm followed by rotary embedding, as one autograd node.

Written out of elementwise calls, the pair costs a dozen passes over the queries and keys and makes autograd keep
several float32 copies of them. The node below keeps its input and one float per row, and writes both halves of its
result in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last axis, times ``weight``, then rotary embedding in the halves form.

    x: [B, L, H, d], any strides. weight: [d]. rope: [2, L, d] float32, cos and sin, each with its half vector written
    twice; None for no rotation. Statistics are float32; the table is rounded to the dtype of x once, after the product
    with the weight.
    Returns a contiguous [B, L, H, d] in the dtype of x. Pairs are (j, j + d/2), the rotation is
    ``u * cos + cat(-u[d/2:], u[:d/2]) * sin``.
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula into one kernel and plans its own saved tensors.
        return _plain(x, weight, rope, eps)
    result: Tensor = _NormRope.apply(x, weight, rope, eps)  # type: ignore[no-untyped-call]
    return result


def _plain(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float) -> Tensor:
    out = x.float()
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * weight.float()
    if rope is not None:
        cos, sin = rope.unsqueeze(2)
        first, second = out.chunk(2, dim=-1)
        out = out * cos + torch.cat((-second, first), dim=-1) * sin
    return out.to(x.dtype)


def _table(rope: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second half of cos, then of sin, each [L, 1, d/2], with the norm's weight folded in."""
    table = torch.empty(rope.shape, dtype=dtype, device=rope.device)
    torch.mul(rope, weight, out=table)
    (cos1, cos2), (sin1, sin2) = (part.unsqueeze(1).chunk(2, dim=-1) for part in table.unbind())
    return cos1, cos2, sin1, sin2


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rope: Tensor | None, eps: float) -> Tensor:
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = rows.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse_rms, weight, rope)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rope is None:
            torch.mul(x, weight, out=out)
        else:
            cos1, cos2, sin1, sin2 = _table(rope, weight, x.dtype)
            (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
            torch.mul(x1, cos1, out=out1).addcmul_(x2, sin2, value=-1)
            torch.mul(x2, cos2, out=out2).addcmul_(x1, sin1)
        return out.mul_(inverse_rms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_rms, weight, rope = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            return _plain_backward(grad, x, inverse_rms, weight, rope)
        # With n = x * inverse_rms * weight and u = d(loss)/d(n) * weight:
        # d(loss)/dx = inverse_rms * (u - x * inverse_rms^2 * mean(u * x)).
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rope is None:
            torch.mul(grad, weight, out=grad_x)
        else:
            cos1, cos2, sin1, sin2 = _table(rope, weight, x.dtype)
            (grad1, grad2), (out1, out2) = grad.chunk(2, dim=-1), grad_x.chunk(2, dim=-1)
            torch.mul(grad1, cos1, out=out1).addcmul_(grad2, sin1)
            torch.mul(grad2, cos2, out=out2).addcmul_(grad1, sin2, value=-1)
        projection = (grad_x * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(inverse_rms).mul_(inverse_rms)
        grad_x.addcmul_(x, projection.to(x.dtype), value=-1.0 / x.shape[-1]).mul_(inverse_rms)
        return grad_x, None, None, None


def _plain_backward(
    grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, rope: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the weight, in float32: only full fine-tuning trains the weight."""
    grad = grad.float()
    if rope is not None:
        cos, sin = rope.unsqueeze(2)
        first, second = (grad * sin).chunk(2, dim=-1)
        grad = grad * cos + torch.cat((second, -first), dim=-1)
    unit = x.float() * inverse_rms
    grad_weight = (grad * unit).flatten(0, -2).sum(0)
    grad = grad * weight
    grad_x = inverse_rms * (grad - unit * (grad * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None
