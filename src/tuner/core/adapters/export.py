"""Proof that a written adapter file says what the network in memory says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.deltas import kind_of
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import modules_of, parts_of
from tuner.core.adapters.rotation import limited
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import KeyMaps

PROBES = 2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative error that rounding both matrices to a dtype may cause, with head-room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """Every key of the file belongs to a module, and every module of the network is in the file."""

    keys: int
    modules: int
    format: str

    def __str__(self) -> str:
        return f"{self.keys} of {self.keys} keys map to {self.modules} modules ({self.format})"


def verify_export(path: Path, tensors: Mapping[str, Tensor], maps: KeyMaps) -> Verified:
    """Read a file back and compare it with the internal `tensors` it was written from (`network_tensors`, raw or EMA).

    What each module does must agree, whatever the split of alpha between the tensors. Raises UsageError
    naming what differs: the file is then not what was trained.
    """
    read = read_adapter(path, maps)
    wanted, found = set(modules_of(tensors)), set(modules_of(read.tensors))
    # A linear whose rows in a joint matrix are zero reads back as one without adapter, which acts the same.
    silent = {place for place in wanted - found if _acts_not(parts_of(tensors, *place))}
    wanted -= silent
    if wanted != found:
        component, module = min(wanted ^ found)
        raise UsageError(
            "the written adapter has other modules than the network",
            where=str(path),
            why=f"{len(wanted)} were trained, {len(found)} are in the file; one that differs is {component}:{module}",
        )
    for component, module in wanted:
        key = f"{component}:{module}"
        own, other = parts_of(tensors, component, module), parts_of(read.tensors, component, module)
        tolerance = max(TOLERANCE.get(value.dtype, 0.0) for value in other.values())
        if not _same(_effect(own), _effect(other), tolerance):
            raise UsageError(
                f"the written adapter acts differently at {key}",
                where=str(path),
                why="its tensors do not give the trained update",
            )
    return Verified(keys=read.keys, modules=len(found), format=read.format)


def _acts_not(parts: Mapping[str, Tensor]) -> bool:
    values = [parts[part] for part in ("up", "diff", "diff_b") if part in parts]
    return bool(values) and "dora_scale" not in parts and not any(bool(value.any()) for value in values)


def _same(own: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> bool:
    if own.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in own.items()]
    return all(
        one.shape == two.shape and bool((one - two).norm() <= tolerance * one.norm() + 1e-30) for one, two in pairs
    )


def _effect(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float32 that are equal when two adapters act equally, however their factors are scaled."""
    values = {name: value.detach().float().cpu() for name, value in parts.items()}
    kind, alpha = kind_of(values), values.pop("alpha", None)
    if kind in ("oft", "boft"):
        blocks = values["oft_blocks"]
        limit = 0.0 if alpha is None else float(alpha)
        return {"oft_blocks": limited(blocks, limit, blocks.shape[-1] * blocks.shape[-3])}
    if "down" in values:
        rank, down, up = len(values["down"]), values.pop("down").flatten(1), values.pop("up").flatten(1)
        # Any fixed vector will do; this one has no symmetry that could hide a swapped row.
        probe = torch.cos(torch.arange(PROBES * down.shape[1], dtype=torch.float32) ** 1.5).reshape(PROBES, -1)
        assert alpha is not None
        return {**values, "update": probe @ down.t() @ up.t() * (float(alpha) / rank)}
    return values if alpha is None else {**values, "alpha": alpha}
