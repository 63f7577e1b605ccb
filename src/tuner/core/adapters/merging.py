"""Adding adapters to the weights of a loaded model, tensor by tensor.

    W' = W + strength * (what the adapter changes)        in float32, rounded once to the dtype of W

No second copy of the model is made: a weight is written in place, so weights that share a storage keep sharing it.
What several adapters change of one weight is added up before the result is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.adapters.deltas import FIXED, kind_of, merged_bias, merged_weight
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import modules_of, parts_of
from tuner.core.compute.dtypes import all_finite
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.types import KeyMaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """An adapter to merge. tensors: internal names, on the CPU. where: what errors call it."""

    path: Path
    strength: float
    tensors: Mapping[str, Tensor]
    where: str

    @property
    def components(self) -> tuple[str, ...]:
        """The components whose weights it changes."""
        return tuple(dict.fromkeys(component for component, _ in modules_of(self.tensors)))


def read_addition(path: Path, strength: float, maps: KeyMaps, *, where: str) -> Addition:
    """Read an adapter file in any format of ``maps``. UsageError: a key that maps nowhere, or no key at all."""
    read = read_adapter(path, maps)
    if not read.tensors:
        raise UsageError("the file holds no adapter", where=f"{path}, {where}", why="no key of it names a module")
    return Addition(path=path, strength=strength, tensors=read.tensors, where=where)


@torch.no_grad()
def merge_into(module: nn.Module, component: str, additions: Sequence[Addition]) -> int:
    """Add what ``additions`` hold for ``component`` to the weights of ``module``, in place; returns how many change.

    UsageError: a module that is not there, or factors of another size.
    """
    changes: dict[str, list[Addition]] = {}
    for addition in additions:
        for owner, path in modules_of(addition.tensors):
            if owner == component:
                changes.setdefault(path, []).append(addition)
    modules = dict(module.named_modules())
    for path, wanted in changes.items():
        base = modules.get(path)
        if not isinstance(getattr(base, "weight", None), nn.Parameter):
            raise UsageError(
                f"the model has no weight {component}:{path} to merge into",
                where=f"{wanted[0].path}, {wanted[0].where}",
                why="the adapter was made for another model",
            )
        _merge(base, f"{component}:{path}", component, path, wanted)
    return len(changes)


def _merge(base: Any, name: str, component: str, path: str, wanted: Sequence[Addition]) -> None:
    weight, bias = base.weight, getattr(base, "bias", None)
    if bias is None:
        refuse_bias(name, component, path, wanted)
    new_weight = added(weight, "weight", component, path, wanted)
    new_bias = None if bias is None else added(bias, "bias", component, path, wanted)
    weight.copy_(new_weight)
    if bias is not None:
        bias.copy_(new_bias)


def refuse_bias(name: str, component: str, path: str, wanted: Sequence[Addition]) -> None:
    """UsageError when one of ``wanted`` changes the bias of a module that has none."""
    for addition in wanted:
        if parts_of(addition.tensors, component, path).keys() & {"diff_b", "b_norm"}:
            raise UsageError(f"{name} has no bias to merge into", where=f"{addition.path}, {addition.where}")


def added(value: Tensor, leaf: str, component: str, path: str, wanted: Sequence[Addition]) -> Tensor:
    """The weight or the bias (``leaf``) of one module with all that ``wanted`` adds to it, in float32.

    UsageError: factors of another size, or a result that is not finite.
    """
    name = f"{component}:{path}"
    total = value.detach().float()
    for number, addition in enumerate(wanted):
        stored = parts_of(addition.tensors, component, path)
        parts = {part: each.to(value.device) for part, each in stored.items()}
        try:
            if leaf == "bias":
                total = merged_bias(total, parts, addition.strength)
            elif number == 0 or kind_of(parts) in FIXED:
                total = merged_weight(total, parts, addition.strength)
            else:
                # Every adapter acts on the weight as it was, so that the order is of no account.
                total = total + merged_weight(value.detach().float(), parts, addition.strength).sub_(value)
        except UsageError as error:
            raise UsageError(
                f"{name}: {error.what}", where=f"{addition.path}, {addition.where}", why=error.why, fix=error.fix
            ) from error
    if not all_finite(total):
        raise UsageError(
            f"{name} is not finite with the merged adapter", where=f"{wanted[-1].path}, {wanted[-1].where}"
        )
    return total
