"""Per-head RMS norm followed by rotary embedding, as one autograd node.

Written out of elementwise calls, the pair costs a dozen passes over the queries and keys and makes autograd keep
several float32 copies of them. The node below keeps its input and one float per row, and writes both halves of its
result in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last axis, times ``weight``, then rotary embedding in the halves form.

    x: [B, L, H, d], any strides. weight: [d]. cos, sin: [L, d] float32, the half vector written twice; None for no
    rotation. Statistics are float32; tables are rounded to the dtype of x once, after the product with the weight.
    Returns a contiguous [B, L, H, d] in the dtype of x. Pairs are (j, j + d/2), the rotation is
    ``u * cos + cat(-u[d/2:], u[:d/2]) * sin``.
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula into one kernel and plans its own saved tensors.
        return _plain(x, weight, cos, sin, eps)
    result: Tensor = _NormRope.apply(x, weight, cos, sin, eps)
    return result


def _plain(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    out = x.float()
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * weight.float()
    if cos is not None and sin is not None:
        first, second = out.chunk(2, dim=-1)
        out = out * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return out.to(x.dtype)


def _table(angles: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both halves [L, 1, d/2] of a rotation table with the norm's weight folded in."""
    first, second = (angles * weight).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return first, second


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = rows.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse_rms, weight, cos, sin)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if cos is None or sin is None:
            torch.mul(x, weight.to(x.dtype), out=out)
        else:
            (cos1, cos2), (sin1, sin2) = _table(cos, weight, x.dtype), _table(sin, weight, x.dtype)
            (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
            torch.mul(x1, cos1, out=out1).addcmul_(x2, sin2, value=-1)
            torch.mul(x2, cos2, out=out2).addcmul_(x1, sin1)
        return out.mul_(inverse_rms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inverse_rms, weight, cos, sin = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            return _plain_backward(grad, x, inverse_rms, weight, cos, sin)
        # With n = x * inverse_rms * weight and u = d(loss)/d(n) * weight:
        # d(loss)/dx = inverse_rms * (u - x * inverse_rms^2 * mean(u * x)).
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if cos is None:
            torch.mul(grad, weight.to(x.dtype), out=grad_x)
        else:
            (cos1, cos2), (sin1, sin2) = _table(cos, weight, x.dtype), _table(sin, weight, x.dtype)
            (grad1, grad2), (out1, out2) = grad.chunk(2, dim=-1), grad_x.chunk(2, dim=-1)
            torch.mul(grad1, cos1, out=out1).addcmul_(grad2, sin1)
            torch.mul(grad2, cos2, out=out2).addcmul_(grad1, sin2, value=-1)
        projection = (grad_x * x).sum(-1, keepdim=True, dtype=torch.float32)
        projection.mul_(inverse_rms).mul_(inverse_rms).div_(x.shape[-1])
        grad_x.addcmul_(x, projection.to(x.dtype), value=-1).mul_(inverse_rms)
        return grad_x, None, None, None, None


def _plain_backward(
    grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the weight, in float32: only full fine-tuning trains the weight."""
    grad = grad.float()
    if cos is not None and sin is not None:
        first, second = (grad * sin[:, None]).chunk(2, dim=-1)
        grad = grad * cos[:, None] + torch.cat((second, -first), dim=-1)
    unit = x.float() * inverse_rms
    grad_weight = (grad * unit).flatten(0, -2).sum(0)
    grad = grad * weight
    grad_x = inverse_rms * (grad - unit * (grad * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None
