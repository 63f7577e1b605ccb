"""Adapters into the weight files of a model: the files again, tensor by tensor, with the changed values in place.

    W' = W + sum over adapters of strength * (what the adapter changes)        in float32, rounded once

Names, order, layout and dtype of a file stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.bases import read_one
from tuner.core.adapters.checkpoints import file_beside, joined, members
from tuner.core.adapters.formats import modules_of, parts_of
from tuner.core.adapters.merging import Addition, added, refuse_bias
from tuner.core.adapters.streams import FILE_NAMES, Planned, about, copied, silent, write_tensors
from tuner.core.adapters.targets import compiled
from tuner.core.compute.dtypes import all_finite, beyond, fitting
from tuner.core.compute.weights import FILE_DTYPES
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.files import TensorInfo
    from tuner.core.types import StoredFile, StoredTensor

Changes = Mapping[str, Sequence[Addition]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baked:
    """A file that was written: how many of its tensors changed, and how many there are."""

    path: Path
    changed: int
    tensors: int


def with_strengths(additions: Sequence[Addition], strengths: Mapping[str, float]) -> list[Addition]:
    """Additions with other strengths for parts of the model.

    strengths: full-match pattern on ``component:path`` or ``path`` to a factor of the adapter's strength; the last one
    that matches counts, and 0 takes a module out. UsageError for a pattern that matches nothing.
    """
    if not strengths:
        return list(additions)
    patterns = {text: compiled(text, "--strength") for text in strengths}
    used: set[str] = set()
    found: list[Addition] = []
    for addition in additions:
        groups: dict[float, list[str]] = {}
        for component, path in modules_of(addition.tensors):
            names = (f"{component}:{path}", path)
            matching = [text for text, pattern in patterns.items() if any(map(pattern.fullmatch, names))]
            used.update(matching)
            groups.setdefault(strengths[matching[-1]] if matching else 1.0, []).append(names[0])
        for factor, modules in groups.items():
            if factor:
                kept = {
                    f"{module}.{part}": value
                    for module in modules
                    for part, value in parts_of(addition.tensors, *module.split(":", 1)).items()
                }
                found.append(replace(addition, strength=addition.strength * factor, tensors=kept))
    unused = [text for text in strengths if text not in used]
    if unused:
        raise UsageError(
            f"the pattern {unused[0]!r} matches no module of the adapters",
            where="--strength",
            fix="tuner inspect ADAPTER --modules lists them",
        )
    return found


@torch.no_grad()
def bake(
    files: Sequence[StoredFile],
    additions: Sequence[Addition],
    out: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    progress: Callable[[int, int], None] = silent,
) -> list[Baked]:
    """Write ``files`` with the adapters in them: the denoiser's as ``out``, others that change beside it.

    dtype: of all floating-point tensors; None keeps each one's own. metadata: added to those of the file. progress: as
    for `write_tensors`. UsageError: a module that is in none of the files, before anything is written.
    """
    changes = _changes(files, additions)
    written = []
    for file in files:
        touched = any(_touched(stored, changes) for stored in file.tensors.values())
        if touched or not file.name:
            planned, changed = _planned(file, changes, dtype)
            path = file_beside(out, file)
            write_tensors(path, planned, {**about(file.header), **metadata}, progress)
            written.append(Baked(path=path, changed=changed, tensors=len(planned)))
    return written


def _changes(files: Sequence[StoredFile], additions: Sequence[Addition]) -> dict[str, list[Addition]]:
    """The additions of each module; every one of them has its place in the files."""
    changes: dict[str, list[Addition]] = {}
    for addition in additions:
        for component, path in modules_of(addition.tensors):
            changes.setdefault(f"{component}:{path}", []).append(addition)
    there = {name for file in files for stored in file.tensors.values() for name in stored.names}
    for module, wanted in changes.items():
        component, _, path = module.partition(":")
        if f"{module}.weight" not in there:
            held = {name.partition(":")[0] for name in there}
            known = component in held
            raise UsageError(
                f"the files have no weight {module} to merge into",
                where=str(wanted[0].path),
                why="the adapter was made for another model"
                if known
                else f"it changes {component}; the files hold {', '.join(sorted(held))}",
                fix=None if known else f"add {component}=FILE to --base, or --strength '{component}:.*=0'",
            )
        if f"{module}.bias" not in there:
            refuse_bias(module, component, path, wanted)
    return changes


def _planned(file: StoredFile, changes: Changes, dtype: torch.dtype | None) -> tuple[dict[str, Planned], int]:
    """The tensors of the file to come, and how many of them change."""
    planned: dict[str, Planned] = {}
    changed = 0
    for key, info in file.header.items():
        stored = file.tensors.get(key)
        touched = stored is not None and _touched(stored, changes)
        if touched and info.dtype not in FILE_DTYPES:
            raise UsageError(f"{key} has dtype {info.dtype}", where=str(info.path), why="this version cannot read it")
        own = FILE_DTYPES.get(info.dtype)
        target = dtype if dtype is not None and own is not None and own.is_floating_point else own
        changed += touched
        if touched and stored is not None and target is not None:
            planned[key] = Planned(
                FILE_NAMES[target], info.shape, partial(_changed, key, info, stored, changes, target)
            )
        elif target is None or target == own:
            planned[key] = copied(info)
        else:
            planned[key] = Planned(FILE_NAMES[target], info.shape, partial(_cast, key, info, target))
    return planned, changed


def _touched(stored: StoredTensor, changes: Changes) -> bool:
    return any(_changes_leaf(name, changes) for name in stored.names)


def _changes_leaf(name: str, changes: Changes) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias") or module not in changes:
        return False
    component, _, path = module.partition(":")
    # A bias is left alone by most kinds: then the file keeps its bytes.
    return leaf == "weight" or any(
        parts_of(addition.tensors, component, path).keys() & {"diff_b", "b_norm"} for addition in changes[module]
    )


def _changed(key: str, info: TensorInfo, stored: StoredTensor, changes: Changes, dtype: torch.dtype) -> Tensor:
    values = zip(stored.names, members(read_one(info), stored), strict=True)
    # One by one: beside the result only one part is in memory in float32.
    found = joined((_member(name, value, changes) for name, value in values), info.shape, stored, dtype)
    if not all_finite(found):
        raise beyond(dtype, key)
    return found


def _member(name: str, value: Tensor, changes: Changes) -> Tensor:
    if not _changes_leaf(name, changes):
        return value
    module, _, leaf = name.rpartition(".")
    component, _, path = module.partition(":")
    return added(value, leaf, component, path, changes[module])


def _cast(key: str, info: TensorInfo, dtype: torch.dtype) -> Tensor:
    return fitting(read_one(info), dtype, key)
