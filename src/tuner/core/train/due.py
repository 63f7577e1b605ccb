"""When something is due: every so many steps, epochs or minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tuner.core.config import steps_of

if TYPE_CHECKING:
    from tuner.core.config import EveryFields


class Due:
    """Answers once per update whether its time has come; None is never due.

    Steps and epochs depend on the position alone, so a resumed run keeps the same dates; minutes count from the last
    time this was due in this process.
    """

    def __init__(
        self, every: EveryFields | None, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = self._epochs = self._seconds = None
        if every is not None:
            self._steps = None if every.steps is None else max(1, steps_of(every.steps, total_steps))
            self._epochs = every.epochs
            self._seconds = None if every.minutes is None else every.minutes * 60
        self._clock = clock
        self._last = clock()

    def __call__(self, step: int, *, epochs_done: int | None) -> bool:
        """step: updates done. epochs_done: number of epochs that are complete now, None inside an epoch."""
        by_step = self._steps is not None and step % self._steps == 0
        by_epoch = self._epochs is not None and epochs_done is not None and epochs_done % self._epochs == 0
        by_time = self._seconds is not None and self._clock() - self._last >= self._seconds
        if by_time:
            self._last = self._clock()
        return by_step or by_epoch or by_time
