"""The training loop. It reads top to bottom; everything it calls is made before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch

from tuner.core.train.average import LossAverage
from tuner.core.train.checkpoint import Position
from tuner.core.train.due import Due
from tuner.core.train.interrupt import Interrupt
from tuner.core.train.step import StepResult
from tuner.core.types import Batch

if TYPE_CHECKING:
    from tuner.core.track.events import EventLog
    from tuner.core.track.progress import Progress


class Step(Protocol):
    """One update. step: its number, from 1; batches: its micro-batches."""

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How long a run is: ``steps`` updates in all, ``batches`` micro-batches per epoch, ``accumulate`` of them per
    update.
    """

    steps: int
    batches: int
    accumulate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chores:
    """What happens beside the updates, in the order it happens when several are due: saving comes first.

    save: takes the position, and whether the checkpoint is one of the rolling series.
    """

    save: Callable[[Position, bool], None]
    save_due: Due
    roll_due: Due
    validate: Callable[[int], None]
    validate_due: Due
    preview: Callable[[int], None]
    preview_due: Due
    on_step: Callable[[int, dict[str, float], Sequence[Batch]], None]


class Loop:
    """Runs updates from a position to the end of the run or to an interrupt."""

    def __init__(
        self,
        *,
        step: Step,
        set_rates: Callable[[int], dict[str, float]],
        batches: Callable[[int, int, int], Iterator[Batch]],
        length: Length,
        chores: Chores,
        events: EventLog,
        interrupt: Interrupt,
        average: LossAverage,
        device: torch.device,
    ) -> None:
        self.step, self.set_rates, self.batches, self.length = step, set_rates, batches, length
        self.chores, self.events, self.interrupt, self.average = chores, events, interrupt, average
        self.device = device

    def train(self, position: Position, progress: Progress) -> tuple[Position, str]:
        """Train on from ``position``. Returns where it stopped and why: ``finished`` or ``interrupted``."""
        while position.step < self.length.steps:
            stream = self.batches(position.epoch, position.batch, position.step)
            while position.step < self.length.steps and position.batch < self.length.batches:
                started = time.perf_counter()
                group = list(islice(stream, self.length.accumulate))
                rates = self.set_rates(position.step)
                result = self.step(position.step + 1, group)
                index = position.batch // self.length.accumulate
                position = self._advance(position, len(group))
                self._record(position, index, result, rates, time.perf_counter() - started, group, progress)
                self._do_chores(position)
                if self.interrupt.requested and position.step < self.length.steps:
                    return self._rolled(position), "interrupted"
            position = self._rolled(position)
        return position, "finished"

    @staticmethod
    def _advance(position: Position, count: int) -> Position:
        return replace(position, step=position.step + 1, batch=position.batch + count)

    def _rolled(self, position: Position) -> Position:
        """The same place, said as the start of the next epoch when this one is used up."""
        if position.batch < self.length.batches:
            return position
        return replace(position, epoch=position.epoch + 1, batch=0)

    def _do_chores(self, position: Position) -> None:
        """Save, then measure, then draw: a crash while drawing must not cost the checkpoint."""
        step = position.step
        here = self._rolled(position)
        epochs_done = here.epoch if here.batch == 0 else None
        last = step == self.length.steps
        kept = self.chores.save_due(step, epochs_done=epochs_done)
        if (self.chores.roll_due(step, epochs_done=epochs_done) or kept) and not last:
            self.chores.save(here, not kept)
        if self.chores.validate_due(step, epochs_done=epochs_done) and not last:
            self.chores.validate(step)
        if self.chores.preview_due(step, epochs_done=epochs_done) and not last:
            self.chores.preview(step)

    def _record(
        self,
        position: Position,
        index: int,
        result: StepResult,
        rates: dict[str, float],
        seconds: float,
        group: Sequence[Batch],
        progress: Progress,
    ) -> None:
        average = self.average.add(index, result.loss)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        metrics = {
            "loss": result.loss,
            "loss_avg": average,
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "images_per_second": result.samples / seconds,
        }
        if result.norms is not None:
            metrics |= {f"adapter_norm_{name}": value for name, value in asdict(result.norms).items()}
        extra = {"memory_bytes": memory} if memory else {}
        self.events.emit(
            "step", step=position.step, epoch=position.epoch, lr=rates, **metrics, **asdict(result.parts), **extra
        )
        named = {f"lr/{name}": rate for name, rate in rates.items()} | result.parts.named()
        self.chores.on_step(position.step, {**metrics, **named}, group)
        progress.advance(1, loss=average, images_per_second=metrics["images_per_second"], **extra)
