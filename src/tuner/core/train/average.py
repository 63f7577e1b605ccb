"""The loss a person watches: a mean over the last epoch's worth of updates."""

from __future__ import annotations

from collections.abc import Sequence


class LossAverage:
    """Each update replaces its own value of the epoch before; the average is over all that are there.

    Rule of kohya-ss/sd-scripts' loss recorder: the window is one epoch, whatever its length.
    """

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.values = list(values)

    def add(self, index: int, loss: float) -> float:
        """Record the update ``index`` (from 0) of its epoch; returns the average."""
        if index < len(self.values):
            self.values[index] = loss
        else:
            self.values.append(loss)
        return sum(self.values) / len(self.values)
