"""Other places for a run's numbers: ``log.to``. The event log is written whatever is named here.

A tracker plugin is an entry point of the group ``tuner.loggers``: a callable ``(folder, start_step)`` that returns an
object with the methods of `Tracker`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from tuner.core.errors import UsageError
from tuner.core.track.page import hide_folders
from tuner.core.track.weights_and_biases import WANDB, WeightsAndBiases

if TYPE_CHECKING:
    from tuner.core.config import LogConfig

ENTRY_POINTS = "tuner.loggers"
JSONL = "jsonl"
TENSORBOARD = "tensorboard"
PACKAGES = {TENSORBOARD: "TensorBoard", WANDB: "Weights & Biases"}
"""Trackers that need a package of the same name, and their titles."""


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
    """The trackers that ``log.to`` names, in that order, writing below ``log.dir``, else below ``run_dir``.

    start_step: updates done already; a tracker drops what it recorded beyond. Raises UsageError for an unknown name or
    a missing package.
    """
    check_trackers(config)
    folder = run_dir if config.dir is None else Path(config.dir)
    settings = settings_of(run_dir) if config.config else {}
    made: list[Tracker] = []
    with ExitStack() as opened:
        for name in config.to:
            if name == JSONL:
                continue
            if name == TENSORBOARD:
                made.append(TensorBoard(folder, start_step, settings))
            elif name == WANDB:
                made.append(WeightsAndBiases(folder, run_dir, config, settings))
            else:
                made.append(_plugin(name)(folder, start_step))
            opened.callback(made[-1].close)
        # All of them are open: closing them is now the caller's.
        opened.pop_all()
    return Trackers(made)


def check_trackers(config: LogConfig) -> None:
    """Raise what `open_trackers` would raise, without opening anything."""
    for name in config.to:
        if name in PACKAGES and find_spec(name) is None:
            fix = f"pip install {name}, or remove it from log.to"
            raise UsageError(f"{PACKAGES[name]} is not installed", where="log.to", fix=fix)
        if name not in (JSONL, *PACKAGES):
            _plugin(name)


def settings_of(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run without folders, which say too much of a machine."""
    path = run_dir / "config.resolved.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: _without_folders(value) for key, value in settings.items()}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(below) for key, below in value.items()}
    return [_without_folders(below) for below in value] if isinstance(value, list) else hide_folders(value)


def _plugin(name: str) -> Factory:
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            factory: Factory = point.load()
            return factory
    names = [JSONL, *PACKAGES, *(point.name for point in entry_points(group=ENTRY_POINTS))]
    near = difflib.get_close_matches(name, names, 1)
    raise UsageError(
        f"nothing is called {name!r} that could record a run",
        where="log.to",
        why=f"there are {', '.join(names)}",
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


class TensorBoard:
    """Writes event files below ``folder/tensorboard``, the settings as a text."""

    def __init__(self, folder: Path, start_step: int, settings: Mapping[str, Any] = MappingProxyType({})) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
        if settings:
            # Four blanks make a block of code of each line.
            lines = json.dumps(settings, indent=2, ensure_ascii=False).splitlines()
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in lines), start_step)

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
