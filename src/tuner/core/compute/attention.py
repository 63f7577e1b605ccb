"""Softmax attention behind one function, so that a run can choose how it is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.core.errors import UsageError

BACKENDS = ("sdpa",)


def check_backend(backend: str) -> str:
    """``backend`` itself, or a UsageError that lists what exists."""
    if backend not in BACKENDS:
        raise UsageError(
            f"Unknown attention backend {backend!r}.",
            where="attention.backend",
            fix=f"Use one of: {', '.join(BACKENDS)}.",
        )
    return backend


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, backend: str = "sdpa", split: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v.

    q: [B, H, Lq, d]; k, v: [B, H, Lk, d]; returns [B, H, Lq, d]. bias broadcasts to [B, H, Lq, Lk]: boolean (True takes
    part) or a float added to the logits. A query whose boolean row is all False gets exactly zero, whatever the
    kernel underneath does. split: one sample at a time, which lowers the peak of kernels that hold the logits.
    """
    check_backend(backend)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
    if split and q.shape[0] > 1:
        parts = [_attend(*sample) for sample in _samples(q, k, v, bias)]
        return torch.cat(parts)
    return _attend(q, k, v, bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dtype != torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # Kernels disagree on fully masked rows (zero or NaN), so such rows attend everywhere and are zeroed afterwards.
    some = bias.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias | ~some)
    return torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device))


def _samples(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    count = q.shape[0]
    if bias is None:
        biases: list[Tensor | None] = [None] * count
    elif bias.shape[0] == count:
        biases = [*bias.tensor_split(count)]
    else:
        biases = [bias] * count
    return list(zip(q.tensor_split(count), k.tensor_split(count), v.tensor_split(count), biases, strict=True))
