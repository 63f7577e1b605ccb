"""Puts a run's parts together in their fixed order, trains, and writes what is left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.core.adapters.network import adapter_layers, adapter_summary, count_parameters, trained
from tuner.core.data.ledger import Ledger
from tuner.core.errors import UsageError
from tuner.core.optim import (
    Ema,
    LrSchedule,
    build_optimizer,
    eval_weights,
    learning_rates,
)
from tuner.core.optim.names import keeps_rests
from tuner.core.track.progress import Progress
from tuner.core.track.trackers import open_trackers
from tuner.core.train.average import LossAverage
from tuner.core.train.averaging import ema_path, start_average
from tuner.core.train.blocks import prepare_blocks
from tuner.core.train.checkpoint import CheckpointWriter, Position, State, list_checkpoints, write_state
from tuner.core.train.compiling import token_counts
from tuner.core.train.device import empty_cache
from tuner.core.train.due import Due
from tuner.core.train.empty import EmptyCaption
from tuner.core.train.export import export
from tuner.core.train.interrupt import Interrupt
from tuner.core.train.loop import Chores, Length, Loop
from tuner.core.train.mounting import mount_extra
from tuner.core.train.previews import Look, Previewer
from tuner.core.train.probe import Probe
from tuner.core.train.quantizing import check_parity, difference_text
from tuner.core.train.state import RunState, first_position, network_part, next_position
from tuner.core.train.step import TrainStep
from tuner.core.train.updates import Stops, build_update, rate_scale
from tuner.core.train.validation import Validator
from tuner.core.types import Batch, TextEmbeds

if TYPE_CHECKING:
    from tuner.core.data.plan import DataPlan
    from tuner.core.registry import Run
    from tuner.core.track.events import EventLog
    from tuner.core.train.caching import Caches
    from tuner.core.train.folder import RunFolder

log = logging.getLogger(__name__)


class Trainer:
    """One run from loaded caches to written files. ``position`` is where it stands."""

    def __init__(
        self,
        *,
        run: Run,
        plan: DataPlan,
        caches: Caches,
        folder: RunFolder,
        events: EventLog,
        device: torch.device,
        state: State | None = None,
    ) -> None:
        self.run, self.plan, self.caches, self.folder, self.events = run, plan, caches, folder, events
        self.config, self.facts, self.device = run.config, run.facts, device
        self.total = plan.total_steps(self.config.train)
        self.models = caches.load_for_steps(None if state is None else network_part(state))
        # The order is fixed: loading quantizes, adapters attach to that, and recomputation runs the adapted blocks.
        self.network = run.model.build_network(self.models)
        tokens = token_counts(plan, caches.prompts, self.facts)
        streaming = prepare_blocks(self.models, adapter_layers(self.network), self.config, self.facts, device, tokens)
        self.names = {name: value for group in self.network.param_groups for name, value in group.params.items()}
        self.optimizer = build_optimizer(
            self.config.optimizer,
            self.network.param_groups,
            device,
            self.facts.text_components,
            scale=rate_scale(self.config),
        )
        self.stops = Stops(self.config.train.stop_component_at, self.network.param_groups, self.total)
        self.update = build_update(self.config, self.optimizer, self.network, self.facts, device, streaming)
        # After the optimizer, which freezes what has no rate: the average is of what trains.
        self.ema = Ema(self.config.ema, self.names, device) if self.config.ema.enabled else None
        self.schedule = LrSchedule(self.optimizer, self.config.schedule, self.total)
        self.position = first_position(self.config, plan)
        self.average = LossAverage()
        self.ledger = Ledger(plan)
        self.state = RunState(
            network=self.network,
            optimizer=self.optimizer,
            names=self.names,
            ema=self.ema,
            average=self.average,
            ledger=self.ledger,
            offloaded=self.config.optimizer.offload,
        )
        self.loader = caches.data.loader()
        self.bar: Progress | None = None
        self.writer = CheckpointWriter.of(folder, self.config.checkpoint)
        self.probe = Probe(run, plan, device, events)
        self.validator = self._validator()
        self.previewer = self._previewer()

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self, state: State | None) -> tuple[str, list[Path]]:
        """Train to the end or to an interrupt. Returns why it stopped, and the exported files."""
        self._check_arithmetic()
        if state is not None:
            self._restore(state)
        elif self.ema is not None and self.config.ema.init_from is not None:
            start_average(self.ema, self.network, self.config, self.facts, Path(self.config.ema.init_from))
        if state is None:
            self._look_at_base()
        self._announce()
        with Interrupt() as interrupt, open_trackers(self.config.log, self.folder.path, self.position.step) as trackers:
            self.trackers = trackers
            if state is None and self.config.sample.at_start:
                self._preview(self.position.step)
            loop = self._loop(interrupt)
            self.probe.start()
            with self._progress() as self.bar:
                self.position, reason = loop.train(self.position, self.bar)
            self.bar = None
            self.probe.finish()
            if reason == "interrupted":
                return reason, self._stop()
            self._save_state_at_end()
            self._validate(self.position.step)
            self._preview(self.position.step)
        files = self._export_final()
        self._write_views()
        return reason, files

    def _look_at_base(self) -> None:
        """What later looks are compared with, while the weights are still the base model's own."""
        if trained(self.network).has_base:
            return
        if self.validator is not None:
            with self._inner_stage("validation of the base", None) as progress:
                self.state.base_losses = self.validator.measure_base(progress.advance)
        if self.previewer is not None:
            with self._inner_stage("samples of the base", None) as progress:
                self.previewer.draw_base(progress.advance)

    def _loop(self, interrupt: Interrupt) -> Loop:
        config, rolling = self.config, self.config.checkpoint.rolling
        train = config.train
        return Loop(
            step=TrainStep(
                model=self.run.model,
                models=self.models,
                network=self.network,
                optimizer=self.optimizer,
                update=self.update,
                config=config,
                device=self.device,
                live_text=self.caches.live_text,
                total=self.total,
                empty=EmptyCaption(
                    config.guidance, self.facts.text_fields, cached=self.caches.cached_text, live=self._live_text
                ),
                ema=self.ema,
            ),
            set_rates=self._set_rates,
            batches=self._batches,
            length=Length(steps=self.total, batches=self.plan.batches_per_epoch, accumulate=train.accumulate),
            chores=Chores(
                save=self._save,
                save_due=Due(config.checkpoint.every, self.total),
                roll_due=Due(rolling.every if rolling else None, self.total),
                validate=self._validate,
                validate_due=Due(config.validation.every if self.validator else None, self.total),
                preview=self._preview,
                preview_due=Due(config.sample.every if self.previewer else None, self.total),
                on_step=self._on_step,
            ),
            events=self.events,
            interrupt=interrupt,
            average=self.average,
            device=self.device,
        )

    def _progress(self) -> Progress:
        return Progress("training", self.total, "steps", done=self.position.step, plain=self.config.log.plain)

    @contextmanager
    def _inner_stage(self, name: str, total: int | None) -> Iterator[Progress]:
        """Progress of a long chore, whether it comes during the training or around it."""
        with ExitStack() as stack:
            if self.bar is not None:
                stack.enter_context(self.bar.paused())
            yield stack.enter_context(Progress(name, total, "images", plain=self.config.log.plain))

    def _set_rates(self, step: int) -> dict[str, float]:
        self.schedule.set(step)
        self.stops.apply(step)
        return learning_rates(self.optimizer)

    def _batches(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        return self.loader.batches(epoch, start=start, step=step)

    def _on_step(self, step: int, metrics: dict[str, float], batches: Sequence[Batch]) -> None:
        if self.config.memory.empty_cache_every and step % self.config.memory.empty_cache_every == 0:
            empty_cache(self.device)
        for batch in batches:
            self.ledger.add(batch.items)
        self.probe.add(step, metrics["seconds"])
        everything = {**metrics, **self.run.extensions.extra_metrics(step, metrics)}
        self.trackers.log(step, everything)
        self.run.extensions.on_step_end(step, everything)

    # --- putting together ---------------------------------------------------------------------------------------------

    def _validator(self) -> Validator | None:
        if not self.plan.validation:
            return None
        return Validator(
            model=self.run.model,
            models=self.models,
            network=self.network,
            config=self.config,
            device=self.device,
            batches=lambda: islice(self.loader.validation_batches(), self.config.validation.max_batches),
            text=lambda batch: self._text([item.caption for item in batch.items]),
        )

    def _previewer(self) -> Previewer | None:
        if not self.caches.prompts:
            return None
        extra = mount_extra(self.config, self.facts, self.models, self.device)
        return Previewer(
            model=self.run.model,
            models=self.models,
            network=self.network,
            facts=self.facts,
            folder=self.folder,
            prompts=self.caches.prompts,
            encode_texts=self._text,
            load_vae=lambda: self.caches.load(["vae"]),
            device=self.device,
            kernel=self.config.attention.sample_backend,
            extra=extra.acting,
            extra_told=extra.told,
            strength=self.config.sample.adapter_strength,
        )

    def _text(self, texts: Sequence[str]) -> TextEmbeds:
        return self.caches.text(self.models, texts)

    def _live_text(self, texts: Sequence[str]) -> TextEmbeds:
        return self.caches.encode_live(self.models, texts)

    def _check_arithmetic(self) -> None:
        """Quantized arithmetic is used when it agrees with the weights as loaded; before a state comes back, so that a
        resumed run decides as the first one did."""
        quantize = self.config.quantize
        if quantize.activations is None:
            return
        result = check_parity(
            self.run.model,
            self.models,
            self.network,
            list(islice(self.loader.batches(0), quantize.parity.batches)),
            text=lambda batch: self._text([item.caption for item in batch.items]),
            device=self.device,
            seed=self.config.train.seed,
            arithmetic=quantize.activations,
            limits=quantize.parity,
        )
        self.events.emit("parity", **asdict(result))
        told = f"{difference_text(result)}; {result.linears} linears, {result.others} more from read-back weights"
        if result.faster is None:
            self._warn(f"{result.arithmetic} arithmetic is not used, weights are read back instead: {told}")
            return
        log.info("%s arithmetic is close enough to plain arithmetic: %s", result.arithmetic, told)
        pace = f"{result.faster:.2f} times as fast as with weights that are read back"
        if result.faster > 1:
            log.info("a pass is %s", pace)
        else:
            self._warn(f"quantized arithmetic does not pay off here, a pass is {pace}: take quantize.activations out")

    def _announce(self) -> None:
        for row in adapter_summary(self.network):
            log.info(
                "%s %s: %d modules, %s, %s parameters",
                row.component, row.kind, row.modules, row.settings, f"{row.parameters:,}",
            )  # fmt: skip
        log.info("trainable parameters: %s", f"{count_parameters(self.network):,}")
        for message in self._doubts():
            self._warn(message)
        self.run.extensions.on_run_start(self.run)

    def _doubts(self) -> Iterator[str]:
        """What is allowed and hardly ever meant."""
        config = self.config
        bf16 = config.train.mode == "full" and config.precision.compute == "bf16"
        if bf16 and config.optimizer.rounding == "nearest" and not keeps_rests(config.optimizer):
            yield (
                "weights train in bfloat16 and are rounded to the nearest: updates below 1/256 of a weight are lost; "
                'set optimizer.rounding to "stochastic" or "kahan"'
            )
        if config.precision.adapter != "fp32":
            yield (
                "precision.adapter is bf16: a step smaller than 1/256 of a weight is lost in rounding; "
                "fp32 costs little memory for an adapter"
            )
        largest = max(tier.batch_size for tier in self.plan.tiers) * self.config.train.accumulate
        if self.config.noise.stratified and largest == 1:
            yield "noise.stratified has no effect: every update has one sample"

    # --- chores -------------------------------------------------------------------------------------------------------

    def _validate(self, step: int) -> None:
        if self.validator is None:
            return
        for suffix, weights in self._looks(self.config.validation.weights):
            name = f"validation{suffix}"
            with weights(), self._inner_stage("validation", None) as progress:
                result = self.validator.run(step, progress.advance)
            fields = asdict(result)
            fields["by_sigma"] = [{"sigma": sigma, "delta": delta} for sigma, delta in result.by_sigma]
            self.events.emit(name, **fields)
            numbers = {f"{name}/delta": result.delta, f"{name}/adapted": result.adapted}
            numbers |= {f"{name}/delta/{each.source}": each.delta for each in result.by_source}
            self.trackers.log(step, numbers)
            log.info(
                "%s at step %d: %+.4f against the base, 95%% interval [%+.4f, %+.4f], %d images",
                name, step, result.delta, result.low, result.high, result.images,
            )  # fmt: skip
            for each in result.by_source:
                log.info(
                    "  %s: %+.4f [%+.4f, %+.4f], %d images", each.source, each.delta, each.low, each.high, each.images
                )

    def _looks(self, which: str, step: int | None = None) -> list[Look]:
        """The kinds of weights that ``which`` names. Before the first step they are the same, so one is enough."""
        looks: list[Look] = []
        if which != "ema" or step == 0:
            looks.append(("", lambda: eval_weights(self.optimizer)))
        if which != "train" and step != 0 and self.ema is not None:
            looks.append(("_ema", self.ema.weights))
        return looks

    def _preview(self, step: int) -> None:
        if self.previewer is None:
            return
        try:
            looks = self._looks(self.config.sample.weights, step)
            with self._inner_stage("samples", self.previewer.images_due(looks)) as progress:
                preview = self.previewer.run(step, looks, progress.advance)
        except (torch.OutOfMemoryError, OSError) as error:
            # Pictures are a convenience; the training goes on without them.
            self._warn(f"no samples at step {step}: {error}")
            return
        self.events.emit(
            "sample",
            step=step,
            sheet=preview.sheet.relative_to(self.folder.path).as_posix(),
            images=[path.relative_to(self.folder.path).as_posix() for path in preview.images],
        )
        self.trackers.image(step, "samples", preview.sheet)
        log.info("samples: %s", preview.sheet)

    def _save(self, position: Position, rolling: bool = False) -> None:
        """Write a checkpoint. A full disk loses this one and nothing else: the run says so and goes on."""
        try:
            self._write_checkpoint(position, rolling)
        except OSError as error:
            self._warn(
                f"the checkpoint of step {position.step} was not written: {error.strerror or error}; "
                "earlier ones are intact"
            )

    def _warn(self, message: str) -> None:
        log.warning("%s", message)
        self.events.emit("warning", message=message)

    def _write_checkpoint(self, position: Position, rolling: bool = False) -> None:
        building = self.writer.begin(position.step)
        with ExitStack() as unfinished:
            unfinished.callback(self.writer.abandon, building)
            name = self.folder.checkpoint_file(position.step).name
            self._export(building / name, step=position.step)
            if self.config.checkpoint.state != "none":
                write_state(building, self.state.capture(position))
            unfinished.pop_all()
        final = self.writer.commit(building, position.step, rolling=rolling)
        self._write_views()
        paths = sorted(final.iterdir())
        self.events.emit(
            "checkpoint",
            step=position.step,
            path=final.relative_to(self.folder.path).as_posix(),
            files=[path.name for path in paths],
        )
        self.run.extensions.on_checkpoint(position.step, paths)

    def _save_state_at_end(self) -> None:
        """The last checkpoint, so that a finished run can be made longer."""
        if self.config.checkpoint.state != "none" and self.position.step > 0:
            self._save(self.position)

    def _stop(self) -> list[Path]:
        """After an interrupt: keep the work if asked to, and leave the views in order."""
        if self.config.checkpoint.on_interrupt == "save":
            try:
                self._write_checkpoint(self.position)
            except OSError as error:
                raise self._lost(f"the checkpoint of step {self.position.step}", error) from error
        self._write_views()
        return []

    def _export_final(self) -> list[Path]:
        try:
            return self._export(self.folder.final)
        except OSError as error:
            raise self._lost("the adapter", error) from error

    def _lost(self, what: str, error: OSError) -> UsageError:
        """The error for a file that a full disk kept from being written, with what there is instead."""
        kept = list_checkpoints(self.folder)
        return UsageError(
            f"{what} was not written",
            where=str(error.filename or self.folder.path),
            why=f"{error.strerror or error}; "
            + (f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint"),
            fix="free some space, then run it again with --resume",
        )

    def _export(self, path: Path, *, step: int | None = None) -> list[Path]:
        """Write the adapter and prove that it reads back; OSErrors pass through from checkpoints only."""
        files: list[Path] = []
        for suffix, weights in self._looks("both" if self.config.checkpoint.save_ema else "train"):
            with weights():
                files += export(
                    self.run,
                    self.network,
                    self.plan,
                    path=ema_path(path) if suffix else path,
                    name=self.folder.name,
                    step=self.position.step if step is None else step,
                    epoch=self.position.epoch,
                    total=self.total,
                    events=self.events,
                    averaged=bool(suffix),
                )
        return files

    def _write_views(self) -> None:
        try:
            self.ledger.write(self.folder.ledger)
        except OSError as error:
            self._warn(f"{self.folder.ledger.name} was not written: {error.strerror or error}")

    # --- state --------------------------------------------------------------------------------------------------------

    def _restore(self, state: State) -> None:
        """Take up a saved state; UsageError when it belongs to another network or optimizer."""
        self.state.restore(state)
        if self.validator is not None and not trained(self.network).has_base:
            self.validator.use_base(self.state.base_losses)
        strict = self.config.checkpoint.strict_data
        self.position, changes = next_position(state.position, self.plan, self.folder, strict=strict)
        if changes:
            self._warn(f"the data changed since the checkpoint ({changes}); going on with the next epoch")
            # Losses of another epoch's steps would stay in the average where the new one is shorter.
            self.average.values = []
        self.events.emit("resume", step=state.position.step)
        log.info("resumed at step %d", state.position.step)
