"""Proof that a written adapter file says what the network in memory says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import modules_of
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

    Each module's update of a fixed probe must agree, whatever the split of alpha between the tensors. Raises UsageError
    naming what differs: the file is then not what was trained.
    """
    read = read_adapter(path, maps)
    wanted, found = set(modules_of(tensors)), set(modules_of(read.tensors))
    # A linear whose rows in a joint matrix are zero reads back as one without adapter, which acts the same.
    silent = {place for place in wanted - found if not tensors[f"{place[0]}:{place[1]}.up"].any()}
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
        own, other = _update(tensors, key), _update(read.tensors, key)
        tolerance = TOLERANCE.get(read.tensors[f"{key}.up"].dtype, max(TOLERANCE.values()))
        if own.shape != other.shape or not (own - other).norm() <= tolerance * own.norm() + 1e-30:
            raise UsageError(
                f"the written adapter acts differently at {key}",
                where=str(path),
                why="its matrices do not give the trained update",
            )
    return Verified(keys=read.keys, modules=len(found), format=read.format)


def _update(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """What the module adds for a fixed probe, float32 [probes, out]."""
    down, up = (tensors[f"{key}.{part}"].detach().float().cpu() for part in ("down", "up"))
    down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
    # Any fixed vector will do; this one has no symmetry that could hide a swapped row.
    probe = torch.cos(torch.arange(PROBES * down.shape[1], dtype=torch.float32) ** 1.5).reshape(PROBES, -1)
    return (probe @ down.t() @ up.t()) * (float(tensors[f"{key}.alpha"]) / down.shape[0])
