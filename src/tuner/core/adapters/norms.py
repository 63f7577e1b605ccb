"""Trained norms: what is added to the weight and the bias of a norm, beside adapters of linears.

Models read a norm's weight wherever they compute it, so the sum stands in the place of the attribute ``weight``; names,
parameters and the state dict of the model stay as they are. The sum has the dtype of the frozen weight: a change below
its rounding shows in the float32 master, in files, and in the output once it has grown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.core.adapters.layers import AdapterLayer, Dropout, Injection, Making

if TYPE_CHECKING:
    from tuner.core.adapters.targets import Target


def is_norm(module: nn.Module) -> bool:
    """A norm with a trained weight of one axis."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


class NormLayer(AdapterLayer):
    """w_norm and, where the norm has a bias, b_norm, [width], zero at the start."""

    kind = "norms"
    w_norm: nn.Parameter

    def __init__(self, base: nn.Module, target: Target, making: Making, stored: Mapping[str, Tensor] | None) -> None:
        super().__init__(Dropout(), making.keys, making.rng, making.device)
        weight = base._parameters["weight"]
        assert weight is not None
        self.rows = (weight.shape[0],)
        for name, own in (("w_norm", "weight"), ("b_norm", "bias")):
            has = base._parameters.get(own) is not None and (not stored or name in stored)
            zero = torch.zeros(self.rows, device=making.device, dtype=making.dtype)
            self.register_parameter(name, nn.Parameter(zero) if has else None)

    @property
    def settings(self) -> str:
        return "norms"


SUMMED: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def inject_norm(base: nn.Module, layer: NormLayer) -> Injection:
    """Let ``base`` have the sums as its weight and bias; undone by `layers.eject`."""
    record = Injection(base=base, forward=None, base_forward=None, kind=type(base))
    base.__class__ = _summed(type(base), "bias" in base._parameters)
    base.__dict__["adapter"] = layer
    return record


def _summed(kind: type[nn.Module], has_bias: bool) -> type[nn.Module]:
    """A class like ``kind`` with the sums; the same one for every norm of a class."""
    known = SUMMED.get((kind, has_bias))
    if known is not None:
        return known
    members: dict[str, Any] = {"weight": property(_weight)}
    if has_bias:
        members["bias"] = property(_bias)
    SUMMED[kind, has_bias] = type(kind.__name__, (kind,), members)
    return SUMMED[kind, has_bias]


def _weight(norm: Any) -> Tensor:
    frozen: Tensor = norm._parameters["weight"]
    return _sum(frozen, norm.adapter.w_norm, norm.adapter.strength)


def _bias(norm: Any) -> Tensor | None:
    frozen: Tensor | None = norm._parameters["bias"]
    return None if frozen is None else _sum(frozen, norm.adapter.b_norm, norm.adapter.strength)


def _sum(frozen: Tensor, change: Tensor | None, strength: float) -> Tensor:
    if change is None or strength == 0.0:
        return frozen
    return (frozen.float() + change.float() * strength).to(frozen.dtype)
