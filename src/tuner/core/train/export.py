"""Writing the adapter for other programs, and proving at once that the file says what was trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.core.adapters.checkpoints import (
    VerifiedCheckpoint,
    checkpoint_dtype,
    stored_files,
    verify_checkpoint,
)
from tuner.core.adapters.export import Verified, verify_export
from tuner.core.adapters.formats import key_maps
from tuner.core.adapters.network import exported_tensors
from tuner.core.train.metadata import export_metadata

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan
    from tuner.core.registry import Run
    from tuner.core.track.events import EventLog
    from tuner.core.types import Network

log = logging.getLogger(__name__)


def export(
    run: Run,
    network: Network,
    plan: DataPlan,
    *,
    path: Path,
    name: str,
    step: int,
    epoch: int,
    total: int,
    events: EventLog,
    averaged: bool = False,
) -> list[Path]:
    """Write the network's present weights to ``path``, reopen the file and compare every module with memory.

    averaged: the present weights are the average, which only the metadata and the event log need to know.
    Returns the written files. Raises UsageError when the file does not read back as what was trained, or when an
    extension's metadata clashes; OSErrors (a full disk) pass through.
    """
    metadata = export_metadata(
        run.config,
        plan,
        name=name,
        step=step,
        epoch=epoch,
        total=total,
        averaged=averaged,
        merged=run.manifest.get("merged", ()),
    )
    if run.config.checkpoint.metadata.embed:
        metadata |= run.extensions.extra_metadata(metadata)
    tensors = {key: value.cpu() for key, value in exported_tensors(network).items()}
    files = run.model.save(network, tensors, path, metadata)
    whole = run.config.train.mode == "full"
    stored = stored_files(run.config, run.facts) if whole else ()
    for number, file in enumerate(files):
        verified: Verified | VerifiedCheckpoint
        if whole:
            verified = verify_checkpoint(file, tensors, stored[number], checkpoint_dtype(run.config))
        else:
            verified = verify_export(file, tensors, key_maps(run.facts))
        told = {"keys": verified.keys, "modules": verified.modules, "format": verified.format}
        events.emit("export", path=file.name, weights="ema" if averaged else "train", **told)
        log.info("%s: %s", file.name, verified)
    return files
