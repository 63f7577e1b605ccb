"""A run from its config to its files: plan, cache, load, train, export, report. Each stage is one function below."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.core.atomic import write_json
from tuner.core.compute.attention_kernels import check_attention
from tuner.core.config import RunConfig
from tuner.core.config.resuming import free_on_resume
from tuner.core.data.inuse import cache_in_use
from tuner.core.data.plan import plan_data
from tuner.core.data.report import PlanReport, report_plan
from tuner.core.errors import UsageError
from tuner.core.optim import check_optimizer
from tuner.core.registry import Run, open_run
from tuner.core.track.events import EventLog
from tuner.core.track.report import write_report
from tuner.core.track.trackers import check_trackers
from tuner.core.train.averaging import check_ema
from tuner.core.train.caching import Caches
from tuner.core.train.check import check_network
from tuner.core.train.checkpoint import find_state
from tuner.core.train.compiling import check_compile, compiler
from tuner.core.train.device import pick_device
from tuner.core.train.folder import FolderLock, RunFolder, not_writable, open_folder, require_writable
from tuner.core.train.quantizing import check_quantize
from tuner.core.train.state import check_continues
from tuner.core.train.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended. ``reason`` is ``finished`` or ``interrupted``; ``files`` are the exports, averages last."""

    folder: Path
    steps: int
    seconds: float
    reason: str
    files: tuple[Path, ...]


def train(raw: Mapping[str, Any], *, base_dir: Path | None = None, resume: str | None = None) -> RunSummary:
    """Run the training that ``raw`` describes.

    raw: a configuration as loaded from JSON, ``model.family`` included. base_dir: what relative paths in it are
    relative to, the current folder by default. resume: overrides ``checkpoint.resume``. Raises UsageError for
    anything the user can fix, before weights are read wherever that is possible.
    """
    started = time.monotonic()
    run = open_run(raw, base_dir=base_dir)
    config = run.config
    wanted = resume or config.checkpoint.resume
    check_network(config, run.facts)
    folder = open_folder(
        Path(config.checkpoint.dir), config.checkpoint.name, resume=wanted != "none", log_file=config.log.file
    )
    check_trackers(config.log)
    check_optimizer(config.optimizer)
    check_ema(config)
    device = pick_device()
    check_quantize(config, device)
    check_compile(config, device)
    check_attention(config, run.facts, device)
    set_torch(config)
    with FolderLock(folder), EventLog(folder.events) as events, compiler(config), ExitStack() as held:
        found = None if wanted == "none" else find_state(folder, wanted)
        state = found[1] if found else None
        check_same_run(folder, run)
        if found:
            # The checkpoint may lie in another run's folder; then that run's settings are the ones to go on with.
            check_same_run(RunFolder(found[0].parent.parent, folder.name), run)
        if wanted != "none" and found is None:
            tell_fresh_start(folder, events)
        plan = plan_data(config, run.facts)
        if state is not None:
            # Before anything is recorded: a run that is over stays as it is.
            check_continues(state, folder, total=plan.total_steps(config.train), seed=config.train.seed)
        report = report_plan(plan, config.train)
        show_plan(report, folder)
        write_records(folder, run)
        events.emit("run_start", run=folder.name, versions=run.manifest, plan=report.as_dict())
        held.enter_context(cache_folder(config))
        caches = Caches(run, plan, device, events)
        caches.fill()
        trainer = Trainer(run=run, plan=plan, caches=caches, folder=folder, events=events, device=device, state=state)
        try:
            reason, files = trainer.train(state)
        except BaseException as error:
            # The log must say that the run is over even when nobody saw the message.
            why = f"failed: {error.what}" if isinstance(error, UsageError) else f"failed: {error!r}"
            events.emit("run_end", steps=trainer.position.step, seconds=time.monotonic() - started, reason=why)
            raise
        summary = RunSummary(
            folder=folder.path,
            steps=trainer.position.step,
            seconds=time.monotonic() - started,
            reason=reason,
            files=tuple(files),
        )
        events.emit("run_end", steps=summary.steps, seconds=summary.seconds, reason=reason)
        try:
            write_report(folder.path)
        except OSError as error:
            log.warning("report.html was not written: %s", error.strerror or error)
        run.extensions.on_run_end(asdict(summary))
    return summary


def cache_only(raw: Mapping[str, Any], *, base_dir: Path | None = None) -> PlanReport:
    """Encode and cache everything the run would need, and stop. A killed call goes on where it stopped."""
    run = open_run(raw, base_dir=base_dir)
    if run.config.cache.latents != "disk" and run.config.cache.text != "disk":
        raise UsageError("nothing would be cached", where="cache", fix='set cache.latents or cache.text to "disk"')
    set_torch(run.config)
    plan = plan_data(run.config, run.facts)
    device = pick_device()
    check_quantize(run.config, device)
    with cache_folder(run.config):
        Caches(run, plan, device, None).fill()
    return report_plan(plan, run.config.train)


def used_entries(raw: Mapping[str, Any], *, base_dir: Path | None = None) -> tuple[Path, set[str]]:
    """(cache folder, names of the entries that a run reads). Nothing is loaded or encoded."""
    run = open_run(raw, base_dir=base_dir)
    caches = Caches(run, plan_data(run.config, run.facts), pick_device(), None)
    return Path(run.config.cache.dir), caches.names()


@contextmanager
def cache_folder(config: RunConfig) -> Iterator[None]:
    """Make the cache folder when something will be kept there, and keep ``tuner cache prune`` away from it inside.

    UsageError when it cannot be written.
    """
    if "disk" not in (config.cache.latents, config.cache.text):
        yield
        return
    folder = Path(config.cache.dir)
    require_writable(folder, "the cache folder", "cache.dir")
    with cache_in_use(folder):
        yield


def show_plan(report: PlanReport, folder: RunFolder) -> None:
    """Say what is about to happen, before anything takes time."""
    log.info(
        "data: %d images, %d uses per epoch in %d batches of %d sizes, %d held out, %.1f%% of the pixels cropped",
        report.images, report.visits_per_epoch, report.batches_per_epoch, len(report.buckets),
        report.validation_images, 100 * report.cropped,
    )  # fmt: skip
    for line in report.left_out_lines():
        log.warning("%s", line)
    for note in report.notes:
        log.warning("%s", note)
    epochs = report.total_steps / report.steps_per_epoch
    log.info("run: %d steps, %.1f epochs, into %s", report.total_steps, epochs, folder.path)


def tell_fresh_start(folder: RunFolder, events: EventLog) -> None:
    """A resume without a checkpoint begins anew; steps that were recorded before count as redone."""
    log.warning("no checkpoint in %s: starting from the beginning", folder.path)
    if folder.is_used():
        events.emit("resume", step=0)


def set_torch(config: RunConfig) -> None:
    """Threads and float32 products of this process."""
    if config.train.cpu_threads is not None:
        torch.set_num_threads(config.train.cpu_threads)
    # Not through torch's newer fp32_precision: the compiler reads these, and torch refuses a mix of both.
    torch.backends.cuda.matmul.allow_tf32 = config.precision.tf32
    torch.backends.cudnn.allow_tf32 = config.precision.tf32


def write_records(folder: RunFolder, run: Run) -> None:
    """The resolved configuration and the versions that take part; on resume they replace equal ones."""
    try:
        write_json(folder.config, resolved(run))
        write_json(folder.manifest, run.manifest)
    except OSError as error:
        raise not_writable("the run folder", folder.path, "checkpoint.dir", error) from error


def resolved(run: Run) -> dict[str, Any]:
    """The configuration with every default written out, as it goes into ``config.resolved.json``."""
    return run.config.model_dump(mode="json", by_alias=True)


def check_same_run(folder: RunFolder, run: Run) -> None:
    """Refuse to continue with settings that would make it another run."""
    if not folder.config.is_file() or not folder.is_used():
        return
    before = json.loads(folder.config.read_text(encoding="utf-8"))
    changed = [name for name in differences(before, resolved(run)) if not free_on_resume(name)]
    if folder.manifest.is_file():
        manifest = json.loads(folder.manifest.read_text(encoding="utf-8"))
        if manifest.get("merged", []) != run.manifest.get("merged", []):
            changed = list(dict.fromkeys([*changed, "model.merge"]))
    if changed:
        raise UsageError(
            "this is not the configuration that the run folder was made with",
            where=", ".join(changed[:8]),
            why="on resume only lengths, samples, validation, logging, retention, workers, memory and compilation may "
            "differ",
            fix="restore these values, or start a new run in another checkpoint.dir",
        )


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON documents differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            found
            for key in keys
            for found in differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == after else [path]
