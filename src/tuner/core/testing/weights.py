"""Weight files without weights: a full-size model whose files take no room."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from tuner.core.files import DTYPE_BYTES


def write_empty_weights(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16") -> Path:
    """A safetensors file with these tensors and a body that is a hole in the file; returns ``path``.

    dtype: as safetensors spells it. File systems with sparse files (all common ones but FAT) store the header alone.
    Load such files with ``Placement(device="meta")``: the values are never read.
    """
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name, shape in shapes.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return path
