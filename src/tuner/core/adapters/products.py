"""LoHa and LoKr as plain products of two matrices, or as dense changes: exactly what they do, in a form that adds up.

    (a1 b1) * (a2 b2)              = (a1 . a2) (b1 : b2)            all pairs of columns, and of rows
    (p q) (x) (x y)                = (p (x) x) (q (x) y)            a full factor w is w I, or I w

so that neither depends on the weight that it acts on, unlike a DoRA or a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner.core.adapters.deltas import DELTAS, kind_of, lokr_scale


def as_product(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change as ``down``, ``up`` and ``alpha``, or as ``diff`` where that is no larger, in float32.

    Kinds other than LoHa and LoKr are returned as they are.
    """
    kind = kind_of(parts)
    if kind not in ("loha", "lokr"):
        return dict(parts)
    values = {name: value.detach().float() for name, value in parts.items()}
    if kind == "loha":
        first, second = values["hada_w1_a"], values["hada_w2_a"]
        up = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        down = (values["hada_w1_b"].unsqueeze(1) * values["hada_w2_b"].unsqueeze(0)).flatten(0, 1)
        scale = float(parts["alpha"]) / first.shape[1]
    else:
        (p, q), (x, y) = (_factors(values, name) for name in ("lokr_w1", "lokr_w2"))
        if p.shape[1] * x.shape[1] >= min(p.shape[0] * x.shape[0], q.shape[1] * y.shape[1]):
            return {"diff": as_dense(parts)}
        up, down, scale = torch.kron(p, x), torch.kron(q, y), lokr_scale(values)
    rank = len(down)
    if rank >= min(len(up), down.shape[1]):
        return {"diff": as_dense(parts)}
    return {"down": down, "up": up, "alpha": torch.tensor(scale * rank)}


def as_dense(parts: Mapping[str, Tensor]) -> Tensor:
    """The change [out, in] of a weight at strength 1, in float32, for a kind of `deltas.FIXED`."""
    values = {name: value.detach().float() for name, value in parts.items()}
    found: Tensor = DELTAS[kind_of(parts)](torch.empty(0), values, 1.0)
    return found


def lokr_rows(parts: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """The name of the factor that comes first, its rows, and those of the other: the weight has their product."""
    first, second = (name if name in parts else f"{name}_a" for name in ("lokr_w1", "lokr_w2"))
    return first, parts[first].shape[0], parts[second].shape[0]


def lokr_columns(parts: Mapping[str, Tensor]) -> int:
    """The inputs of the weight that a LoKr belongs to."""
    first, second = (parts[name if name in parts else f"{name}_b"] for name in ("lokr_w1", "lokr_w2"))
    return first.flatten(1).shape[1] * second.flatten(1).shape[1]


def _factors(values: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A factor of a LoKr as a product, with the identity where it is stored whole."""
    if name not in values:
        return values[f"{name}_a"], values[f"{name}_b"].flatten(1)
    whole = values[name].flatten(1)
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])
