"""Adapters that become part of the base model before anything trains on it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.core.adapters.deltas import merged_bias, merged_weight
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import key_maps, modules_of, parts_of
from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts, Models

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """An adapter file that is merged with ``strength``. digest: of its bytes. tensors: by internal names."""

    path: Path
    strength: float
    digest: str
    tensors: Mapping[str, Tensor]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(component for component, _ in modules_of(self.tensors)))

    def __str__(self) -> str:
        return f"{self.path.stem} ({self.digest[:12]}) x {self.strength:g}"


def read_merges(config: RunConfig, facts: ModelFacts) -> tuple[Merge, ...]:
    """The files of ``model.merge``, in order. UsageError for one that does not belong to this model in every key."""
    found = []
    for number, entry in enumerate(config.model.merge):
        path = Path(entry.path)
        try:
            read = read_adapter(path, key_maps(facts))
        except UsageError as error:
            where = f"{error.where or path}, model.merge[{number}].path"
            raise UsageError(error.what, where=where, why=error.why, fix=error.fix) from error
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        merge = Merge(path=path, strength=entry.strength, digest=digest, tensors=read.tensors)
        absent = [name for name in merge.components if name not in facts.components]
        if absent:
            raise UsageError(
                f"the adapter changes {absent[0]}, which this model does not have",
                where=f"{path}, model.merge[{number}].path",
            )
        found.append(merge)
    return tuple(found)


@torch.no_grad()
def merge_adapters(models: Models, merges: Sequence[Merge]) -> None:
    """Add the adapters to the loaded components, in place and module by module: W and all changes are summed in float32
    and rounded once. UsageError for a module that a loaded component does not have.
    """
    touched: dict[tuple[str, str], list[Merge]] = {}
    for merge in merges:
        for place in modules_of(merge.tensors):
            touched.setdefault(place, []).append(merge)
    counts: dict[str, int] = {}
    for (component, path), inside in touched.items():
        module = models.component(component)
        if module is None:
            continue
        _merge_module(_submodule(module, component, path, inside[0]), component, path, inside)
        counts[component] = counts.get(component, 0) + 1
    for component, count in counts.items():
        log.info("%s: %d modules with %s", component, count, ", ".join(map(str, merges)))


def merge_notes(merges: Sequence[Merge]) -> dict[str, str]:
    """By component, what was merged into it: part of the names of encodings that it makes."""
    return {
        component: "; ".join(f"{each.digest} x {each.strength!r}" for each in merges if component in each.components)
        for component in dict.fromkeys(name for merge in merges for name in merge.components)
    }


def _submodule(module: nn.Module, component: str, path: str, merge: Merge) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UsageError(
            f"the adapter changes {component}:{path}, which this model does not have", where=str(merge.path)
        ) from error


def _merge_module(module: nn.Module, component: str, path: str, merges: Sequence[Merge]) -> None:
    for name, combine in (("weight", merged_weight), ("bias", merged_bias)):
        parameter = getattr(module, name, None)
        if not isinstance(parameter, Tensor):
            continue
        value = parameter.detach().float()
        for merge in merges:
            parts = {key: each.to(value.device) for key, each in parts_of(merge.tensors, component, path).items()}
            value = combine(value, parts, merge.strength)
        # In place: the values may be rows of a tensor that several linears share.
        parameter.data.copy_(value)
