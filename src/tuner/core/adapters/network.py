"""Working with what trains: its tensors, its strength, its random choices, and what it consists of."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.core.rng import Rng

if TYPE_CHECKING:
    from tuner.core.types import Item, Network


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRow:
    """Modules of one kind: path with `*` for every number, how many, their settings, trainable parameters."""

    component: str
    kind: str
    modules: int
    settings: str
    parameters: int


class TrainedNetwork(nn.Module, ABC):
    """What trains in a run, whether it stands beside the model's weights or is the weights themselves.

    Its tensors are named `component:module path.part`. strength: 1 is what was trained, 0 is exactly the base model.
    """

    strength: float = 1.0
    has_base: bool = True
    """Whether strength 0 is possible."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint or a file must hold, detached; live values where that is possible."""

    def exported(self) -> dict[str, Tensor]:
        """What a file for other programs must hold: `tensors`, unless these mean something to this run alone."""
        return self.tensors()

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the values of `tensors` in place. UsageError when names, shapes or fixed values differ in any way."""

    @abstractmethod
    def rows(self) -> Iterator[AdapterRow]:
        """One row for each trained module, in the order of the modules."""

    def set_strength(self, strength: float) -> None:
        """Compute with the trained part at this strength from now on."""
        self.strength = strength

    def draw(self, keys: Tensor | None) -> Tensor | None:
        """Take the samples' keys for random choices, int64 [samples], or None; returns those before."""
        return None

    @property
    def draws(self) -> bool:
        """Whether a step makes random choices (dropout)."""
        return False


def trained(network: Network) -> TrainedNetwork:
    """The module of a network, by its type."""
    assert isinstance(network.module, TrainedNetwork)
    return network.module


def adapter_layers(network: Network) -> TrainedNetwork | None:
    """The layers that act beside the weights of a base model, or None when those weights themselves train."""
    module = trained(network)
    return module if module.has_base else None


def network_tensors(network: Network) -> dict[str, Tensor]:
    """The trained tensors by internal name (`component:path.part`), detached. See `TrainedNetwork.tensors`."""
    return trained(network).tensors()


def exported_tensors(network: Network) -> dict[str, Tensor]:
    """What a file for other programs must hold, by internal name, detached. See `TrainedNetwork.exported`."""
    return trained(network).exported()


def load_network_tensors(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Set the values of `network_tensors` in place. UsageError when names, shapes or alphas differ in any way."""
    trained(network).load(tensors)


@contextmanager
def adapter_strength(network: Network, strength: float) -> Iterator[None]:
    """Run with the adapter at this strength; 0 computes exactly the base model. Ends at the strength before."""
    module = trained(network)
    before = module.strength
    module.set_strength(strength)
    try:
        yield
    finally:
        module.set_strength(before)


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
    module = trained(network)
    if not module.draws:
        yield
        return
    keys = [Rng(seed, "dropout", step, item.source, item.id, item.visit).key() for item in items]
    before = module.draw(torch.tensor(keys, dtype=torch.int64, device=next(module.parameters()).device))
    try:
        yield
    finally:
        module.draw(before)


def adapter_summary(network: Network) -> tuple[AdapterRow, ...]:
    """The trained part in a few rows, in the order of the modules: rows that differ in numbers of a path are one."""
    sums: dict[tuple[str, str, str], AdapterRow] = {}
    for row in trained(network).rows():
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.kind)
        key = (row.component, kind, row.settings)
        before = sums.get(key)
        modules, parameters = (before.modules, before.parameters) if before else (0, 0)
        sums[key] = replace(row, kind=kind, modules=modules + row.modules, parameters=parameters + row.parameters)
    return tuple(sums.values())


def count_parameters(network: Network) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.module.parameters() if parameter.requires_grad)
