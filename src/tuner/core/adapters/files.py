"""Adapter files: reading any format of a model, writing one, and the hashes that model browsers look up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.formats import decode_adapter, encode_adapter
from tuner.core.atomic import atomic_path
from tuner.core.errors import UsageError
from tuner.core.files import safetensors_header

if TYPE_CHECKING:
    from tuner.core.types import KeyFormat, KeyMaps

HASHES = ("sshs_model_hash", "sshs_legacy_hash")
LEGACY_OFFSET, LEGACY_BYTES = 0x100000, 0x10000


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """A file that was read. tensors: internal names (`formats.py`), on the CPU, in the file's dtype."""

    path: Path
    tensors: dict[str, Tensor]
    format: str
    metadata: dict[str, str]
    keys: int


def read_adapter(path: Path, maps: KeyMaps) -> AdapterFile:
    """Read an adapter in any format of `maps`. UsageError: not a safetensors file, or a key that maps nowhere."""
    metadata, tensors = _read(path)
    try:
        internal, name = decode_adapter(tensors, maps.formats, maps.paths(tuple(tensors)), metadata)
    except UsageError as error:
        raise UsageError(error.what, where=error.where or str(path), why=error.why, fix=error.fix) from error
    return AdapterFile(path=path, tensors=internal, format=name, metadata=metadata, keys=len(tensors))


def save_adapter(
    tensors: Mapping[str, Tensor],
    fmt: KeyFormat,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write internal tensors in a format; the same tensors and metadata give the same bytes. The hashes are recomputed.

    The file appears complete or not at all. OSErrors (disk full) pass through and leave an older file as it was.
    """
    import safetensors.torch

    blob = safetensors.torch.save(encode_adapter(tensors, fmt, dtype))
    size = int.from_bytes(blob[:8], "little")
    entries, data = json.loads(blob[8 : 8 + size]), memoryview(blob)[8 + size :]
    strings = {key: value for key, value in metadata.items() if key not in HASHES}
    strings |= _hashes(entries, data, strings)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header_bytes(entries, strings))
        file.write(data)
    return path


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    import safetensors.torch

    metadata = dict(safetensors_header(path).metadata)
    return metadata, safetensors.torch.load_file(path)


def header_bytes(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a safetensors header. The library keeps metadata in random order; sorted, bytes repeat."""
    content = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**content, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hashes(entries: Mapping[str, object], data: memoryview, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes that kohya-ss/sd-scripts stores: of the tensor bytes, and of 64 KiB one MiB into the file.

    The second one is defined on a file whose metadata are the `ss_` keys alone.
    """
    header = header_bytes(entries, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = max(LEGACY_OFFSET - len(header), 0)
    inside = header[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_BYTES]
    window = bytes(inside) + bytes(data[start : start + LEGACY_BYTES - len(inside)])
    return {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }
