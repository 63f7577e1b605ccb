"""Adapter files for a model: reading them, saying what does not fit, and letting them act in pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuner.core.adapters.deltas import kind_of
from tuner.core.adapters.files import read_adapter
from tuner.core.adapters.formats import key_maps, modules_of, parts_of
from tuner.core.adapters.merging import Addition, read_addition
from tuner.core.adapters.norms import NormLayer
from tuner.core.adapters.stack import AdapterStack, check_places
from tuner.core.compute.dtypes import all_finite, dtype_by_name
from tuner.core.data.texts import live_components
from tuner.core.errors import UsageError
from tuner.core.registry import MODELS, Catalog
from tuner.core.types import KeyMaps, Models

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.types import ModelFacts


def read_fitting(path: Path, strength: float, facts: ModelFacts, *, where: str) -> Addition:
    """Read an adapter file for the model that ``facts`` describe. where: what errors call it.

    UsageError: a file of another model, keys that map nowhere, a component that the model does not load, modules that
    it does not have, as far as its plugin lists them, or values that are not finite.
    """
    try:
        addition = read_addition(path, strength, key_maps(facts), where=where)
    except UsageError as error:
        others = models_of(path, besides=facts.family)
        if not others:
            raise
        raise UsageError(
            f"this adapter is for {' or '.join(others)}, the model is {facts.family}",
            where=f"{path}, {where}",
            fix="use it with its own model",
        ) from error
    for component in addition.components:
        if component not in facts.components:
            raise UsageError(
                f"the adapter changes {component}, which this model does not load",
                where=f"{path}, {where}",
                why=f"its components are {', '.join(facts.components)}",
                fix="use a file without that part, or give the model that component",
            )
    modules = {name: set(paths) for name, paths in facts.modules.items() if paths}
    stored = [
        each
        for each in modules_of(addition.tensors)
        # Plugins list what adapters are put beside; norms are none of that.
        if kind_of(parts_of(addition.tensors, *each)) != NormLayer.kind
    ]
    check_places(stored, modules, f"{path}, {where}")
    broken = [name for name, value in addition.tensors.items() if not all_finite(value)]
    if broken:
        raise UsageError(
            "the adapter holds values that are not finite",
            where=f"{path}, {where}",
            why=f"its training went wrong: {broken[0]}" + (f" and {len(broken) - 1} more" if broken[1:] else ""),
            fix="use an earlier checkpoint",
        )
    return addition


def models_of(path: Path, *, besides: str = "") -> list[str]:
    """The installed models that know every key of an adapter file; plugins that cannot be asked are passed over."""
    catalog, found = Catalog(), []
    for entry in catalog.entries(MODELS):
        if entry.name == besides:
            continue
        try:
            reference = catalog.model(entry.name).key_maps
            if reference is not None:
                maps: KeyMaps = catalog.load(entry, "descriptor", reference)
                catalog.call(entry, "adapter formats", read_adapter, path, maps)
                found.append(entry.name)
        except UsageError:
            continue
    return found


def told(addition: Addition) -> dict[str, Any]:
    """What pictures say about an adapter: its file's name and bytes, and the strength."""
    with addition.path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    return {"file": addition.path.name, "sha256": digest, "strength": addition.strength}


# --- sample.adapters --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extra:
    """The adapters of ``sample.adapters`` on the models of a run. acting: a context in which they act."""

    acting: Callable[[], AbstractContextManager[None]] = nullcontext
    told: Sequence[Mapping[str, Any]] = ()


def read_extra(config: RunConfig, facts: ModelFacts) -> list[Addition]:
    """The files of ``sample.adapters``. UsageError when one does not fit, or changes a text encoder that has been taken
    out of memory by the time pictures are made."""
    if not config.sample.enabled:
        return []
    present = {"denoiser", *config.train.components, *facts.step_components, *live_components(config, facts)}
    found = []
    for number, entry in enumerate(config.sample.adapters):
        where = f"sample.adapters[{number}]"
        addition = read_fitting(Path(entry.path), entry.strength, facts, where=where)
        for component in addition.components:
            if component not in present:
                raise UsageError(
                    f"the adapter changes {component}, whose output is encoded once and kept",
                    where=f"{entry.path}, {where}",
                    fix='set cache.text to "off", or use a file without that part',
                )
        found.append(addition)
    return found


def mount_extra(config: RunConfig, facts: ModelFacts, models: Models, device: torch.device) -> Extra:
    """Read ``sample.adapters`` and make their layers for ``models``."""
    additions = read_extra(config, facts)
    if not additions:
        return Extra()
    stack = mount(additions, models, config, facts)
    stack.set_strengths([each.strength for each in additions])
    # They were made beside weights that may be in host memory.
    stack.to(device)
    return Extra(stack.acting, [told(each) for each in additions])


def mount(additions: Sequence[Addition], models: Models, config: RunConfig, facts: ModelFacts) -> AdapterStack:
    """Layers of the adapters for the components that are loaded, each at strength 1, not yet attached."""
    stack = AdapterStack()
    dtype = dtype_by_name(config.precision.adapter, where="precision.adapter")
    for each in additions:
        stack.add(each.tensors, models, facts, dtype=dtype, where=f"{each.path}, {each.where}")
    return stack
