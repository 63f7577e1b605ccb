"""Other places for a run's numbers: ``log.to``. The event log is written whatever is named here.

A tracker plugin is an entry point of the group ``tuner.loggers``: a callable ``(folder, start_step)`` that returns an
object with the methods of `Tracker`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from tuner.core.errors import UsageError

if TYPE_CHECKING:
    from tuner.core.config import LogConfig

ENTRY_POINTS = "tuner.loggers"
JSONL = "jsonl"
TENSORBOARD = "tensorboard"


class Tracker(Protocol):
    """Receives numbers and pictures. Steps never go back except when a run resumes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


Factory = Callable[[Path, int], Tracker]


class Trackers:
    """All trackers of a run behind one, closed together at the end of the context."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def image(self, step: int, name: str, path: Path) -> None:
        for tracker in self._trackers:
            tracker.image(step, name, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(config: LogConfig, run_dir: Path, start_step: int = 0) -> Trackers:
    """The trackers that ``log.to`` names, writing below ``log.dir``, else below ``run_dir``.

    start_step: updates done already; a tracker drops what it recorded beyond. Raises UsageError for an unknown name or
    a missing package.
    """
    folder = run_dir if config.dir is None else Path(config.dir)
    return Trackers([find_tracker(name)(folder, start_step) for name in config.to if name != JSONL])


def check_trackers(config: LogConfig) -> None:
    """Raise what `open_trackers` would raise, without opening anything."""
    for name in config.to:
        if name != JSONL:
            find_tracker(name)


def find_tracker(name: str) -> Factory:
    if name == TENSORBOARD:
        if find_spec("tensorboard") is None:
            raise UsageError(
                "TensorBoard is not installed", where="log.to", fix="pip install tensorboard, or remove it from log.to"
            )
        return TensorBoard
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            factory: Factory = point.load()
            return factory
    names = [JSONL, TENSORBOARD, *(point.name for point in entry_points(group=ENTRY_POINTS))]
    near = difflib.get_close_matches(name, names, 1)
    raise UsageError(
        f"nothing is called {name!r} that could record a run",
        where="log.to",
        why=f"there are {', '.join(names)}",
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


class TensorBoard:
    """Writes event files below ``folder/tensorboard``."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
