"""``model.merge`` in a run: reading the adapters, adding them to what is loaded, and what they change of identities."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.adapters.merging import Addition, merge_into
from tuner.core.train.mounting import read_fitting
from tuner.core.types import Models

if TYPE_CHECKING:
    from tuner.core.config import RunConfig
    from tuner.core.registry import Run
    from tuner.core.types import ModelFacts

log = logging.getLogger(__name__)

NEVER_ADAPTED = ("vae",)
"""Components that adapter files have no keys for, so that loading them need not read any."""


def read_additions(config: RunConfig, facts: ModelFacts) -> list[Addition]:
    """The adapters of ``model.merge``, in order. UsageError: a key that maps nowhere, or a component that the model
    does not have."""
    return [
        read_fitting(Path(entry.path), entry.strength, facts, where=f"model.merge[{number}]")
        for number, entry in enumerate(config.model.merge)
    ]


def merge_adapters(run: Run, models: Models, components: Collection[str]) -> None:
    """Add the adapters of ``model.merge`` to the named components of ``models``, as they were loaded."""
    wanted = [name for name in components if name not in NEVER_ADAPTED]
    if not run.config.model.merge or not wanted:
        return
    additions = read_additions(run.config, run.facts)
    for name in wanted:
        module = models.component(name)
        assert module is not None
        count = merge_into(module, name, additions)
        if count:
            log.info("%s: adapters are merged into %d weights", name, count)
        if count and run.config.train.mode == "full" and name not in run.config.train.components:
            log.warning("%s does not train, so what is merged into it is in none of the written files", name)


def merged_identities(run: Run) -> dict[str, list[str]]:
    """Component to what was merged into it, in words that change when the result does; part of names of encodings."""
    if not run.config.model.merge:
        return {}
    found: dict[str, list[str]] = {}
    additions = read_additions(run.config, run.facts)
    for addition, told in zip(additions, run.manifest["merged"], strict=True):
        for component in addition.components:
            found.setdefault(component, []).append(f"merged {told['sha256']} at {told['strength']!r}")
    return found
