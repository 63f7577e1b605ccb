"""Progress of a long stage: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

WINDOW_SECONDS = 30.0
"""The shown rate is an average over about so long."""
PLAIN_SECONDS = 10.0
"""Plain lines come no more often than this, besides the first and the last."""


class Progress:
    """A stage of ``total`` things (None: unknown yet) called ``unit``, ``done`` of them already when it starts.

    ``advance`` says that more are done. Fields it is given stay shown until replaced: ``loss``, ``images_per_second``
    and ``memory_bytes`` have their own format, others are shown by name. plain None: plain when the output is no
    terminal. Colours follow the terminal and the variable NO_COLOR.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        plain: bool | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich import get_console

        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self.console = console or get_console()
        # Rich would end the program, and with it hours of work, when a reader such as ``head`` is gone.
        self.console.on_broken_pipe = partial(_go_on_unseen, self.console)  # type: ignore[method-assign]
        self.plain = not self.console.is_terminal if plain is None else plain
        self.fields: dict[str, Any] = {}
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._last_line: float | None = None
        self._shown = -1

    def __enter__(self) -> Self:
        self._started = self._clock()
        self._marks.append((self._started, self.done))
        if not self.plain:
            self._bar = _make_bar(self.console)
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.done, detail="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._update_bar()
            self._bar.stop()
        elif self._shown != self.done:
            self._print_line()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Make room for the bar of a stage inside this one: a terminal shows one at a time."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def advance(self, count: int = 1, **fields: Any) -> None:
        """``count`` more are done; ``fields`` replace what is shown beside them."""
        self.done += count
        self.fields.update(fields)
        now = self._clock()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[1][0] > WINDOW_SECONDS:
            self._marks.popleft()
        if self._bar is not None:
            self._update_bar()
        elif self._last_line is None or now - self._last_line >= PLAIN_SECONDS:
            self._print_line()

    def advance_of(self, count: int, total: int) -> None:
        """As `advance`, for work that says with every part how much there is in all."""
        self.total = total
        self.advance(count)

    def rate(self) -> float | None:
        """Things per second over the last half minute, None before the first is done."""
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if after > before and end > start else None

    def seconds_left(self) -> float | None:
        rate = self.rate()
        return None if rate is None or self.total is None else max(0, self.total - self.done) / rate

    def detail(self) -> str:
        """Rate, remaining time, fields and memory, as shown."""
        parts = []
        rate = self.rate()
        if rate is not None:
            one = self.unit.removesuffix("s")
            parts.append(f"{rate:.2f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.2f} s/{one}")
        left = self.seconds_left()
        if left is not None and self.done != self.total:
            parts.append(f"{duration(left)} left")
        parts += [_field(name, value) for name, value in self.fields.items() if value is not None]
        if "memory_bytes" not in self.fields:
            memory = process_memory()
            if memory:
                parts.append(_field("memory_bytes", memory))
        return " · ".join(parts)

    def _update_bar(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, detail=self.detail())

    def _print_line(self) -> None:
        self._last_line, self._shown = self._clock(), self.done
        count = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        detail = self.detail()
        text = f"{self.stage}: {count} {self.unit}" + (f" · {detail}" if detail else "")
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _go_on_unseen(console: Console) -> None:
    """Nobody reads any more: what is written from here on goes nowhere."""
    console.quiet = True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, console.file.fileno())
    os.close(nowhere)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def byte_size(count: float) -> str:
    """A size in the unit that leaves one to three digits before the point, powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def process_memory() -> int | None:
    """Resident memory of this process in bytes; its peak where only that is known; None where neither is."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        import resource

        return pages * resource.getpagesize()
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _field(name: str, value: Any) -> str:
    if name == "memory_bytes":
        return byte_size(value)
    if name == "images_per_second":
        return f"{value:.2f} images/s"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _make_bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        refresh_per_second=4,
        # messages appear above the bar, but a file that standard error was sent to keeps getting them
        redirect_stdout=False,
        redirect_stderr=sys.stderr.isatty(),
    )
