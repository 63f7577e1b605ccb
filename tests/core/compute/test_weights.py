"""Weights go from a file into a module one by one, cast on the way; nothing may be left over on either side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tuner.core.compute.weights import assign, read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.randn(4, 3), "bias": torch.randn(4, dtype=torch.bfloat16)}, path)
    return path


def linear(file: Path, *, mmap: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.device("meta"):
        module = nn.Linear(3, 4)
    assign(module, read_tensors(safetensors_header(file), mmap=mmap), dtype=dtype)
    return module


def test_mapped_and_plain_reading_give_the_same_values(file: Path) -> None:
    mapped, plain = linear(file, mmap=True), linear(file, mmap=False)
    assert torch.equal(mapped.weight, plain.weight)
    assert torch.equal(mapped.bias, plain.bias)


def test_every_file_dtype_is_read(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(4).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn)
    }
    path = tmp_path / "all.safetensors"
    save_file({**tensors, "empty": torch.zeros(0, 3)}, path)
    read = dict(read_tensors(safetensors_header(path), mmap=False))
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())
    assert read["empty"].shape == (0, 3)


def test_values_are_cast_frozen_and_owned_by_the_module(file: Path) -> None:
    module = linear(file, dtype=torch.bfloat16)
    before = file.read_bytes()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        linear(file).weight.add_(1.0)
    assert file.read_bytes() == before


def test_missing_and_unknown_keys_are_named(file: Path) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(UsageError) as caught:
        assign(module, read_tensors(safetensors_header(file)), dtype=torch.float32, where="weights.safetensors")
    assert caught.value.why == "missing: 0.bias, 0.weight; unknown: bias, weight"
    assert caught.value.where == "weights.safetensors"


def test_a_wrong_shape_is_named(file: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(5, 4)
    with pytest.raises(UsageError, match=r"weight has shape \(4, 3\)"):
        assign(module, read_tensors(safetensors_header(file)), dtype=torch.float32)


def test_names_declared_unused_may_be_in_the_file(file: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 4, bias=False)
    tensors = read_tensors(safetensors_header(file))
    assign(module, tensors, dtype=torch.float32, unused=lambda name: name == "bias")
    assert module.weight.shape == (4, 3)


def test_named_parameters_stay_float32(file: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 4)
    tensors = read_tensors(safetensors_header(file))
    assign(module, tensors, dtype=torch.bfloat16, keep_float32=("bia.",))
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.float32)
