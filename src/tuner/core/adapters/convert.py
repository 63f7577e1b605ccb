"""Rewriting an adapter file in another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.adapters.files import read_adapter, save_adapter
from tuner.core.adapters.formats import format_by_name, modules_of
from tuner.core.adapters.spelling import PEFT_METADATA
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import KeyMaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert_adapter` did."""

    source_format: str
    format: str
    modules: int
    path: Path


def convert_adapter(
    source: Path, destination: Path, to_format: str, maps: KeyMaps, *, overwrite: bool = False
) -> Conversion:
    """Write `source` in another format, values and dtypes unchanged except for folding alpha where the format has none.

    Metadata are kept, hashes recomputed. UsageError: an unmapped key, an unknown format, an existing destination.
    """
    fmt = format_by_name(maps, to_format, where="--to")
    if destination.exists() and not overwrite:
        raise UsageError("the destination exists", where=str(destination), fix="choose another name")
    read = read_adapter(source, maps)
    # These describe alphas that are now in the tensors; a reader that applied them again would scale twice.
    metadata = {key: value for key, value in read.metadata.items() if key != PEFT_METADATA}
    save_adapter(read.tensors, fmt, destination, metadata)
    return Conversion(
        source_format=read.format, format=fmt.name, modules=len(modules_of(read.tensors)), path=destination
    )
