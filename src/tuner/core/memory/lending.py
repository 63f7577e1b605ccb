"""Weights that train while they live in host memory: a block computes with copies of them, gradients come back.

The parameters themselves never leave: the optimizer, averages, checkpoints and files see them, and they are always the
weights. For the time of a call the modules of a block hold views of a slot in their place. Two autograd nodes tie these
to the parameters. In the backward pass the first starts copying the gradients of a block as soon as all of them are
there; the second, which belongs to host memory, waits for the copies and hands them on. As autograd has a thread for
every device, the device goes on with the block before while gradients are on their way and are added up.

An update inside the backward pass needs no gradient in host memory: it changes the copies in the slot as soon as their
gradients are there, and these go back in place of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.memory.transfers import Transfers

Taker = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], bool]
"""Gets parameters, copies of them and gradients, changes the copies, and says whether it has."""


class Loans:
    """The parameters of a block that train, and the modules that hold them.

    parameters: in the order of the views that stand in for them. present: these views in the slot that the block is in,
    None when it is in none. taker: gets gradients that are complete; those that it does not take go to host memory.
    passes: forward passes with gradients since somebody set it to 0; of several, none has complete gradients.
    """

    def __init__(
        self,
        block: nn.Module,
        parameters: Sequence[Tensor],
        transfers: Transfers,
        present: Callable[[], Sequence[Tensor] | None],
    ) -> None:
        self.parameters, self.transfers, self.present = tuple(parameters), transfers, present
        self.taker: Taker | None = None
        self.passes = 0
        index = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (module._parameters, name, index[id(value)])
            for module in block.modules()
            for name, value in module._parameters.items()
            if id(value) in index
        ]

    @contextmanager
    def standing_in(self, views: Sequence[Tensor]) -> Iterator[None]:
        """Inside, modules find ``views`` of a slot where their parameters are, and gradients of these go to those."""
        lent = self._tied(views)
        for own, name, number in self._places:
            own[name] = lent[number]
        try:
            yield
        finally:
            for own, name, number in self._places:
                own[name] = self.parameters[number]

    def _tied(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        numbers = [number for number, parameter in enumerate(self.parameters) if parameter.requires_grad]
        if not torch.is_grad_enabled():
            # Products are computed in another way when a factor says that it needs a gradient, also without any.
            return [
                view.detach().requires_grad_(parameter.requires_grad)
                for view, parameter in zip(views, self.parameters, strict=True)
            ]
        if not numbers:
            return views
        if torch._C._current_graph_task_id() == -1:
            self.passes += 1
        passage = _Passage(self, numbers)
        landed = _Land.apply(passage, *[self.parameters[number] for number in numbers])  # type: ignore[no-untyped-call]
        lent = _Lend.apply(passage, [views[number] for number in numbers], *landed)  # type: ignore[no-untyped-call]
        tied = dict(zip(numbers, lent, strict=True))
        return [tied.get(number, view) for number, view in enumerate(views)]


class _Passage:
    """What the two nodes of one call share. numbers: of the parameters. wait: for the gradients that were sent."""

    def __init__(self, loans: Loans, numbers: Sequence[int]) -> None:
        self.loans, self.numbers = loans, numbers
        self.wait: Callable[[], None] | None = None

    def send(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients on their way to host memory, or none where the update has been made."""
        if self._taken(gradients):
            return [None] * len(gradients)
        sent, self.wait = self.loans.transfers.fetch(gradients)
        return sent

    def _taken(self, gradients: Sequence[Tensor | None]) -> bool:
        loans = self.loans
        if loans.taker is None or loans.passes != 1:
            return False
        views = loans.present()
        if views is None:
            return False
        pairs = [(number, each) for number, each in zip(self.numbers, gradients, strict=True) if each is not None]
        parameters = [loans.parameters[number] for number, _ in pairs]
        copies = [views[number] for number, _ in pairs]
        if not loans.taker(parameters, copies, [each for _, each in pairs]):
            return False
        loans.transfers.store([(each.detach(), copy) for each, copy in zip(parameters, copies, strict=True)])
        return True


class _Land(torch.autograd.Function):
    """The parameters as they are. Backward runs in the thread of the host and takes gradients that are arriving."""

    @staticmethod
    def forward(ctx: Any, passage: _Passage, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.passage = passage
        ctx.set_materialize_grads(False)
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.passage.wait is not None:
            ctx.passage.wait()
        return None, *gradients


class _Lend(torch.autograd.Function):
    """Copies on the device in place of the parameters. Backward runs when all gradients of the block are there."""

    @staticmethod
    def forward(ctx: Any, passage: _Passage, views: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.passage = passage
        ctx.set_materialize_grads(False)
        return tuple(view.detach() for view in views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.passage.send(gradients)
