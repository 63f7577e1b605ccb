"""Working with a built adapter: its tensors, its strength, its dropout stream, and what it consists of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.core.adapters.lora import LoraNetwork, copy_into
from tuner.core.errors import UsageError
from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.types import Item, Network


def network_tensors(network: Network) -> dict[str, Tensor]:
    """`component:path.down`, `.up` and `.alpha` (float32 scalar) of every linear, detached.

    Values are live, except for linears that share an adapter: each has a copy of its share.
    """
    tensors = {}
    for target, layer in _lora(network).items():
        ups = torch.split(layer.up.detach(), list(layer.rows))
        for path, up in zip(target.paths, ups, strict=True):
            key, shared = f"{target.component}:{path}", len(ups) > 1
            tensors[f"{key}.down"] = layer.down.detach().clone() if shared else layer.down.detach()
            tensors[f"{key}.up"] = up.clone() if shared else up
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return tensors


def load_network_tensors(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Set the values of `network_tensors` in place. UsageError when names, shapes or alphas differ in any way."""
    module = _lora(network)
    wanted = {
        f"{target.component}:{path}.{part}"
        for target in module.targets
        for path in target.paths
        for part in ("down", "up", "alpha")
    }
    for names, what in ((wanted - set(tensors), "lack"), (set(tensors) - wanted, "do not belong:")):
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise UsageError(f"the tensors {what} {listed}", why=f"{len(names)} names differ from this network")
    for target, layer in module.items():
        keys = [f"{target.component}:{path}" for path in target.paths]
        for key, rows in zip(keys, torch.split(layer.up.data, list(layer.rows)), strict=True):
            alpha = float(tensors[f"{key}.alpha"])
            if alpha != layer.alpha:
                raise UsageError(f"{key} has alpha {alpha}, this network {layer.alpha}")
            if not torch.equal(tensors[f"{key}.down"], tensors[f"{keys[0]}.down"]):
                raise UsageError(f"{key} has an adapter of its own, this network one for {', '.join(target.paths)}")
            copy_into(rows, tensors[f"{key}.up"], f"{key}.up")
        copy_into(layer.down, tensors[f"{keys[0]}.down"], f"{keys[0]}.down")


@contextmanager
def adapter_strength(network: Network, strength: float) -> Iterator[None]:
    """Run with the adapter at this strength; 0 computes exactly the base model. Ends at the strength before."""
    layers = [layer for _, layer in _lora(network).items()]
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.set_strength(strength)
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scale = scale


@contextmanager
def adapter_eval(network: Network) -> Iterator[None]:
    """Run without dropout; ends in the mode before, also when what runs inside fails."""
    before = network.module.training
    network.module.eval()
    try:
        yield
    finally:
        network.module.train(before)


@contextmanager
def adapter_rng(network: Network, seed: int, step: int, items: Sequence[Item]) -> Iterator[None]:
    """Give the adapter's dropout its random numbers for one micro-batch: they follow from (seed, step, item, module).

    Must cover the backward pass too when activations are recomputed. Without dropout this does nothing.
    """
    module = _lora(network)
    if not any(layer.dropout for _, layer in module.items()):
        yield
        return
    keys = [Rng(seed, "dropout", step, item.source, item.id, item.visit).key() for item in items]
    device = next(module.parameters()).device
    before = module.dropout_keys.samples
    module.dropout_keys.samples = torch.tensor(keys, dtype=torch.int64, device=device)
    try:
        yield
    finally:
        module.dropout_keys.samples = before


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRow:
    """Modules of one kind: path with `*` for every number, how many, rank, alpha, trainable parameters."""

    component: str
    kind: str
    modules: int
    rank: int
    alpha: float
    parameters: int


def adapter_summary(network: Network) -> tuple[AdapterRow, ...]:
    """The adapter in a few rows, in the order of the modules."""
    rows: dict[tuple[str, str, int, float], list[int]] = {}
    for target, layer in _lora(network).items():
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", target.path)
        sizes = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
        rows.setdefault((target.component, kind, target.rank, target.alpha), []).append(sizes)
    return tuple(
        AdapterRow(component=component, kind=kind, rank=rank, alpha=alpha, modules=len(sizes), parameters=sum(sizes))
        for (component, kind, rank, alpha), sizes in rows.items()
    )


def count_parameters(network: Network) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.module.parameters() if parameter.requires_grad)


def _lora(network: Network) -> LoraNetwork:
    assert isinstance(network.module, LoraNetwork)
    return network.module
