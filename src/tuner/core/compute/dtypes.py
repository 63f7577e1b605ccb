"""Number formats by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tuner.core.errors import UsageError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def dtype_by_name(name: str, *, where: str | None = None) -> torch.dtype:
    """The torch dtype called ``name``; UsageError with the known names otherwise."""
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}.", where=where, fix=f"Use one of: {', '.join(DTYPES)}.")
    return DTYPES[name]


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a linear computes in: that of its weight, which a quantized one need not read back to tell."""
    own = getattr(module, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
