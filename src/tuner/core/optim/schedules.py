"""Learning-rate schedules: the factor on every base rate as a pure function of the update's number.

Curves equal those of kohya-ss/sd-scripts (which uses diffusers' and transformers' schedules); ``sine`` is
bghira/SimpleTuner's. n is the update from 0, W the warm-up, T the planned total.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tuner.core.config import steps_of
from tuner.core.errors import UsageError
from tuner.core.optim.imports import import_class
from tuner.core.optim.state import is_schedule_free

if TYPE_CHECKING:
    from tuner.core.config import ScheduleConfig

POLYNOMIAL_END = 1e-7
"""Rate at the end of ``polynomial`` when none is given."""


def lr_factor(config: ScheduleConfig, step: int, total: int, base_lr: float = 1.0) -> float:
    """Factor for update ``step`` (counted from 0) of ``total``. base_lr only matters where ``end_lr`` is a floor."""
    if config.name == "piecewise_constant":
        return _piece(config, step, total)
    if config.name == "sine":
        floor = _floor(config, base_lr)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.sin(math.pi * step / _period(config)))
    warmup = steps_of(config.warmup, total)
    if config.name == "warmup_stable_decay":
        return _warmup_stable_decay(config, step, total, warmup, _floor(config, base_lr))
    if step < warmup:
        return step / warmup
    return _after_warmup(config, step, total, warmup, base_lr)


def _after_warmup(config: ScheduleConfig, step: int, total: int, warmup: int, base_lr: float) -> float:
    name = config.name
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    if name == "linear":
        return 1.0 - progress
    if name == "cosine":
        return _half_wave(progress)
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else _half_wave((config.cycles * progress) % 1.0)
    if name == "cosine_with_min_lr":
        floor = _floor(config, base_lr)
        return floor + (1.0 - floor) * _half_wave(config.cycles * progress)
    if name == "polynomial":
        end = (POLYNOMIAL_END if config.end_lr is None else config.end_lr) / base_lr
        return end + (1.0 - end) * math.pow(1.0 - progress, config.power)
    if name == "inverse_sqrt":
        timescale = config.timescale or warmup or 10_000
        return 1.0 / math.sqrt((step + timescale - warmup) / timescale)
    raise ValueError(f"unknown schedule.name {name!r}")


def _warmup_stable_decay(config: ScheduleConfig, step: int, total: int, warmup: int, floor: float) -> float:
    """Up from the floor, flat, down to the floor over the last ``decay`` updates."""
    decay = steps_of(config.decay, total)
    if step < warmup:
        wave = step / warmup
    elif step < total - decay:
        wave = 1.0
    elif step < total:
        wave = _half_wave(config.cycles * (step - (total - decay)) / decay)
    else:
        wave = 0.0
    return floor + (1.0 - floor) * wave


def _half_wave(progress: float) -> float:
    """Cosine from 1 at 0 to 0 at 1, and back up beyond."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _floor(config: ScheduleConfig, base_lr: float) -> float:
    if config.end_lr is not None:
        return config.end_lr / base_lr
    return config.min_ratio or 0.0


def _period(config: ScheduleConfig) -> int:
    if config.period is None:
        raise ValueError("schedule 'sine' needs period")
    return config.period


def _piece(config: ScheduleConfig, step: int, total: int) -> float:
    for piece in config.pieces:
        if piece.until is None or step < steps_of(piece.until, total):
            return piece.factor
    raise ValueError("the last piece of a schedule must be open")


class LrSchedule:
    """Writes the rates of an optimizer's groups: ``base_lr`` times the factor of the step.

    total: planned updates of the whole run. Holds no state that a run must keep: a resumed run calls ``set`` with its
    step and is right. Raises UsageError when the floor is not below a base rate, when phases do not fit into the run,
    when a schedule-free optimizer is given a curve that it would fight against, or when a class cannot be used.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, total: int) -> None:
        self.optimizer, self.config, self.total = optimizer, config, total
        self.base_lrs = [float(group.get("base_lr", group["lr"])) for group in optimizer.param_groups]
        self._check()
        self._others = _Others(config, self.base_lrs) if config.class_ else None

    def set(self, step: int) -> None:
        """Set the rates for update ``step``, counted from 0."""
        if self._others is not None:
            rates = self._others.rates(step)
        else:
            rates = [base * lr_factor(self.config, step, self.total, base) for base in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                # Optimizers that compile themselves keep it as a tensor, and insist on it.
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _check(self) -> None:
        config = self.config
        flat = config.class_ is None and config.name in ("constant", "constant_with_warmup")
        if is_schedule_free(self.optimizer) and not flat:
            raise UsageError(
                f"a schedule-free optimizer cannot follow the schedule {config.class_ or config.name!r}",
                where="schedule.class" if config.class_ else "schedule.name",
                why="it replaces the decay by averaging",
                fix="use constant, or constant_with_warmup",
            )
        lowest = POLYNOMIAL_END if config.name == "polynomial" and config.end_lr is None else config.end_lr
        if lowest is not None and lowest >= min(self.base_lrs):
            raise UsageError(
                f"the end rate {lowest:g} is not below the learning rate {min(self.base_lrs):g}",
                where="schedule.end_lr",
                fix="lower schedule.end_lr or raise optimizer.lr",
            )
        phases = steps_of(config.warmup, self.total)
        if config.name == "warmup_stable_decay":
            phases += steps_of(config.decay, self.total)
        if phases > self.total:
            raise UsageError(
                f"warm-up and decay need {phases} updates, the run has {self.total}",
                where="schedule.warmup",
                fix="shorten them, or give them as shares such as '5%'",
            )


class _Others:
    """A torch scheduler beside a stand-in for the optimizer. It is replayed from the first update on when a run goes
    on, so nothing of it needs to be saved."""

    def __init__(self, config: ScheduleConfig, base_lrs: Sequence[float]) -> None:
        assert config.class_ is not None
        module, _, attribute = config.class_.rpartition(".")
        what = f"the schedule {config.class_!r}"
        if not module:
            raise UsageError(f"{what} is no import path", where="schedule.class", fix="package.module.Class")
        factory = import_class(what, module, attribute, where="schedule.class")
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in base_lrs]
        self._stand_in = torch.optim.SGD(groups)
        try:
            self._scheduler = factory(self._stand_in, **config.args)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{what} refuses its settings", where="schedule.args", why=str(error)) from error
        if "metrics" in inspect.signature(self._scheduler.step).parameters:
            raise UsageError(f"{what} follows a measured value, which updates do not have", where="schedule.class")
        self._step = 0

    def rates(self, step: int) -> list[float]:
        while self._step < step:
            self._stand_in.step()
            self._scheduler.step()
            self._step += 1
        return [float(group["lr"]) for group in self._stand_in.param_groups]
