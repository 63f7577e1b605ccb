"""Number formats by name, and casting a module once instead of at every use."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def cast_parameters(module: nn.Module, dtype: torch.dtype, *, keep_float32: Sequence[str] = ()) -> None:
    """Cast the floating-point parameters and buffers of ``module`` to ``dtype``, in place.

    keep_float32: full-match patterns on parameter names, cast to float32 instead.
    """
    patterns = [re.compile(pattern) for pattern in keep_float32]
    named = [*module.named_parameters(), *module.named_buffers()]
    exact = {id(tensor) for name, tensor in named if any(pattern.fullmatch(name) for pattern in patterns)}

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if id(tensor) in exact else dtype)

    # The path that ``Module.to`` takes: whoever follows moves (shared storage) sees this one too.
    module._apply(cast)  # type: ignore[no-untyped-call]
