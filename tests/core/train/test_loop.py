"""The loop: positions, order of chores, dates, interrupts. The step itself is a stand-in here."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest
import torch

from tuner.core.config import EveryFields
from tuner.core.train.average import LossAverage
from tuner.core.train.checkpoint import Position
from tuner.core.train.due import Due
from tuner.core.train.interrupt import Interrupt
from tuner.core.train.loop import Chores, Length, Loop
from tuner.core.train.step import StepResult


class Recorder:
    """Collects what the loop does, as (what, step) pairs; its ``emit`` and ``advance`` stand for log and progress."""

    def __init__(self, interrupt_at: int | None = None):
        self.calls: list[tuple] = []
        self.interrupt = Interrupt()
        self.interrupt_at = interrupt_at

    def step(self, step, batches):
        self.calls.append(("step", step, list(batches)))
        if step == self.interrupt_at:
            self.interrupt.requested = True
        return StepResult(1.0, 1.0, len(batches))

    def chore(self, name):
        return lambda where: self.calls.append((name, getattr(where, "step", where)))

    def emit(self, kind, **fields):
        self.calls.append((f"{kind} event", fields["step"]))

    def advance(self, count, **fields):
        pass

    def only(self, *names):
        return [call for call in self.calls if call[0] in names]


def make_loop(recorder, *, steps, batches=5, accumulate=2, save=None, roll=None, validate=None, preview=None):
    def stream(epoch, start, step):
        yield from (f"{epoch}.{index}" for index in range(start, batches))

    return Loop(
        step=recorder.step,
        set_rates=lambda step: {"denoiser": 0.1},
        batches=stream,
        length=Length(steps=steps, batches=batches, accumulate=accumulate),
        chores=Chores(
            save=lambda where, rolling: recorder.chore("roll" if rolling else "save")(where),
            save_due=Due(save, steps),
            roll_due=Due(roll, steps),
            validate=recorder.chore("validate"),
            validate_due=Due(validate, steps),
            preview=recorder.chore("preview"),
            preview_due=Due(preview, steps),
            on_step=lambda step, metrics, group: None,
        ),
        events=recorder,
        interrupt=recorder.interrupt,
        average=LossAverage(),
        device=torch.device("cpu"),
    )


def start(step=0, epoch=0, batch=0):
    return Position(step=step, epoch=epoch, batch=batch, seed=0, fingerprint="")


def test_an_update_never_mixes_two_epochs():
    recorder = Recorder()
    position, reason = make_loop(recorder, steps=4).train(start(), recorder)
    assert [call[2] for call in recorder.only("step")] == [["0.0", "0.1"], ["0.2", "0.3"], ["0.4"], ["1.0", "1.1"]]
    assert (position, reason) == (start(4, 1, 2), "finished")


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_going_on_from_any_position_sees_the_same_batches(cut):
    whole, first, second = Recorder(), Recorder(interrupt_at=cut), Recorder()
    make_loop(whole, steps=7).train(start(), whole)
    position, reason = make_loop(first, steps=7).train(start(), first)
    assert reason == "interrupted"
    make_loop(second, steps=7).train(position, second)
    assert first.only("step") + second.only("step") == whole.only("step")


def test_saving_comes_before_validation_and_previews():
    recorder = Recorder()
    every = EveryFields(steps=2)
    make_loop(recorder, steps=3, save=every, validate=every, preview=every).train(start(), recorder)
    assert recorder.only("save", "validate", "preview") == [("save", 2), ("validate", 2), ("preview", 2)]


def test_the_last_step_is_left_to_the_end_of_the_run():
    recorder = Recorder()
    make_loop(recorder, steps=4, save=EveryFields(steps=2)).train(start(), recorder)
    assert recorder.only("save") == [("save", 2)]


def test_a_rolling_checkpoint_is_written_where_no_lasting_one_is_due():
    recorder = Recorder()
    make_loop(recorder, steps=7, save=EveryFields(steps=4), roll=EveryFields(steps=2)).train(start(), recorder)
    assert recorder.only("save", "roll") == [("roll", 2), ("save", 4), ("roll", 6)]


def test_epoch_dates_come_at_the_end_of_an_epoch():
    recorder = Recorder()
    make_loop(recorder, steps=10, save=EveryFields(epochs=2)).train(start(), recorder)
    assert recorder.only("save") == [("save", 6)]


def test_a_share_of_the_total_is_a_number_of_steps():
    due = Due(EveryFields(steps="25%"), 8)
    assert [step for step in range(1, 9) if due(step, epochs_done=None)] == [2, 4, 6, 8]


def test_minutes_count_from_the_last_time():
    now = [0.0]
    due = Due(EveryFields(minutes=1), 100, clock=lambda: now[0])
    hits = []
    for step in range(1, 6):
        now[0] += 40.0
        if due(step, epochs_done=None):
            hits.append(step)
    assert hits == [2, 4]


@contextmanager
def handlers_kept():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_aborts(number):
    with handlers_kept(), Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
