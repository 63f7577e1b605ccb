"""Dtypes by name."""

from __future__ import annotations

import pytest
import torch

from tuner.core.compute.dtypes import dtype_by_name
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
