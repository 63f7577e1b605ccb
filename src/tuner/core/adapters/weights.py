"""The model's own weights as what trains."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tuner.core.adapters.checkpoints import stored_files
from tuner.core.adapters.freezing import freeze_patterns, group_name, group_of
from tuner.core.adapters.network import AdapterRow, TrainedNetwork
from tuner.core.errors import UsageError
from tuner.core.types import Network, ParamGroup

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts, Models

log = logging.getLogger(__name__)

WEIGHTS = "weights"
"""Kind of a network that is the model's own weights; ``full`` is an adapter."""


class WeightsNetwork(TrainedNetwork):
    """All parameters of the components that train, frozen ones too: together they are what a file must hold."""

    has_base = False

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = tuple(params)
        self.values = nn.ParameterList(params.values())

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in zip(self.names, self.values, strict=True)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.tensors()
        if set(tensors) != set(own):
            odd = min(set(tensors) ^ set(own))
            raise UsageError(f"the weights are of another model, for example {odd}")
        for name, value in own.items():
            if tensors[name].shape != value.shape:
                raise UsageError(f"{name} has shape {tuple(tensors[name].shape)}, here {tuple(value.shape)}")
        for name, value in own.items():
            value.copy_(tensors[name])

    def rows(self) -> Iterator[AdapterRow]:
        for name, value in zip(self.names, self.values, strict=True):
            component, _, path = name.partition(":")
            yield AdapterRow(
                component=component,
                kind=path,
                modules=1,
                settings="trains" if value.requires_grad else "frozen",
                parameters=value.numel() if value.requires_grad else 0,
            )

    def set_strength(self, strength: float) -> None:
        if strength != 1.0:
            raise RuntimeError("fully trained weights have no base to go back to")


def train_weights(models: Models, config: RunConfig, facts: ModelFacts) -> Network:
    """Make the parameters of ``train.components`` train, but for those that ``train.freeze`` names.

    Groups are those of ``facts.groups``; the denoiser's other parameters are the group ``base``, those of another
    component the group of its name. Raises UsageError for a pattern that matches nothing, and when nothing is left to
    train.
    """
    names: dict[str, nn.Parameter] = {}
    groups: list[ParamGroup] = []
    patterns = freeze_patterns(config.train.freeze)
    unused = set(patterns)
    placed = {name for file in stored_files(config, facts) for stored in file.tensors.values() for name in stored.names}
    for component in config.train.components:
        module = models.component(component)
        assert module is not None
        grouped: dict[str, dict[str, nn.Parameter]] = {}
        for path, parameter in module.named_parameters():
            name = f"{component}:{path}"
            if name not in placed:
                # What no file has room for would be lost.
                log.info("%s has no place in the model's files and stays as it is", name)
                continue
            names[name] = parameter
            frozen = [pattern for pattern in patterns if re.fullmatch(pattern, name)]
            unused -= set(frozen)
            if not frozen:
                parameter.requires_grad_(True)
                grouped.setdefault(group_of(facts, name), {})[name] = parameter
        for group, params in grouped.items():
            groups.append(ParamGroup(name=group_name(component, group), component=component, params=params))
    if unused:
        near = difflib.get_close_matches(min(unused), names, 1, cutoff=0.3)
        raise UsageError(
            f"{min(unused)!r} freezes nothing",
            where="train.freeze",
            why=f"it must match a whole name such as {near[0] if near else next(iter(names))!r}",
        )
    if not groups:
        raise UsageError("everything is frozen", where="train.freeze", fix="leave something to train")
    return Network(module=WeightsNetwork(names), param_groups=groups, kind=WEIGHTS)
