"""Whole models as files: the file that was loaded, with the trained values in the place of the old ones.

Names, their order, and everything that did not train stay as they were: other parts of an all-in-one file, buffers,
frozen components. Tensors are written one by one, so that memory holds one of them beside the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.streams import FILE_NAMES, Planned, copied, write_tensors
from tuner.core.compute.dtypes import dtype_by_name
from tuner.core.compute.weights import read_tensors
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts, StoredFile, StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCheckpoint:
    """keys: of the file. trained: those with values that took part in the training; the others are as they were."""

    keys: int
    trained: int
    format: str = "checkpoint"

    @property
    def modules(self) -> int:
        return self.trained

    def __str__(self) -> str:
        return f"{self.trained} trained tensors, {self.keys - self.trained} as they were"


def stored_files(config: RunConfig, facts: ModelFacts) -> tuple[StoredFile, ...]:
    """The files that hold the components that train, as the model's plugin describes them."""
    module, _, attribute = facts.stored.partition(":")
    files: tuple[StoredFile, ...] = getattr(importlib.import_module(module), attribute)(config)
    trained = set(config.train.components)
    return tuple(
        each
        for each in files
        if any(name.partition(":")[0] in trained for stored in each.tensors.values() for name in stored.names)
    )


def checkpoint_dtype(config: RunConfig) -> torch.dtype:
    """The dtype that trained values are written in."""
    return dtype_by_name(config.checkpoint.dtype or config.precision.compute)


def save_checkpoint(
    tensors: Mapping[str, Tensor],
    files: Sequence[StoredFile],
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> list[Path]:
    """Write every file of ``files`` with trained values in ``dtype``; returns the paths, ``path`` first.

    tensors: by ``component:parameter``, as `network_tensors` gives them. Each file appears complete or not at all.
    OSErrors (disk full) pass through.
    """
    written = []
    for file in files:
        target = file_beside(path, file)
        _write(tensors, file, target, metadata, dtype)
        written.append(target)
    return written


def file_beside(path: Path, file: StoredFile) -> Path:
    """Where a file goes when the denoiser's is ``path``."""
    return path.with_name(f"{path.stem}_{file.name}{path.suffix}") if file.name else path


def verify_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], file: StoredFile, dtype: torch.dtype
) -> VerifiedCheckpoint:
    """Read a written file back and compare every tensor with memory, or with the file it was copied from.

    UsageError naming the first that differs.
    """
    header = safetensors_header(path)
    if list(header) != list(file.header):
        raise UsageError("the written file has other tensors than the one that was loaded", where=str(path))
    trained = 0
    for key, value in read_tensors(header):
        stored = file.tensors.get(key)
        if stored is not None and _trained(tensors, stored):
            expected = assembled(tensors, stored, dtype)
            trained += 1
        else:
            [(_, expected)] = read_tensors(file.header.renamed({key: key}))
        if value.dtype != expected.dtype or not _same_bytes(value, expected):
            raise UsageError("the written file differs from the trained weights", where=f"{path}, {key}")
    return VerifiedCheckpoint(keys=len(header), trained=trained)


def read_checkpoint(path: Path, file: StoredFile, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """(``component:parameter``, values) of the parameters in ``shapes``, from a file that `save_checkpoint` wrote."""
    header = safetensors_header(path)
    wanted = {key: stored for key, stored in file.tensors.items() if all(name in shapes for name in stored.names)}
    missing = [key for key in wanted if key not in header]
    if missing:
        raise UsageError(f"the file lacks {missing[0]}", where=str(path), why="it is of another model")
    for key, value in read_tensors(header.renamed({key: key for key in wanted})):
        stored = wanted[key]
        yield from zip(stored.names, members(value, stored), strict=True)


def members(value: Tensor, stored: StoredTensor) -> tuple[Tensor, ...]:
    """A tensor of a file [rows, ...] cut into its parameters [own rows, ...], in the order of ``stored.names``."""
    value = torch.cat(value.chunk(2)[::-1]) if stored.exchange else value
    if len(stored.names) == 1:
        return (value,)
    rows = stored.rows or (1,) * len(stored.names)
    unit = value.shape[0] // sum(rows)
    return torch.split(value, [count * unit for count in rows])


def read_weights(
    config: RunConfig, facts: ModelFacts, path: Path, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """(``component:parameter``, values) of a fully trained model: of ``path`` and of the files beside it, as a training
    writes them. shapes: of the parameters that are wanted."""
    for file in stored_files(config, facts):
        yield from read_checkpoint(file_beside(path, file), file, shapes)


def _write(
    tensors: Mapping[str, Tensor], file: StoredFile, path: Path, metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    planned = {}
    for key, info in file.header.items():
        stored = file.tensors.get(key)
        if stored is not None and _trained(tensors, stored):
            value = partial(assembled, tensors, stored, dtype)
            planned[key] = Planned(FILE_NAMES[dtype], info.shape, value)
        else:
            planned[key] = copied(info)
    write_tensors(path, planned, metadata)


def _trained(tensors: Mapping[str, Tensor], stored: StoredTensor | None) -> bool:
    return stored is not None and all(name in tensors for name in stored.names)


def assembled(tensors: Mapping[str, Tensor], stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The values of one tensor of a file in ``dtype``, on the CPU and contiguous: the only copy that is made.

    tensors: by ``component:parameter``. What `members` cuts apart is joined again.
    """
    parts = [tensors[name] for name in stored.names]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if len(parts) > 1 else tuple(parts[0].shape)
    return joined(parts, shape, stored, dtype)


def joined(parts: Iterable[Tensor], shape: tuple[int, ...], stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """As `assembled`, from parts in the order of ``stored.names`` that may be made one after the other."""
    value = torch.empty(shape, dtype=dtype)
    start = 0
    for part in parts:
        rows = value.narrow(0, start, part.shape[0]) if len(stored.names) > 1 else value
        if stored.exchange:
            for target, half in zip(rows.chunk(2), part.chunk(2)[::-1], strict=True):
                target.copy_(half)
        else:
            rows.copy_(part)
        start += part.shape[0] if part.ndim else 0
    return value


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )
