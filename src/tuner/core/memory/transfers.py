"""Copies between host and device memory, counted: plain ones anywhere, overlapping ones on CUDA.

The CUDA half has not run on a GPU yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tuner.core.compute.pinned import page_locked


class Slot:
    """Room on the device for one block. block: whose weights it holds."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.block: int | None = None


class Transfers:
    """Plain copies. to_device and to_host count bytes; on the CPU, where both are one, by what the copy is for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_device = self.to_host = 0

    def host_buffer(self, size: int) -> Tensor:
        """``size`` bytes of host memory."""
        return torch.empty(size, dtype=torch.uint8)

    def slot(self, size: int) -> Slot:
        """A slot of ``size`` bytes."""
        return Slot(torch.empty(size, dtype=torch.uint8, device=self.device))

    def copy(self, host: Tensor, value: Tensor) -> None:
        """Fill ``host`` with ``value``, from wherever it is."""
        host.copy_(value)
        self.to_host += host.numel() * host.element_size()

    def load(self, slot: Slot, host: Tensor) -> None:
        """Fill the beginning of a slot; it may be used after `wait`."""
        slot.flat[: host.numel()].copy_(host)
        self.to_device += host.numel()

    def wait(self, slot: Slot) -> None:
        """What is computed from now on finds the slot filled."""

    def fetch(self, values: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Callable[[], None]]:
        """Copies in host memory, and what to call before they are read."""
        return [None if value is None else self._fetched(value) for value in values], lambda: None

    def _fetched(self, value: Tensor) -> Tensor:
        self.to_host += value.numel() * value.element_size()
        return value.detach().to("cpu", copy=True)

    def store(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fill each first tensor, in host memory, with the second, in a slot; the host may read it after `finish`."""
        for host, value in pairs:
            self.copy(host, value)

    def finish(self) -> None:
        """Wait for everything that goes to host memory."""


FETCHES = 2
"""Fetches on their way at a time: what they copy stays on the device until then."""


class CudaTransfers(Transfers):
    """Pinned host memory and a stream for each direction, ordered against computation by events.

    Loads never make the host wait. A fetch waits for the one `FETCHES` before it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.back = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready: dict[Slot, torch.cuda.Event] = {}
        self._arriving: deque[torch.cuda.Event] = deque()
        self._stored: torch.cuda.Event | None = None

    def host_buffer(self, size: int) -> Tensor:
        return page_locked(size, "memory.swap_blocks")

    def slot(self, size: int) -> Slot:
        made = super().slot(size)
        # Copies may be on their way when it is let go of; its memory must not be given away until they have ended.
        for stream in (self.stream, self.back):
            made.flat.record_stream(stream)
        return made

    def load(self, slot: Slot, host: Tensor) -> None:
        # Everything that reads the slot's old content was queued before this call.
        unused = torch.cuda.current_stream(self.device).record_event()
        ready = self._ready.setdefault(slot, torch.cuda.Event())  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(unused)
            if self._stored is not None:
                self.stream.wait_event(self._stored)
            slot.flat[: host.numel()].copy_(host, non_blocking=True)
            ready.record(self.stream)
        self.to_device += host.numel()

    def wait(self, slot: Slot) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._ready[slot])

    def fetch(self, values: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Callable[[], None]]:
        if len(self._arriving) == FETCHES:
            self._arriving.popleft().synchronize()
        made = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.back):
            self.back.wait_event(made)
            copies = [None if value is None else self._fetched(value) for value in values]
            arrived = self.back.record_event()
        self._arriving.append(arrived)
        return copies, arrived.synchronize

    def _fetched(self, value: Tensor) -> Tensor:
        host = torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
        host.copy_(value.detach(), non_blocking=True)
        # Its own use ends before the copy may have; the memory must not be given away until then.
        value.record_stream(self.back)
        self.to_host += value.numel() * value.element_size()
        return host

    def store(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        made = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.back):
            self.back.wait_event(made)
            for host, value in pairs:
                host.copy_(value, non_blocking=True)
                self.to_host += host.numel() * host.element_size()
            self._stored = self.back.record_event()

    def finish(self) -> None:
        self.back.synchronize()


def open_transfers(device: torch.device) -> Transfers:
    """The best way to copy to ``device``."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers(device)
