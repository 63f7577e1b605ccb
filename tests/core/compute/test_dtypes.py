"""Dtypes by name, and casts that keep parameters' identity and shared storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tuner.core.compute.dtypes import cast_parameters, dtype_by_name
from tuner.core.compute.linear import share_storage
from tuner.core.errors import UsageError


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32), ("fp16", torch.float16)]
)
def test_both_spellings_name_a_dtype(name: str, dtype: torch.dtype) -> None:
    assert dtype_by_name(name) == dtype


def test_an_unknown_name_is_an_error_at_its_place() -> None:
    with pytest.raises(UsageError, match="float12") as caught:
        dtype_by_name("float12", where="precision.compute")
    assert "precision.compute" in str(caught.value)


def test_a_cast_leaves_named_parameters_in_float32_and_integers_alone() -> None:
    module = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4), "table": nn.Linear(4, 4)})
    module.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    before = module["linear"].weight
    cast_parameters(module, torch.bfloat16, keep_float32=(r"norm\..*",))
    assert module["linear"].weight is before
    assert module["linear"].weight.dtype == torch.bfloat16
    assert module["norm"].weight.dtype == torch.float32
    assert module.get_buffer("count").dtype == torch.int64
    cast_parameters(module, torch.float32)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_cast_keeps_shared_storage_shared() -> None:
    module = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    share_storage(list(module))
    cast_parameters(module, torch.bfloat16)
    first, second = (linear.weight for linear in module)
    assert second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()
