"""Blocks that live in host memory and visit a few slots on the device.

Each streamed block owns one flat host buffer, and its parameters are views of it or of the slot that holds a copy, so
a load is one transfer. Frozen weights are the same in both places: nothing is ever written back. Weights that train are
those in host memory, where their gradients go and where they are updated (`lending`); copies of them are good for one
forward pass and its backward pass. The blocks are visited in order in the forward pass and in reverse in the backward
pass; while one computes, the next ones are on their way into the other slots, and the last ones of the forward pass are
still there when the backward pass begins with them.

On CUDA transfers run on one stream of their own and are ordered by events alone: a load waits for the computation that
was queued when it was asked for, which includes the slot's last use, and a block waits for its own load. The host never
waits. Elsewhere the same code makes plain copies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from tuner.core.errors import UsageError
from tuner.core.memory.layout import Layout, flat_layout
from tuner.core.memory.lending import Loans, Taker
from tuner.core.memory.transfers import Slot, Transfers, open_transfers
from tuner.core.types import Blocks

SLOTS = 3
"""Blocks on the device at a time: one that computes and two on their way."""


class Streamed:
    """``forward`` of a block whose weights are brought before it runs.

    recomputed: something outside runs this again in the backward pass and keeps none of its saved tensors, so there is
    nothing to remember about weights.
    """

    def __init__(self, streaming: Streaming, number: int, inner: Callable[..., Any]) -> None:
        self.streaming, self.number, self.inner = streaming, number, inner
        self.recomputed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.streaming.bring(self.number)
        with self.streaming.lent(self.number, slot):
            if self.recomputed or not torch.is_grad_enabled():
                return self.inner(*args, **kwargs)
            with saved_tensors_hooks(self._pack, self._unpack):
                return self.inner(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Any:
        """What autograd keeps: a weight's place in its block instead of the slot's bytes, which will change."""
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            inner = {name: self._pack(getattr(tensor, name)) for name in names}
            if not any(isinstance(value, _Place) for value in inner.values()):
                return tensor
            return _Wrapped(type(tensor), inner, context, tensor.size(), tensor.stride())
        if not self.streaming.is_in_slot(tensor):
            return tensor
        return _Place(tensor)

    def _unpack(self, packed: Any) -> Any:
        if isinstance(packed, _Place):
            return packed.find(self.streaming.bring(self.number))
        if isinstance(packed, _Wrapped):
            inner = {name: self._unpack(value) for name, value in packed.inner.items()}
            return packed.kind.__tensor_unflatten__(inner, packed.context, packed.size, packed.stride)  # type: ignore[attr-defined]
        return packed


class _Place:
    """Where a tensor lies in the buffer of its block; the same in every slot."""

    __slots__ = ("dtype", "offset", "size", "stride")

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tensor.size(), tensor.stride()

    def find(self, slot: Slot) -> Tensor:
        return slot.flat.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class _Wrapped:
    """A tensor subclass made of several tensors, some of which lie in a slot."""

    __slots__ = ("context", "inner", "kind", "size", "stride")

    def __init__(
        self, kind: type, inner: dict[str, Any], context: Any, size: torch.Size, stride: tuple[int, ...]
    ) -> None:
        self.kind, self.inner, self.context, self.size, self.stride = kind, inner, context, size, stride


class Streaming:
    """The streamed blocks of a module, in the order in which they run.

    loads: transfers into a slot so far. late: those of them that were not asked for ahead. transfers: every copy goes
    through it; after the construction its ``to_host`` grows by gradients and by weights that changed in a slot.
    """

    def __init__(self, blocks: Sequence[nn.Module], layouts: Sequence[Layout], transfers: Transfers) -> None:
        self.blocks, self.layouts, self.transfers = list(blocks), list(layouts), transfers
        self.loads = self.late = 0
        self.host: list[Tensor] = []
        for layout in layouts:
            flat = transfers.host_buffer(layout.size)
            for piece in layout.pieces:
                transfers.copy(piece.view(flat), piece.value())
            layout.settle(flat)
            self.host.append(flat)
        self.loans = {
            number: Loans(block, layout.trained, transfers, partial(self._present, number))
            for number, (block, layout) in enumerate(zip(blocks, layouts, strict=True))
            if layout.trained
        }
        largest = max(layout.size for layout in layouts)
        self.slots = [transfers.slot(largest) for _ in range(min(SLOTS, len(blocks) - 1))]
        self._bases = {slot.flat.untyped_storage().data_ptr() for slot in self.slots}
        self._held: dict[int, Slot] = {}
        self._current: tuple[int, bool] | None = None
        self._last = -1
        for number, block in enumerate(self.blocks):
            block.forward = Streamed(self, number, block.forward)

    def bring(self, number: int) -> Slot:
        """Make block ``number`` ready in a slot, its parameters being views of it, and ask for the next ones."""
        backward = torch._C._current_graph_task_id() != -1
        if not backward and number <= self._last:
            self._forget_copies()
        self._last = len(self.blocks) if backward else number
        if self._current == (number, backward):
            return self._held[number]
        wanted = self._wanted(number, backward)
        # Whoever watches or replaces operations around a block must not see the transfers: whether one happens differs
        # between a block's forward pass and its recomputation.
        with _disable_current_modes(), torch.no_grad():
            self._current = None
            self.late += number not in self._held
            for each in wanted:
                if each not in self._held:
                    self._load(each, wanted)
            slot = self._held[number]
            self.transfers.wait(slot)
            self.layouts[number].point(slot.flat)
        self._current = (number, backward)
        return slot

    def lent(self, number: int, slot: Slot) -> AbstractContextManager[None]:
        """Inside, the block computes with the slot's copies of those of its weights that train."""
        loans = self.loans.get(number)
        return nullcontext() if loans is None else loans.standing_in(self.layouts[number].lent(slot.flat))

    def update_in_slots(self, taker: Taker) -> None:
        """Give gradients to ``taker`` while their block is on the device. `finish` must follow each backward pass."""
        for loans in self.loans.values():
            loans.taker, loans.passes = taker, 0

    def finish(self) -> None:
        """Wait until what changed in slots is in host memory."""
        self.transfers.finish()
        for loans in self.loans.values():
            loans.passes = 0

    def is_in_slot(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._bases

    def remove(self) -> None:
        """Give the blocks their former ``forward`` back. Their weights stay in host memory.

        What was put around the streamed ``forward`` later (recomputation) goes first.
        """
        for block, layout, flat in zip(self.blocks, self.layouts, self.host, strict=True):
            streamed = block.__dict__.pop("forward")
            if streamed.inner != block.forward:
                block.forward = streamed.inner
            layout.point(flat)
            layout.forget()
        self.slots, self._held, self._current = [], {}, None

    def _wanted(self, number: int, backward: bool) -> list[int]:
        """The block itself and those that follow, as many as there are slots.

        A forward pass with gradients ends where its backward pass begins; one without is followed by another, for which
        copies of what trains would be too old.
        """
        count = len(self.blocks)
        ahead = range(len(self.slots))
        if backward:
            return [number - step for step in ahead if number >= step]
        if torch.is_grad_enabled():
            return [number + step for step in ahead if number + step < count]
        following = [((number + step) % count, number + step < count) for step in ahead]
        return [each for each, same in following if same or each not in self.loans]

    def _present(self, number: int) -> list[Tensor] | None:
        slot = self._held.get(number)
        if slot is None:
            return None
        self.transfers.wait(slot)
        return self.layouts[number].lent(slot.flat)

    def _forget_copies(self) -> None:
        """A pass begins, and weights that train may have changed since the last one."""
        for number in self.loans.keys() & self._held.keys():
            self._held.pop(number).block = None
            self.layouts[number].point(self.host[number])
            if self._current is not None and self._current[0] == number:
                self._current = None

    def _load(self, number: int, wanted: Sequence[int]) -> None:
        free = next((slot for slot in self.slots if slot.block not in wanted), None)
        assert free is not None, "there are as many slots as blocks wanted at a time"
        if free.block is not None:
            self.layouts[free.block].point(self.host[free.block])
            del self._held[free.block]
            free.block = None
        self.transfers.load(free, self.host[number])
        self._held[number], free.block = free, number
        self.loads += 1


def stream_limit(lists: Sequence[Blocks]) -> int:
    """The largest ``memory.swap_blocks`` of a model: two blocks stay on the device."""
    return sum(blocks.count for blocks in lists) - 2


def stream_blocks(model: nn.Module, lists: Sequence[Blocks], count: int, device: torch.device) -> Streaming:
    """Stream ``count`` blocks, evenly spread over the lists as one sequence; move everything else to ``device``.

    ``model`` may be on any device and needs no room on ``device`` as a whole. Replaces ``forward`` on the instances;
    what it was before (a compiled block, say) runs inside. Adapters of the blocks are none of their parameters and stay
    where they are. Parameters that train, as ``requires_grad`` says now, stay in host memory with their gradients.
    UsageError: fewer than 2 blocks, or more than `stream_limit`.
    """
    limit = stream_limit(lists)
    if not 2 <= count <= limit:
        raise UsageError(
            f"cannot stream {count} blocks", where="memory.swap_blocks", why=f"this model can stream 2 to {limit}"
        )
    sequence = [(block, each.outside) for each in lists for block in model.get_submodule(each.path).children()]
    chosen = [sequence[(2 * index + 1) * len(sequence) // (2 * count)] for index in range(count)]
    layouts = [flat_layout(block, [re.compile(pattern) for pattern in outside]) for block, outside in chosen]
    streamed = {id(tensor) for layout in layouts for tensor in layout.owners}
    streaming = Streaming([block for block, _ in chosen], layouts, open_transfers(device))
    for module in model.modules():
        _move(module, streamed, device)
    return streaming


def _move(module: nn.Module, streamed: set[int], device: torch.device) -> None:
    """Bring a module's own parameters and buffers to ``device``, except streamed ones."""
    own = list(_own(module))
    if all(tensor.device == device for tensor in own):
        return
    if not any(id(tensor) in streamed for tensor in own):
        # The path that ``Module.to`` takes: whoever follows moves (shared storage) sees this one too.
        module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
        return
    for tensor in own:
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
