"""Reading what a weight file holds without reading the weights, and without torch.

A safetensors file starts with 8 bytes (little-endian length), then that many bytes of JSON: one entry per tensor with
dtype, shape and byte range, plus optional ``__metadata__`` strings. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.core.errors import NotHereError, UsageError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One entry of a safetensors header; dtype as the file spells it (``BF16``, ``F32``).

    The values lie in bytes [start, stop) of ``path``, under ``name`` there.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path = Path()
    name: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class WeightHeader(Mapping[str, TensorInfo]):
    """Tensor names to their place, of one file or of all shards of one model; plus the file's metadata strings."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def renamed(self, names: Mapping[str, str]) -> WeightHeader:
        """The same tensors under other names: ``names`` maps new to old; what it leaves out is dropped."""
        return WeightHeader(self.path, {new: self.tensors[old] for new, old in names.items()}, self.metadata)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(info.path for info in self.tensors.values()))


def safetensors_header(path: Path | str) -> WeightHeader:
    """The header of one safetensors file, checked against the file's size.

    Raises UsageError when the file is missing, truncated, or something else under a safetensors name.
    """
    path = Path(path)
    text, data_start, size = _read_header_text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(path, f"its header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _not_safetensors(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _not_safetensors(path, "its metadata is not a JSON object")
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()}
    end = max((info.stop for info in tensors.values()), default=data_start)
    if end > size:
        raise UsageError(
            "the weight file is cut short",
            where=str(path),
            why=f"its header promises {end} bytes, the file has {size}",
            fix="copy or download the file again",
        )
    return WeightHeader(path, tensors, {str(key): str(value) for key, value in metadata.items()})


def weight_header(path: Path | str) -> WeightHeader:
    """Like `safetensors_header`, also for a shard index file and for a folder that holds one model.

    In a folder the choice is: one index file, else one safetensors file. UsageError when there is none or several.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    return sharded_header(path) if path.name.endswith(".json") else safetensors_header(path)


def find_weights(folder: Path) -> Path:
    """The index file or the only safetensors file of a folder; variants (``model.fp16.safetensors``) give way."""
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}")) or sorted(
        file for suffix in ("*.safetensors", "*.sft") for file in folder.glob(suffix)
    )
    if not found:
        inside = sorted({file.parent for file in folder.glob("*/*.safetensors")})
        fix = f"name one of: {', '.join(map(str, inside))}" if inside else "name what holds the weights"
        raise UsageError("no weights in this folder", where=str(folder), why="it has no .safetensors file", fix=fix)
    plain = [file for file in found if "." not in file.stem]
    if len(found) > 1 and len(plain) == 1:
        return plain[0]
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise UsageError("several weight files in this folder", where=str(folder), why=f"it holds {names}",
                         fix="name the one file to use (or set the variant)")  # fmt: skip
    return found[0]


def sharded_header(index: Path) -> WeightHeader:
    """The joined header of all shards that an index file names."""
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError as error:
        raise NotHereError("no such file", where=str(index), fix="check the path") from error
    except OSError as error:
        raise UsageError("cannot read the shard index", where=str(index), why=error.strerror) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            "this is not a shard index",
            where=str(index),
            why="it has no weight_map",
            fix="name a .safetensors file, or the index of its shards",
        ) from error
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise UsageError("this is not a shard index", where=str(index), why="its weight_map does not name files")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            raise UsageError("a shard lies outside its index's folder", where=str(index), why=f"it names {shard}")
        header = safetensors_header(index.parent / shard)
        tensors.update(header.tensors)
        metadata.update(header.metadata)
    absent = sorted(set(names) - set(tensors))
    if absent:
        raise UsageError("the shards lack tensors of their index", where=str(index), why=f"missing: {absent[0]}")
    return WeightHeader(index, tensors, metadata)


def key_mismatch(missing: Iterable[str], unknown: Iterable[str], where: str | None) -> UsageError | None:
    """The error that names the keys, when there are any."""
    parts = [f"{kind}: {_some(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
    if not parts:
        return None
    return UsageError("the weights do not fit the model", where=where, why="; ".join(parts),
                      fix="use a complete file of this model, without added keys")  # fmt: skip


def _read_header_text(path: Path) -> tuple[bytes, int, int]:
    """(header bytes, offset of the data, file size)."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > MAX_HEADER_BYTES:
                raise _something_else(path, start)
            text = file.read(length)
    except FileNotFoundError as error:
        raise NotHereError("no such file", where=str(path), fix="check the path") from error
    except IsADirectoryError as error:
        raise UsageError("a file is wanted here, this is a folder", where=str(path)) from error
    except OSError as error:
        raise UsageError("cannot read the file", where=str(path), why=error.strerror) from error
    if len(text) < length:
        if text.startswith(b"{"):
            raise UsageError("the weight file is cut short", where=str(path), why="its header is incomplete",
                             fix="copy or download the file again")  # fmt: skip
        raise _something_else(path, start)
    return text, 8 + length, size


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        start, stop = (int(offset) + data_start for offset in entry["data_offsets"])
        shape = tuple(int(size) for size in entry["shape"])
        info = TensorInfo(dtype=str(entry["dtype"]), shape=shape, path=path, name=name, start=start, stop=stop)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_safetensors(path, f"its entry for {name} is not a tensor description") from error
    item = DTYPE_BYTES.get(info.dtype)
    if not data_start <= start <= stop:
        raise _not_safetensors(path, f"the byte range of {name} lies outside its data")
    if item is not None and stop - start != item * math.prod(info.shape):
        raise _not_safetensors(path, f"the byte range of {name} does not fit its shape")
    return info


_USE_SAFETENSORS = "use the .safetensors file of the model"


def _not_safetensors(path: Path, why: str, fix: str = _USE_SAFETENSORS) -> UsageError:
    return UsageError("this is not a safetensors file", where=str(path), why=why, fix=fix)


def _something_else(path: Path, start: bytes) -> UsageError:
    """The error for a file that begins with ``start``, which no safetensors file does."""
    again = "download the file again"
    if not start:
        return _not_safetensors(path, "it is empty", again)
    if start.startswith(b"version "):
        fix = 'run "git lfs pull" in that folder, or download the file itself'
        return _not_safetensors(path, "it looks like a git-lfs pointer: the real file was not downloaded", fix)
    if start.lstrip().startswith((b"<", b"{")):
        return _not_safetensors(path, "it looks like text, perhaps an error page saved in place of the file", again)
    if start.startswith(b"PK"):
        return _not_safetensors(path, "it looks like a PyTorch .pt/.pth archive")
    if start.startswith(b"GGUF"):
        return _not_safetensors(path, "it looks like a GGUF file")
    if start[:1] == b"\x80":
        return _not_safetensors(path, "it looks like a pickle")
    return _not_safetensors(path, "it does not start with a safetensors header")


def _some(keys: Iterable[str], limit: int = 8) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
