"""From a configuration document to what a plan is made of. Nothing is fetched, and no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.core.config import RawConfig, RunConfig, load_config
from tuner.core.errors import NotHereError, UsageError
from tuner.core.plan.work import Work, work_of
from tuner.core.registry import Catalog, open_known, typed_config
from tuner.core.types import ModelFacts


def prepare(
    raw: Mapping[str, Any], *, base_dir: Path | None = None, catalog: Catalog | None = None
) -> tuple[RunConfig, ModelFacts, Work]:
    """(configuration with defaults, facts, work) of a run whose weights and pictures may be absent.

    Without the weights the facts are those of the published model of ``model.flavour``; without the pictures one size
    per resolution is assumed. UsageError when neither weights nor a published model tell the sizes.
    """
    catalog = catalog or Catalog()
    document = raw if isinstance(raw, RawConfig) else load_config(raw, env={}, base_dir=base_dir)
    config = typed_config(document, catalog)
    try:
        config, facts, missing = open_known(config, catalog, document)
    except NotHereError as absent:
        what = f"no plan without weights: {absent.what}"
        raise UsageError(what, where=absent.where, why=absent.why, fix=absent.fix) from absent
    place = None if missing is None else missing.where or missing.what
    return config, facts, replace(work_of(config, facts), common=_is_common(document), absent=place)


def _is_common(document: Mapping[str, Any]) -> bool:
    """Whether no set names a size of micro-batches of its own."""
    data = document["data"]
    return not any("batch_size" in part for part in (*data["sets"], data.get("defaults") or {}))
