"""Several runs one after the other, each in a process of its own, so that none leaves anything behind for the next."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from tuner.core.config import RawConfig
from tuner.core.errors import UsageError
from tuner.core.registry import Catalog, typed_config
from tuner.core.track.events import read_events
from tuner.core.train.folder import CONFIG

PROGRAM = (sys.executable, "-m", "tuner")
"""What is called for each run."""
Result = Literal["finished", "failed", "interrupted", "not started"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRun:
    """A run to come. config: the file as it was named; folder: of the run; length: ``train.steps`` and ``epochs``."""

    config: str
    folder: Path
    length: tuple[int | None, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRow:
    """How a run of a queue ended.

    code: exit code of its process, None when it was not started. steps: of the run in all, None when it recorded none.
    """

    config: str
    folder: str
    result: Result
    code: int | None
    steps: int | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def plan_queue(documents: Sequence[tuple[str, RawConfig]], catalog: Catalog) -> list[QueuedRun]:
    """Check every configuration before the first run starts. UsageError: one is wrong, or two share a run folder."""
    runs: dict[Path, QueuedRun] = {}
    for name, document in documents:
        try:
            config = typed_config(document, catalog)
        except UsageError as problem:
            raise UsageError(f"{name}: {problem.what}", where=problem.where, why=problem.why, fix=problem.fix) from None
        folder = Path(config.checkpoint.dir)
        if folder in runs:
            raise UsageError(
                "two runs of the queue have the same run folder",
                where=f"{folder}, checkpoint.dir",
                why=f"{runs[folder].config} and {name}",
                fix="give each configuration its own checkpoint.dir",
            )
        runs[folder] = QueuedRun(config=name, folder=folder, length=(config.train.steps, config.train.epochs))
    return list(runs.values())


def run_queue(
    runs: Sequence[QueuedRun],
    options: Sequence[str],
    *,
    keep_going: bool,
    resume: bool = False,
    output: IO[str] | None = None,
) -> Iterator[QueueRow]:
    """Run ``tuner train`` for each and yield how it ended, in order.

    options: given to each. keep_going: go on after a failure. resume: go on with what did not finish; runs that did are
    passed over. output: where the standard output of the runs goes, None for this one's.
    A signal ends the queue after the run at hand, which saves and stops as it would alone.
    """
    stopped = False
    options = [*options, "--resume"] if resume else options
    with _Signals() as signals:
        for run in runs:
            done = _steps_done(run) if resume else None
            if stopped or done is not None:
                yield _row(run, "finished" if done is not None else "not started", steps=done)
                continue
            started, before = time.monotonic(), len(_ends(run.folder))
            process = subprocess.Popen([*PROGRAM, "train", run.config, *options], stdout=output)
            with process, signals.passed_to(process):
                code = process.wait()
            ends = _ends(run.folder)[before:]
            steps, reason = (ends[-1].get("steps"), ends[-1].get("reason")) if ends else (None, "")
            interrupted = signals.seen or code == 130 or (code == 0 and reason == "interrupted")
            result: Result = "interrupted" if interrupted else "finished" if code == 0 else "failed"
            stopped = interrupted or (result == "failed" and not keep_going)
            yield _row(run, result, code=code, steps=steps, seconds=time.monotonic() - started)


def _row(
    run: QueuedRun, result: Result, *, code: int | None = None, steps: int | None = None, seconds: float = 0.0
) -> QueueRow:
    return QueueRow(
        config=run.config, folder=str(run.folder), result=result, code=code, steps=steps, seconds=seconds
    )  # fmt: skip


def _steps_done(run: QueuedRun) -> int | None:
    """The steps of a run that finished at the length it is to have; None for any other."""
    ends, config = _ends(run.folder), run.folder / CONFIG
    finished = [end for end in ends if end.get("reason") == "finished" and isinstance(end.get("steps"), int)]
    if not finished or not config.is_file():
        return None
    train = json.loads(config.read_text(encoding="utf-8")).get("train", {})
    steps = int(finished[-1]["steps"])
    # A length in epochs says nothing of steps; then the run has to have ended that way.
    whole = ends[-1] is finished[-1] if run.length[0] is None else steps >= run.length[0]
    return steps if whole and (train.get("steps"), train.get("epochs")) == run.length else None


def _ends(folder: Path) -> list[dict[str, Any]]:
    """What was recorded of ends of runs in a folder."""
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == "run_end"]


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying from them.

    A terminal sends SIGINT to the run as well, which then saves and stops; SIGTERM comes to this process alone and is
    passed on.
    """

    def __init__(self) -> None:
        self.seen = False
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def passed_to(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Inside, SIGTERM goes to ``process``."""
        self._process = process
        if self.seen:
            # It came while the process was being started.
            process.terminate()
        try:
            yield
        finally:
            self._process = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if number == signal.SIGTERM and self._process is not None:
            self._process.terminate()
