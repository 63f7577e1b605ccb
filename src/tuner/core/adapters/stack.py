"""Adapters from files on a loaded model, each at a strength that may change at any time, in any number.

    y = y_base + sum over adapters of (what each alone would make of the base - y_base)

So the order does not matter. A module with one acting adapter computes exactly as in the training of that adapter.
Adapters that are there already (one that trains) take part in the sum and are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.adapters.deltas import kind_of
from tuner.core.adapters.formats import modules_of, parts_of
from tuner.core.adapters.kinds import KINDS, rank_of
from tuner.core.adapters.layers import (
    AdapterLayer,
    Dropout,
    DropoutKeys,
    Injection,
    Making,
    base_device,
    convolved,
    eject,
    inject,
)
from tuner.core.adapters.lora import adaptable_modules
from tuner.core.adapters.norms import NormLayer, inject_norm, is_norm
from tuner.core.adapters.targets import Target, join_fused
from tuner.core.config.network import LOW_RANK
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.types import ModelFacts, Models

SLOT = "adapter"
SHOWN = 3


@dataclass(slots=True)
class _Place:
    """A module with its adapters. record: what `inject` did, None when another adapter is there: ``resident``.

    sums: what stands for several adapters, made once for each choice of them, so that compiled code stays valid.
    """

    base: nn.Module
    parts: list[Any] = field(default_factory=list)
    record: Injection | None = None
    resident: Any = None
    sums: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def together(self, parts: Sequence[Any]) -> Any:
        """What computes with all of ``parts`` as they are now."""
        key = tuple(map(id, parts))
        if key not in self.sums:
            self.sums[key] = _together(parts, self.base)
        self.sums[key].refresh()
        return self.sums[key]


class AdapterStack(nn.Module):
    """Adapters on a model. They act between `attach` and `detach`, and do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self._places: dict[nn.Module, _Place] = {}
        self._attached = False

    def add(
        self, tensors: Mapping[str, Tensor], models: Models, facts: ModelFacts, *, dtype: torch.dtype, where: str
    ) -> None:
        """Make the layers of one adapter, in ``dtype``, for the components that ``models`` has; strength 1.

        tensors: internal names. where: what errors call it. UsageError: a module that is not there, or other sizes.
        """
        modules = {
            name: _modules(component)
            for name in dict.fromkeys(component for component, _ in modules_of(tensors))
            if (component := models.component(name)) is not None
        }
        stored = [each for each in modules_of(tensors) if each[0] in modules]
        check_places(stored, {name: set(inside) for name, inside in modules.items()}, where)
        layers = nn.ModuleList()
        for target in _targets(tensors, stored, facts):
            bases = [modules[target.component][path] for path in target.paths]
            names = [f"{target.component}:{path}" for path in target.paths]
            members = [parts_of(tensors, target.component, path) for path in target.paths]
            try:
                layer = _layer(target, bases, members, names, dtype)
            except UsageError as error:
                raise UsageError(error.what, where=where, why=error.why, fix=error.fix) from error
            for base, part in zip(bases, layer.parts(), strict=True):
                self._places.setdefault(base, _Place(base)).parts.append(part)
            layers.append(layer)
        self.adapters.append(layers)
        self.eval().requires_grad_(False)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One for each adapter, in the order of `add`; 0 is as if it were not there."""
        for layers, strength in zip(self.adapters, strengths, strict=True):
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                assert isinstance(layer, AdapterLayer)
                layer.set_strength(strength)
        if self._attached:
            self._arrange()

    def attach(self) -> None:
        """Let the model compute with the adapters."""
        for place in self._places.values():
            place.resident = place.base.__dict__.get(SLOT)
            if place.resident is None:
                first = place.parts[0]
                norm = isinstance(first, NormLayer)
                place.record = inject_norm(place.base, first) if norm else inject(place.base, first)
        self._attached = True
        self._arrange()

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        self._attached = False
        for place in self._places.values():
            if place.record is not None:
                eject(place.record)
            else:
                place.base.__dict__[SLOT] = place.resident
            place.record = place.resident = None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Attached inside the block. Strengths of adapters that were there before must not change in it."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    @torch.no_grad()
    def _arrange(self) -> None:
        for place in self._places.values():
            parts = [part for part in (place.resident, *place.parts) if part is not None]
            acting = [part for part in parts if part.scale != 0.0]
            place.base.__dict__[SLOT] = place.together(acting) if len(acting) > 1 else (acting or parts)[0]


def check_places(
    stored: Sequence[tuple[str, str]], modules: Mapping[str, set[str] | frozenset[str]], where: str
) -> None:
    """UsageError when the model lacks a module that an adapter changes; components outside ``modules`` are passed over.

    stored: (component, path) of every module of the adapter.
    """
    asked = [each for each in stored if each[0] in modules]
    missing = [f"{component}:{path}" for component, path in asked if path not in modules[component]]
    if not missing:
        return
    none = len(missing) == len(asked)
    listed = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    raise UsageError(
        "the adapter fits no layer of this model" if none else f"the model has no layer for {listed}",
        where=where,
        why=f"it changes {listed}" if none else f"{len(missing)} of its {len(asked)} modules are not there",
        fix="use it with the model that it was trained on",
    )


def _modules(component: nn.Module) -> dict[str, nn.Module]:
    norms = {path: module for path, module in component.named_modules() if is_norm(module)}
    return adaptable_modules(component) | norms


def _targets(tensors: Mapping[str, Tensor], stored: Sequence[tuple[str, str]], facts: ModelFacts) -> tuple[Target, ...]:
    """The layers that a file means: linears that share a down matrix have one, as in the training."""
    found: dict[str, list[Target]] = {}
    for component, path in stored:
        parts = parts_of(tensors, component, path)
        kind, rank, alpha = kind_of(parts), rank_of(parts, path) or 0, float(parts.get("alpha", 0.0))
        found.setdefault(kind, []).append(Target(component=component, path=path, rank=rank, alpha=alpha, kind=kind))

    def together(first: Target, other: Target) -> bool:
        return torch.equal(*(tensors[f"{each.component}:{each.path}.down"] for each in (first, other)))

    return tuple(
        target
        for kind, targets in found.items()
        for target in (join_fused(targets, facts.lora.fused, together) if kind in LOW_RANK else targets)
    )


def _layer(
    target: Target,
    bases: Sequence[nn.Module],
    members: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    dtype: torch.dtype,
) -> AdapterLayer:
    making = Making(
        dropout=Dropout(), keys=DropoutKeys(), dtype=dtype, device=base_device(bases[0]), rng=Rng(0, "from file")
    )
    layer = KINDS[target.kind].make(bases, target, making, members[0])
    # A file may change a bias alone.
    absent = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
    layer.load([{**absent, **parts} if len(members) == 1 else parts for parts in members], names)
    return layer


# --- several adapters of one module -----------------------------------------------------------------------------------


def _together(parts: Sequence[Any], base: nn.Module) -> Any:
    if isinstance(parts[0], NormLayer):
        return _NormSum(parts)
    low_rank = all(getattr(part, "down", None) is not None and not hasattr(part, "adapt") for part in parts)
    return _LowRankSum(parts) if low_rank and not isinstance(base, nn.Conv2d) else _Sum(parts)


class _LowRankSum:
    """Low-rank adapters side by side: exactly their sum, as one of the ranks together."""

    scale = 1.0

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    def refresh(self) -> None:
        self.down = torch.cat([part.down.float() for part in self.parts])
        self.up = torch.cat([part.up.float() * part.scale for part in self.parts], dim=1)

    def mid_mask(self, x: Tensor) -> Tensor | None:
        return None


class _Sum:
    """Adapters of any kind: each sees what the module alone gives."""

    scale = 1.0

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    def refresh(self) -> None:
        """The parts are asked anew in every call."""

    def adapt(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + torch.stack([_change(part, x, y, base) for part in self.parts]).sum(0).to(y.dtype)


class _NormSum:
    """What several adapters add to the weight and the bias of a norm."""

    scale = strength = 1.0

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    def refresh(self) -> None:
        self.w_norm = torch.stack([part.w_norm.float() * part.strength for part in self.parts]).sum(0)
        biases = [part.b_norm.float() * part.strength for part in self.parts if part.b_norm is not None]
        self.b_norm = torch.stack(biases).sum(0) if biases else None


def _change(part: Any, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
    """What one adapter adds to ``y`` [..., out], the output of ``base`` for ``x``, in float32."""
    low = None
    if getattr(part, "down", None) is not None:
        if isinstance(base, nn.Conv2d):
            low = convolved(part, x, base)
        else:
            low = F.linear(F.linear(x, part.down.to(x.dtype)), (part.up * part.scale).to(x.dtype))
    adapt = getattr(part, "adapt", None)
    if adapt is None:
        assert low is not None
        return low.float()
    start = y if low is None else y + low.to(y.dtype)
    changed: Tensor = adapt(x, start, base).float() - y.float()
    return changed
