"""Streams of a device that does not exist: what is queued on them runs as late, or as early, as their events allow.

Computation is what the test itself does, at once. A copy inside ``torch.cuda.stream`` is queued; it runs when somebody
waits for an event behind it (late), or as soon as everything before it has happened (early). Late finds a use that does
not wait for its copy, early finds a copy that does not wait for the last use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


class Moment:
    """One recording of an event. stream: that gets there; None for computation, which is there."""

    def __init__(self, stream: LateStream | None) -> None:
        self.stream = stream
        self.done = stream is None

    def wait(self) -> None:
        while not self.done:
            assert self.stream is not None
            self.stream.advance()


class LateEvent:
    def __init__(self) -> None:
        self.moment = Moment(None)

    def record(self, stream: LateStream) -> None:
        self.moment = stream.mark()

    def synchronize(self) -> None:
        self.moment.wait()


class LateStream:
    """computes: what is queued here happens at once. follows: what comes next was told to wait for computation."""

    def __init__(self, *, computes: bool = False, early: bool = False) -> None:
        self.computes, self.early, self.follows = computes, early, False
        self.queue: deque[tuple[Moment | None, Callable[[], Any]]] = deque()

    def mark(self) -> Moment:
        moment = Moment(None if self.computes else self)

        def reached() -> None:
            moment.done = True

        if not self.computes:
            self.add(reached)
            self.follows = False
        return moment

    def record_event(self) -> LateEvent:
        event = LateEvent()
        event.record(self)
        return event

    def wait_event(self, event: LateEvent) -> None:
        moment = event.moment
        if self.computes:
            moment.wait()
            return
        self.follows = self.follows or moment.stream is None
        self.add(lambda: None, moment)

    def add(self, work: Callable[[], Any], after: Moment | None = None) -> None:
        self.queue.append((after, work))
        while self.early and self.queue and (self.queue[0][0] is None or self.queue[0][0].done):
            self.advance()

    def advance(self) -> None:
        after, work = self.queue.popleft()
        if after is not None:
            after.wait()
        work()

    def synchronize(self) -> None:
        while self.queue:
            self.advance()


class Device:
    """kept: addresses of memory that `record_stream` said a stream uses. copies: queued so far."""

    def __init__(self, *, early: bool) -> None:
        self.early, self.compute = early, LateStream(computes=True)
        self.current = self.compute
        self.kept: set[int] = set()
        self.copies = 0

    def stream(self, device: Any = None) -> LateStream:
        return LateStream(early=self.early)

    @contextmanager
    def inside(self, stream: LateStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def install(self, patch: pytest.MonkeyPatch) -> None:
        copy, to, empty_like = Tensor.copy_, Tensor.to, torch.empty_like

        def late_copy(into: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
            if self.current.computes:
                return copy(into, value)
            assert self.current.follows, "nothing says that what is read is there, or that what is filled is free"
            return queued(into, value, non_blocking)

        def queued(into: Tensor, value: Tensor, non_blocking: bool) -> Tensor:
            assert non_blocking, "the host would wait"
            self.copies += 1
            self.current.add(lambda: copy(into, value))
            return into

        def late_to(value: Tensor, *arguments: Any, **named: Any) -> Tensor:
            if self.current.computes:
                return to(value, *arguments, **named)
            # Into memory of its own, which nobody else has used.
            return queued(empty_like(value).fill_(float("nan")), value, named.get("non_blocking", False))

        def unpinned(value: Tensor, *, pin_memory: bool = False, **named: Any) -> Tensor:
            made = empty_like(value, **named)
            return made.fill_(float("nan")) if pin_memory else made

        patch.setattr(torch.cuda, "Stream", self.stream)
        patch.setattr(torch.cuda, "Event", LateEvent)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self.inside)
        patch.setattr(torch, "empty_like", unpinned)
        patch.setattr(Tensor, "copy_", late_copy)
        patch.setattr(Tensor, "to", late_to)
        patch.setattr(Tensor, "record_stream", lambda value, stream: self.kept.add(value.untyped_storage().data_ptr()))
