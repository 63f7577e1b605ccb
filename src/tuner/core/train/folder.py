"""The run folder: where everything of a run lies, and the promise that only one process writes there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from tuner.core.errors import UsageError
from tuner.core.locks import take
from tuner.core.track.events import read_events

LOCK = ".lock"
CONFIG = "config.resolved.json"
EVENTS = "events.jsonl"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. ``name`` is the stem of the exported files."""

    path: Path
    name: str

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def events(self) -> Path:
        return self.path / EVENTS

    @property
    def ledger(self) -> Path:
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def final(self) -> Path:
        return self.path / f"{self.name}.safetensors"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_file(self, step: int) -> Path:
        """Where the exported adapter of a checkpoint lies; eight digits, as users of other trainers expect."""
        return self.checkpoint(step) / f"{self.name}-step{step:08d}.safetensors"

    def is_used(self, log_file: str | None = None) -> bool:
        """Whether an earlier run left work here, or something else lies here.

        What a start leaves that failed before its first step is no work: it may be tried again. ``log_file`` is this
        run's own, if it has one.
        """
        if not self.path.is_dir():
            return False
        own = {LOCK, CONFIG, EVENTS, self.manifest.name}
        own |= {Path(log_file).name} if log_file is not None and Path(log_file).parent == self.path else set()
        found = {entry.name for entry in self.path.iterdir()}
        return bool(found - own) or any(event["kind"] == "step" for event in read_events(self.events))


def open_folder(path: Path, name: str | None, *, resume: bool, log_file: str | None = None) -> RunFolder:
    """Make or reuse the run folder. Raises UsageError when it cannot be written, or is used and this is no resume."""
    folder = RunFolder(path, name or path.name)
    if not resume and folder.is_used(log_file):
        what = "an earlier run" if folder.config.is_file() else "other files"
        raise UsageError(
            "the run folder is not empty",
            where=str(path),
            why=f"it holds {what}; nothing is overwritten",
            fix="continue that run with --resume auto, or set checkpoint.dir to a new folder",
        )
    require_writable(path, "the run folder", "checkpoint.dir")
    return folder


def require_writable(path: Path, what: str, key: str) -> None:
    """Make a folder and try to write there. ``what`` and ``key`` are its names in the UsageError when that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(what, path, key, error) from error


def not_writable(what: str, path: Path, key: str, error: OSError) -> UsageError:
    """Why nothing can be written to ``path``. what: its name for a reader; key: the setting that names it."""
    blocked = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    why = f"{blocked} is a file" if blocked is not None else error.strerror or str(error)
    return UsageError(f"cannot write to {what}", where=f"{path}, {key}", why=why, fix=f"set {key} to another folder")


class FolderLock:
    """A lock on the run folder, which goes with the process however it dies."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / LOCK
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        file = self._path.open("a+", encoding="utf-8")
        if not take(file):
            file.close()
            raise UsageError(
                "another run is writing to this folder",
                where=str(self._path.parent),
                why="two runs in one folder would mix their files",
                fix="wait for it, or set checkpoint.dir to another folder",
            )
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
