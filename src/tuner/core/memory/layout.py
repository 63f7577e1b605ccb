"""All tensors of a module in one flat buffer, and pointing the module at such a buffer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.core.compute.linear import StorageGroup

ALIGNMENT = 256
"""Bytes; what a device allocation has, which fast kernels rely on."""

Put = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor's place in the buffer, at ``offset`` bytes. value: the tensor now; put: make a view the tensor.
    trained: the parameter, if it trains."""

    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], Tensor]
    put: Put
    trained: Tensor | None = None

    def view(self, flat: Tensor) -> Tensor:
        start = self.offset // self.dtype.itemsize
        return flat.view(self.dtype).as_strided(self.size, self.stride, start)


class Layout:
    """Where everything lies. owners: the parameters and buffers that belong to it; size: bytes of a buffer. trained:
    those of the parameters that train, which are in one place all the time.
    """

    def __init__(self, pieces: Sequence[Piece], owners: Sequence[Tensor], size: int) -> None:
        self.pieces, self.owners, self.size = tuple(pieces), tuple(owners), size
        self.trained = tuple(piece.trained for piece in pieces if piece.trained is not None)
        self._frozen = [piece for piece in pieces if piece.trained is None]
        self._lent = [piece for piece in pieces if piece.trained is not None]
        self._views: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._at: int | None = None

    def settle(self, flat: Tensor) -> None:
        """Make all of the module's tensors views of ``flat``, uint8 with at least ``size`` bytes. Copies nothing."""
        for piece, view in zip(self._lent, self.lent(flat), strict=True):
            piece.put(view)
        self.point(flat)

    def point(self, flat: Tensor) -> None:
        """Make those of the module's tensors that do not train views of ``flat``. Copies nothing."""
        if flat.data_ptr() == self._at:
            return
        for piece, view in zip(self._frozen, self._in(flat)[0], strict=True):
            piece.put(view)
        self._at = flat.data_ptr()

    def lent(self, flat: Tensor) -> list[Tensor]:
        """Views of ``flat`` where it has copies of what trains, in the order of ``trained``."""
        return self._in(flat)[1]

    def forget(self) -> None:
        """Let go of the buffers it has pointed at; the module's own tensors stay as they are."""
        self._views = {}

    def _in(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        key = flat.data_ptr()
        if key not in self._views:
            self._views[key] = (
                [piece.view(flat) for piece in self._frozen],
                [piece.view(flat) for piece in self._lent],
            )
        return self._views[key]


def flat_layout(module: nn.Module, outside: Sequence[re.Pattern[str]] = ()) -> Layout:
    """Lay out a module's parameters and buffers, leaving out names that an ``outside`` pattern matches in full.

    Frozen linears that share storage among themselves stay adjacent; storage shared with the outside is given up, and
    that of linears that train, which are multiplied one by one. Tensors made of several tensors (quantized weights) are
    laid out part by part.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    owners = {id(tensor): tensor for name, tensor in named if not any(pattern.fullmatch(name) for pattern in outside)}
    pieces, size = [], 0
    for tensor, value, put in _parts(module, owners):
        # Dense tensors keep their order of axes, others become contiguous.
        stride = torch.empty_like(tensor, device="meta").stride()
        trained = tensor if tensor.requires_grad else None
        pieces.append(Piece(size, tensor.size(), stride, tensor.dtype, value, put, trained))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return Layout(pieces, list(owners.values()), size)


def _parts(module: nn.Module, owners: dict[int, Tensor]) -> Iterator[tuple[Tensor, Callable[[], Tensor], Put]]:
    left = dict(owners)
    for group in _groups(module):
        weights = [member.weight for member in group.members]
        if not any(id(weight) in owners for weight in weights):
            continue
        whole = all(id(weight) in left for weight in weights) and all(map(_same, group.parameters, weights))
        trains = any(tensor.requires_grad for member in group.members for tensor in member.parameters(recurse=False))
        if group.weight is None or not whole or trains:
            group.unlink()
            continue
        yield from _joint(group, "weight")
        biases = [member.bias for member in group.members]
        if group.bias is not None:
            yield from _joint(group, "bias")
        for tensor in (*weights, *biases):
            left.pop(id(tensor), None)
    for tensor in left.values():
        yield from _plain(tensor)


def _groups(module: nn.Module) -> list[StorageGroup]:
    found = [each.__dict__.get("storage_group") for each in module.modules()]
    return list({id(group): group for group in found if group is not None}.values())


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other


def _joint(group: StorageGroup, name: str) -> Iterator[tuple[Tensor, Callable[[], Tensor], Put]]:
    members = [getattr(member, name) for member in group.members]

    def put(view: Tensor) -> None:
        setattr(group, name, view)
        start = 0
        for member in members:
            member.data = view.narrow(0, start, member.shape[0])
            start += member.shape[0]

    yield getattr(group, name), lambda: getattr(group, name), put


def _plain(tensor: Tensor) -> Iterator[tuple[Tensor, Callable[[], Tensor], Put]]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner: Tensor = getattr(tensor, name)
            if is_traceable_wrapper_subclass(inner):
                yield from _plain(inner)
            else:
                yield inner, _getter(tensor, name), _setter(tensor, name)
        return
    yield tensor, lambda: tensor.data, _setter(tensor, "data")


def _getter(owner: object, name: str) -> Callable[[], Tensor]:
    def get() -> Tensor:
        value: Tensor = getattr(owner, name)
        return value

    return get


def _setter(owner: object, name: str) -> Put:
    return lambda view: setattr(owner, name, view)
