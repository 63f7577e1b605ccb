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


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or "not a number"; mostly told by the sum, which needs no memory."""
    values = values.float() if values.dtype.itemsize == 1 else values
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def fitting(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``values`` in ``dtype``. UsageError for finite ones beyond its range. name: what the error calls them."""
    both = values.is_floating_point() and dtype.is_floating_point and values.numel()
    if both and torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        # float8 has no minimum of its own.
        known = values.float() if values.dtype.itemsize == 1 else values
        largest = max(map(abs, map(float, torch.aminmax(known))))
        if torch.finfo(dtype).max < largest < float("inf"):
            raise beyond(dtype, name)
    return values.to(dtype)


def beyond(dtype: torch.dtype, name: str) -> UsageError:
    """The error for values that ``dtype`` has no numbers for."""
    return UsageError(
        f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold",
        why=f"its largest number is {torch.finfo(dtype).max:g}",
        fix="choose bf16 or fp32",
    )


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a linear computes in: that of its weight, which a quantized one need not read back to tell."""
    own = getattr(module, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
