"""Progress shows rate, remaining time and numbers: live on a terminal, as a few plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tuner.core.track.progress import Progress, byte_size, duration, process_memory


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_lines(total: int | None, steps: int, seconds: float, unit: str = "steps", done: int = 0, **fields):
    out, clock = io.StringIO(), Clock()
    with Progress("training", total, unit, done=done, console=Console(file=out, width=60), clock=clock) as progress:
        for _ in range(steps):
            clock.now += seconds
            progress.advance(1, memory_bytes=None, **fields)
    return out.getvalue().splitlines()


def test_output_that_is_no_terminal_gets_whole_plain_lines() -> None:
    lines = plain_lines(4, 4, 20.0, loss=0.12345)
    assert lines[0] == "training: 1/4 steps · 20.00 s/step · 1:00 left · loss 0.1235"
    assert lines[-1] == "training: 4/4 steps · 20.00 s/step · loss 0.1235"


def test_plain_lines_come_at_a_bounded_rate_and_the_last_state_is_always_told() -> None:
    lines = plain_lines(1000, 1000, 0.1)
    assert 5 <= len(lines) <= 13
    assert lines[-1].startswith("training: 1000/1000 steps · 10.00 steps/s")


def test_a_stage_of_unknown_length_is_counted() -> None:
    assert plain_lines(None, 1, 0.5, unit="images") == ["training: 1 images · 2.00 images/s"]


def test_a_resumed_stage_does_not_count_what_was_done_before_into_the_rate() -> None:
    assert plain_lines(100, 1, 2.0, done=90)[0] == "training: 91/100 steps · 2.00 s/step · 0:18 left"


def test_an_empty_stage_says_so() -> None:
    (line,) = plain_lines(0, 0, 1.0)
    assert line.startswith("training: 0/0 steps")


def test_the_rate_follows_the_last_half_minute() -> None:
    clock = Clock()
    with Progress("x", 1000, "steps", console=Console(file=io.StringIO()), clock=clock) as progress:
        for seconds in [10.0] * 10 + [1.0] * 60:
            clock.now += seconds
            progress.advance()
        assert progress.rate() == pytest.approx(1.0)


def test_memory_of_the_process_is_shown_unless_the_stage_knows_better() -> None:
    out = io.StringIO()
    with Progress("x", 1, "steps", console=Console(file=out)) as progress:
        progress.advance(images_per_second=2.5, memory_bytes=3_500_000_000)
        assert progress.detail().endswith("2.50 images/s · 3.50 GB")
    memory = process_memory()
    assert memory is None or memory > 1_000_000


def live(**environment: str) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm-256color", **environment})
    with Progress("caching [bold]x[/bold]", 3, "images", console=console) as progress:
        progress.advance(3, loss=0.5)
    return out.getvalue()


def test_a_terminal_gets_a_live_bar_with_the_same_numbers() -> None:
    shown = live()
    assert "3/3" in shown
    assert "loss 0.5" in shown
    assert "[bold]x[/bold]" in shown
    assert "\x1b[" in shown


def test_no_color_is_honoured() -> None:
    assert "\x1b[38" in live()
    assert "\x1b[38" not in live(NO_COLOR="1")


def test_plain_can_be_asked_for_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress("x", 1, "steps", plain=True, console=Console(file=out, force_terminal=True, width=80)) as progress:
        progress.advance(memory_bytes=None)
    assert "x: 1/1 steps" in out.getvalue()
    assert "\x1b[" not in out.getvalue()


def test_an_error_inside_the_stage_passes_and_leaves_the_terminal_in_order() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True)
    with pytest.raises(KeyError), Progress("x", 2, "steps", console=console):
        raise KeyError("inside")
    assert out.getvalue().endswith("\x1b[?25h")


def test_a_stage_inside_another_gets_the_bar_and_gives_it_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("training", 3, "steps", console=console) as outer:
        outer.advance(1)
        with outer.paused(), Progress("samples", 2, "images", console=console) as inner:
            inner.advance(2)
        outer.advance(2)
    shown = console.file.getvalue()
    assert shown.index("samples") < shown.rindex("training")
    assert "2/2" in shown and "3/3" in shown


def test_sizes_and_durations_read_well() -> None:
    assert [byte_size(count) for count in (12, 3400, 5_600_000, 7_890_000_000)] == ["12 B", "3 kB", "6 MB", "7.89 GB"]
    assert [duration(seconds) for seconds in (5, 65.4, 3600 * 2 + 61)] == ["0:05", "1:05", "2:01:01"]


def test_a_length_that_is_learned_later_reaches_the_bar() -> None:
    out = io.StringIO()
    with Progress("files", None, "files", console=Console(file=out, force_terminal=True, width=100)) as progress:
        progress.total = 6
        progress.advance(6)
    assert "6/6" in out.getvalue()
