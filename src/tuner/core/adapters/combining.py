"""Adapter files from adapter files: several summed into one, and one with other ranks.

A sum is exact: downs are stacked, and each up carries its strength and its alpha / rank,

    sum_i w_i (alpha_i / r_i) up_i down_i = [w_1 s_1 up_1 ... w_n s_n up_n] [down_1; ...; down_n]

so that the rank is the sum of the ranks, and alpha equals it. Cutting a rank works on the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.deltas import FIXED, kind_of
from tuner.core.adapters.formats import joined_modules, modules_of, parts_of, split_module
from tuner.core.adapters.kinds import rank_of
from tuner.core.adapters.low_rank import Wanted, factors_of, factors_of_product
from tuner.core.adapters.products import as_dense, as_product
from tuner.core.compute.dtypes import all_finite
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.adapters.merging import Addition
    from tuner.core.types import KeyFormat

SUMMED = ("diff", "diff_b", "w_norm", "b_norm")
"""Parts whose effect is their value times the strength."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What became of one module of a file. norm: of its update before; kept: share of that, squared."""

    name: str
    rank: int
    old_rank: int
    kept: float
    norm: float


def kept_share(layers: Sequence[Layer]) -> float:
    """The share of the squared norm of all updates together that was kept."""
    total = sum(layer.norm**2 for layer in layers)
    return sum(layer.kept * layer.norm**2 for layer in layers) / total if total else 1.0


def ranks_of(tensors: Mapping[str, Tensor], fmt: KeyFormat) -> list[int]:
    """The rank of every module that a file of ``fmt`` has, 0 for one without."""
    return [rank_of(parts) or 0 for _, parts in joined_modules(tensors, fmt).values()]


def summed(additions: Sequence[Addition]) -> dict[str, Tensor]:
    """Internal tensors of one adapter that does what ``additions`` do together, in float32.

    UsageError: a kind whose strength cannot be put into its tensors, or different kinds for one module.
    """
    places = dict.fromkeys(place for addition in additions for place in modules_of(addition.tensors))
    found: dict[str, Tensor] = {}
    for component, path in places:
        name = f"{component}:{path}"
        given = [(addition, parts) for addition in additions if (parts := parts_of(addition.tensors, component, path))]
        kinds = {kind_of(parts) for _, parts in given}
        if not kinds <= set(FIXED) or (len(kinds) > 1 and "norms" in kinds):
            raise UsageError(
                f"{name} cannot be summed",
                where=", ".join(str(addition.path) for addition, _ in given),
                why=f"its adapters are of kind {', '.join(sorted(kinds))}; only {', '.join(FIXED)} add up",
                fix="merge them into a checkpoint with --base",
            )
        weighted = [(addition.strength, as_product(parts)) for addition, parts in given]
        parts = _stacked(name, weighted) if all("down" in parts for _, parts in weighted) else _total(name, weighted)
        if not all(map(all_finite, parts.values())):
            raise UsageError(f"{name} is not finite", where=", ".join(str(addition.path) for addition, _ in given))
        found |= {f"{name}.{part}": value for part, value in parts.items()}
    return found


def _stacked(name: str, given: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    ups, downs = [], []
    for strength, parts in given:
        scale = strength * float(parts["alpha"]) / parts["down"].shape[0]
        ups.append(parts["up"].float() * scale)
        downs.append(parts["down"].float())
    if len({(up.shape[0], down.shape[1:]) for up, down in zip(ups, downs, strict=True)}) > 1:
        shapes = ", ".join(f"{[up.shape[0], *down.shape[1:]]}" for up, down in zip(ups, downs, strict=True))
        raise UsageError(f"the adapters of {name} are for weights of other sizes", why=shapes)
    down = torch.cat(downs)
    return {"down": down, "up": torch.cat(ups, dim=1), "alpha": torch.tensor(float(down.shape[0]))}


def _total(name: str, given: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for strength, parts in given:
        # A product beside a dense change becomes dense, too.
        whole = {"diff": as_dense(parts)} if "down" in parts else parts
        for part in (part for part in SUMMED if part in whole):
            value = strength * whole[part].float()
            if part in found and found[part].shape != value.shape:
                shapes = f"{[*found[part].shape]}, {[*value.shape]}"
                raise UsageError(f"the adapters of {name} are for weights of other sizes", why=shapes)
            found[part] = found[part] + value if part in found else value
    return found


@torch.no_grad()
def resized(
    tensors: Mapping[str, Tensor], fmt: KeyFormat, wanted: Wanted, *, dense: bool = False
) -> tuple[dict[str, Tensor], list[Layer], list[str]]:
    """Internal tensors with other ranks, what was kept of each module of ``fmt``, and modules that have no rank.

    The linears that the format joins share one down, as in a file that was trained so. An adapter with lengths (DoRA)
    keeps them. Factors become float32; alpha becomes the rank. dense: whether changes of whole matrices become products
    too. UsageError when no module has two matrices.
    """
    found: dict[str, Tensor] = {}
    layers: list[Layer] = []
    others: list[str] = []
    for name, (place, parts) in joined_modules(tensors, fmt).items():
        if not all(map(all_finite, parts.values())):
            raise UsageError(f"{name} is not finite", why="its training went wrong, or the file was damaged")
        if "down" in parts:
            down, up = parts["down"], parts["up"]
            scale = float(parts["alpha"]) / down.shape[0]
            cut = factors_of_product(up.float().flatten(1) * scale, down.float().flatten(1), wanted)
            old_rank, kernel = down.shape[0], down.shape[1:]
        elif dense and set(parts) == {"diff"}:
            diff = parts["diff"].float()
            cut = factors_of(diff.flatten(1), wanted)
            old_rank, kernel = min(diff.flatten(1).shape), diff.shape[1:]
        else:
            others.append(name)
            found |= split_module(place, parts, name)
            continue
        layers.append(Layer(name=name, rank=cut.rank, old_rank=old_rank, kept=cut.kept, norm=cut.norm))
        changed = {
            "down": cut.down.reshape(cut.rank, *kernel),
            "up": cut.up.reshape(-1, cut.rank, *(1,) * (len(kernel) - 1)),
            "alpha": torch.tensor(float(cut.rank)),
        }
        rest = {part: value for part, value in parts.items() if part != "diff"}
        found |= split_module(place, {**rest, **changed}, name)
    if not layers:
        raise UsageError(
            "this adapter has no ranks to change",
            why=f"it has {len(others)} modules, none of them with two matrices (lora, dora)",
        )
    return found, layers, others
