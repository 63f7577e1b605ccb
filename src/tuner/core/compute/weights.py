"""Weights from disk into a module, one tensor at a time: the whole file is never held beside the model.

Build the module on the meta device, then `assign`: peak memory is the model in its final dtype plus one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from tuner.core.errors import UsageError
from tuner.core.files import TensorInfo, WeightHeader, key_mismatch

FILE_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_tensors(header: WeightHeader, *, mmap: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) for every entry of ``header``, in the order of the bytes in the files.

    mmap: map the file; the tensors are views of it, valid after the file is closed, and never to be written to. False
    reads with ordinary calls into memory of their own. Inside ``with torch.device("meta")`` the tensors have dtype and
    shape only, and nothing is read: that is how a model is looked at that does not fit into memory.
    """
    shapes_only = torch.get_default_device().type == "meta"
    by_file: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, stored in header.tensors.items():
        if stored.dtype not in FILE_DTYPES:
            raise UsageError(f"tensor {stored.name} has dtype {stored.dtype}", where=str(stored.path),
                             why="this version cannot read it", fix="use a BF16, F16 or F32 file")  # fmt: skip
        by_file.setdefault(stored.path, []).append((name, stored))
    for path, entries in by_file.items():
        entries.sort(key=lambda entry: entry[1].start)
        if shapes_only:
            yield from ((name, torch.empty(info.shape, dtype=FILE_DTYPES[info.dtype])) for name, info in entries)
            continue
        yield from _mapped(path, entries) if mmap else _read(path, entries)


def write_values(value: Tensor, target: BinaryIO) -> None:
    """The values of a tensor as a weight file holds them; one that lies on the CPU is not copied. OSErrors (disk full)
    pass through."""
    target.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _mapped(path: Path, entries: list[tuple[str, TensorInfo]]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name, stored in entries:
            yield name, file.get_tensor(stored.name)


def _read(path: Path, entries: list[tuple[str, TensorInfo]]) -> Iterator[tuple[str, Tensor]]:
    with path.open("rb") as file:
        for name, stored in entries:
            file.seek(stored.start)
            data = bytearray(stored.stop - stored.start)
            if file.readinto(data) != len(data):
                raise UsageError("the weight file is cut short", where=str(path), why=f"{stored.name} is incomplete",
                                 fix="copy or download the file again")  # fmt: skip
            dtype = FILE_DTYPES[stored.dtype]
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            yield name, flat.view(stored.shape)


def assign(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    where: str | None = None,
    unused: Callable[[str], bool] = lambda name: False,
    keep_float32: Sequence[str] = (),
) -> None:
    """Give every parameter of ``module`` (usually on the meta device) its value from ``tensors``; nothing may be left.

    Values are cast to ``dtype`` on ``device``, frozen, and owned by the module. keep_float32: full-match patterns of
    names that become float32 instead. Names for which ``unused`` is true are passed over. Raises UsageError that lists
    every missing key, every unknown key, and the first wrong shape.
    """
    expected = dict(module.named_parameters())
    missing, unknown = set(expected), []
    for name, tensor in tensors:
        if unused(name):
            continue
        if name not in expected:
            unknown.append(name)
            continue
        if tensor.shape != expected[name].shape:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}", where=where,
                             why=f"a model of this size needs {tuple(expected[name].shape)}",
                             fix="use a complete, unmixed model file")  # fmt: skip
        exact = any(re.fullmatch(pattern, name) for pattern in keep_float32)
        value = tensor.to(device=device, dtype=torch.float32 if exact else dtype, copy=True)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
        missing.discard(name)
    error = key_mismatch(missing, unknown, where)
    if error is not None:
        raise error
