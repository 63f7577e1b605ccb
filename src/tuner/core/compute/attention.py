"""Softmax attention behind one function, so that a run can choose how it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tuner.core.compute.attention_kernels import run_kernel
from tuner.core.config.attention import KERNELS
from tuner.core.errors import UsageError


class _Chosen:
    """What `attending` asks for; None outside."""

    def __init__(self) -> None:
        self.kernel: str | None = None


_chosen = _Chosen()


@contextmanager
def attending(backend: str | None) -> Iterator[None]:
    """Compute all attention by ``backend`` inside, whatever callers of `attention` name; None changes nothing.

    For the whole process, so only where nothing else computes.
    """
    before = _chosen.kernel
    _chosen.kernel = before if backend is None else backend
    try:
        yield
    finally:
        _chosen.kernel = before


def check_backend(backend: str) -> str:
    """``backend`` itself, or a UsageError that lists what exists."""
    if backend not in KERNELS:
        raise UsageError(
            f"Unknown attention backend {backend!r}.",
            where="attention.backend",
            fix=f"Use one of: {', '.join(KERNELS)}.",
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
    kernel = check_backend(_chosen.kernel or backend)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
    if split and q.shape[0] > 1:
        parts = [_attend(kernel, *sample) for sample in _samples(q, k, v, bias)]
        return torch.cat(parts)
    return _attend(kernel, q, k, v, bias)


def _attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dtype != torch.bool:
        return run_kernel(kernel, q, k, v, bias)
    # Kernels disagree on fully masked rows (zero or NaN), so such rows attend everywhere and are zeroed afterwards.
    some = bias.any(dim=-1, keepdim=True)
    out = run_kernel(kernel, q, k, v, bias | ~some)
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
