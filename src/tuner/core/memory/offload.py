"""Inputs of recomputed blocks in host memory between the forward and the backward pass.

The asynchronous form on CUDA has not run on a GPU yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MODES = ("sync", "async")


class _Held:
    """A tensor in host memory. previous: the one that was put away before, which backward needs next."""

    def __init__(self, host: Tensor, device: torch.device, previous: _Held | None) -> None:
        self.host, self.device = host, device
        self.previous = None if previous is None else weakref.ref(previous)
        self.back: Tensor | None = None
        self.ready: torch.cuda.Event | None = None


class ActivationOffload:
    """Takes what autograd keeps inside `saving` to host memory, and back when backward asks for it.

    Tensors that every block gets (text, positions, modulations) stay where they are: other blocks keep them there.
    Parts of larger tensors stay too: a copy has other strides, and torch may choose other operations for them.
    taken: bytes copied to host memory so far.
    """

    def __init__(self) -> None:
        self.taken = 0
        # By weak reference: an address is given to the next tensor as soon as the last one is gone.
        self._shared: set[StorageWeakRef] = set()
        self._seen: set[StorageWeakRef] = set()

    def saving(self, inputs: Iterable[Any]) -> saved_tensors_hooks:
        """A context for one call of a block with these inputs."""
        storages = {_storage(each) for each in inputs if isinstance(each, Tensor)}
        self._shared, self._seen = storages & self._seen, storages
        return saved_tensors_hooks(self._pack, self._unpack)

    def put(self, tensor: Tensor) -> _Held:
        """Copy to host memory."""
        return _Held(tensor.detach().to("cpu", copy=True), tensor.device, None)

    def get(self, held: _Held) -> Tensor:
        """Copy back."""
        return held.host.to(held.device)

    def _pack(self, tensor: Tensor) -> Tensor | _Held:
        if not tensor.numel() or _storage(tensor) in self._shared or not _keeps_strides(tensor):
            return tensor
        self.taken += tensor.numel() * tensor.element_size()
        return self.put(tensor)

    def _unpack(self, packed: Tensor | _Held) -> Tensor:
        return self.get(packed) if isinstance(packed, _Held) else packed


class AsyncOffload(ActivationOffload):
    """On a stream of its own with pinned memory: leaving while the block computes, coming back one block ahead."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: weakref.ref[_Held] | None = None

    def put(self, tensor: Tensor) -> _Held:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
        made = torch.cuda.current_stream(tensor.device).record_event()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(made)
            host.copy_(tensor.detach(), non_blocking=True)
        # The block's own use ends before the copy may have; the memory must not be given away until then.
        tensor.record_stream(self.stream)
        held = _Held(host, tensor.device, None if self._last is None else self._last())
        self._last = weakref.ref(held)
        return held

    def get(self, held: _Held) -> Tensor:
        self._fetch(held)
        previous = None if held.previous is None else held.previous()
        if previous is not None:
            self._fetch(previous)
        assert held.back is not None and held.ready is not None
        compute = torch.cuda.current_stream(held.device)
        compute.wait_event(held.ready)
        # It was allocated on the copying stream but is read and freed on this one.
        held.back.record_stream(compute)
        back, held.back = held.back, None
        return back

    def _fetch(self, held: _Held) -> None:
        if held.back is not None:
            return
        with torch.cuda.stream(self.stream):
            held.back = held.host.to(held.device, non_blocking=True)
            held.ready = self.stream.record_event()


def open_offload(mode: str, device: torch.device) -> ActivationOffload:
    """``sync`` waits for every copy, ``async`` overlaps copies with computation where the device can (CUDA)."""
    return AsyncOffload(device) if mode == "async" and device.type == "cuda" else ActivationOffload()


def _keeps_strides(tensor: Tensor) -> bool:
    """Whether a copy of the tensor has its strides: torch packs what has gaps or overlaps."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
