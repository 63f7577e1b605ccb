"""Writing a weight file tensor by tensor: the header first, then one value after the other, never all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from tuner.core.adapters.files import header_bytes
from tuner.core.atomic import atomic_path
from tuner.core.compute.weights import FILE_DTYPES, write_values
from tuner.core.errors import UsageError
from tuner.core.files import DTYPE_BYTES, TensorInfo, WeightHeader

COPY_BYTES = 1 << 24
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that describe the bytes of the old file."""
FILE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of a file to come. dtype: as safetensors spell it. value: bytes to copy, or what makes the tensor."""

    dtype: str
    shape: tuple[int, ...]
    value: TensorInfo | Callable[[], Tensor]


def about(header: WeightHeader) -> dict[str, str]:
    """The metadata that stay true of a file with other tensors."""
    return {name: value for name, value in header.metadata.items() if name not in STALE}


def copied(info: TensorInfo) -> Planned:
    """A tensor that is taken over as it is."""
    return Planned(info.dtype, info.shape, info)


def silent(done: int, total: int) -> None:
    """For callers that show no progress."""


def write_tensors(
    path: Path,
    planned: Mapping[str, Planned],
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] = silent,
) -> None:
    """Write a file that holds ``planned`` in its order; one value is in memory at a time.

    progress: gets how many tensors are written, and of how many. The file appears complete or not at all. UsageError: a
    value of another shape or dtype than planned.
    """
    entries: dict[str, object] = {}
    start = 0
    for key, each in planned.items():
        # What is copied need not be of a number format that is known here.
        taken = each.value if isinstance(each.value, TensorInfo) else None
        stop = start + (taken.stop - taken.start if taken else DTYPE_BYTES[each.dtype] * math.prod(each.shape))
        entries[key] = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [start, stop]}
        start = stop
    with atomic_path(path) as temporary, temporary.open("wb") as target:
        target.write(header_bytes(entries, metadata))
        for number, (key, each) in enumerate(planned.items()):
            if isinstance(each.value, TensorInfo):
                _copy(each.value, target)
            else:
                _write(each.value(), key, each, path, target)
            progress(number + 1, len(planned))


def _write(value: Tensor, key: str, planned: Planned, path: Path, target: BinaryIO) -> None:
    if tuple(value.shape) != planned.shape or FILE_NAMES[value.dtype] != planned.dtype:
        raise UsageError(
            f"{key} has shape {list(planned.shape)} in the loaded file and {list(value.shape)} now", where=str(path)
        )
    write_values(value, target)


def _copy(info: TensorInfo, target: BinaryIO) -> None:
    with info.path.open("rb") as source:
        source.seek(info.start)
        left = info.stop - info.start
        while left:
            block = source.read(min(left, COPY_BYTES))
            if not block:
                raise UsageError("the weight file is cut short", where=str(info.path))
            target.write(block)
            left -= len(block)
