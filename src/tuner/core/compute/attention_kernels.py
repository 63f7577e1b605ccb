"""The kernels behind ``attention.backend``: torch's own by name, and packages with a signature each.

A package is imported when it is first used. Kernels of packages have not been run on a GPU by this project yet; what is
tested is that they are called the way they document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tuner.core.config.attention import KERNELS
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts

TORCH = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def run_kernel(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v by the kernel ``name``; q, k, v [B, H, L, d], bias as torch takes it.

    UsageError for a bias that the kernel cannot take, and for a gradient that it does not have.
    """
    if name == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if name in TORCH:
        with sdpa_kernel(TORCH[name]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if bias is not None:
        raise UsageError(f"{name!r} cannot hide tokens", where="attention", fix="use 'sdpa'")
    if name == "sage" and torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        raise UsageError("'sage' has no gradient", where="attention", fix="use it as attention.sample_backend")
    return PACKAGES[name](q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _by_tokens(import_module("flash_attn").flash_attn_func, q, k, v)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _by_tokens(import_module("flash_attn_interface").flash_attn_func, q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _by_tokens(import_module("xformers.ops").memory_efficient_attention, q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = import_module("sageattention").sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return out


def _by_tokens(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call ``function`` with [B, L, H, d]; some versions give the log-sum-exp as well."""
    result = function(*(each.transpose(1, 2) for each in (q, k, v)))
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)


PACKAGES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash": _flash,
    "flash3": _flash3,
    "xformers": _xformers,
    "sage": _sage,
}


def check_attention(config: RunConfig, facts: ModelFacts | None, device: torch.device) -> None:
    """UsageError for a kernel that this machine does not have or that cannot do what the run asks of it here."""
    attention = config.attention
    for key, name in (("backend", attention.backend), ("sample_backend", attention.sample_backend)):
        if name is not None:
            _check(name, f"attention.{key}", config, facts, device)


def _check(name: str, where: str, config: RunConfig, facts: ModelFacts | None, device: torch.device) -> None:
    kernel = KERNELS[name]
    if kernel.cuda and device.type != "cuda":
        why = f"this device is of type {device.type}"
        raise UsageError(f"{name!r} runs on NVIDIA GPUs only", where=where, why=why, fix="use 'sdpa'")
    if kernel.module is not None and find_spec(kernel.module) is None:
        raise UsageError(f"{name!r} needs a package that is not installed", where=where, fix=kernel.install)
    if device.type != "cuda":
        return
    if kernel.capabilities and torch.cuda.get_device_capability(device)[0] not in kernel.capabilities:
        wanted = " or ".join(f"{each}.x" for each in kernel.capabilities)
        raise UsageError(f"{name!r} needs a GPU of compute capability {wanted}", where=where, fix="use 'sdpa'")
    if not kernel.fp32 and config.precision.compute == "fp32":
        fix = "set precision.compute to 'bf16'"
        raise UsageError(f"{name!r} cannot compute in float32 on a GPU", where=where, fix=fix)
    if not kernel.masks and facts is not None and facts.hides_keys:
        why = "this model hides the padding of its captions"
        raise UsageError(f"{name!r} cannot hide tokens on a GPU", where=where, why=why, fix="use 'sdpa'")
